"""Attention KV of a small transformer, saved and restored by page through the KV cache of fs3.

A system prompt is shared by several requests. Each is prefilled twice: with nothing, and with the pages that the cache
has of its prefix. Prints the times, checks that the logits are equal to the last bit. Run it with

    python examples/kv_attention --url 'fs3://127.0.0.1:7000/?token_file=fs3-cluster/token'

again, and the first request finds its pages, too: they were left by the run before.
"""

from __future__ import annotations

import argparse
import hashlib
import time

import torch
from model import Model, Shape
from torch import Tensor

import fs3.kvcache


class Pages:
    """Attention KV in the cache: an entry is a page of tokens, named by the hash of all tokens up to its end."""

    def __init__(self, cache: fs3.kvcache.KVCache, shape: Shape, page_tokens: int) -> None:
        self._cache = cache
        self._shape = shape
        self._page_tokens = page_tokens

    def new_kv(self, tokens: int) -> Tensor:
        """Memory for the KV of a sequence: page by page, so that each page is one piece of memory."""
        shape = self._shape
        pages = -(-tokens // self._page_tokens)
        return torch.zeros(pages, shape.layers, 2, self._page_tokens, shape.heads, shape.head_dim)

    def names(self, tokens: Tensor) -> list[bytes]:
        """A name for each whole page but one that ends the sequence: somebody has to compute the logits behind it."""
        names, digest = [], hashlib.sha256()
        for end in range(self._page_tokens, len(tokens), self._page_tokens):
            digest.update(tokens[end - self._page_tokens : end].numpy().tobytes())
            names.append(digest.digest())
        return names

    def restore(self, tokens: Tensor, kv: Tensor) -> int:
        """Fill `kv` with the longest prefix that the cache has; its length in tokens."""
        names = self.names(tokens)
        count = self._cache.match_prefix(names)
        found = self._cache.get_batch_into(names[:count], list(kv[:count]))
        # What was evicted since then ends the prefix.
        whole = next((i for i, length in enumerate(found) if length is None), count)
        return whole * self._page_tokens

    def save(self, tokens: Tensor, kv: Tensor, begin: int) -> int:
        """Put the pages from the token `begin` on; how many were kept."""
        first = begin // self._page_tokens
        names = self.names(tokens)[first:]
        return sum(self._cache.put_batch(names, list(kv[first : first + len(names)])))


def in_layers(kv: Tensor) -> Tensor:
    """The KV as attention sees it: for each layer K and V, token by token."""
    pages, layers, two, page_tokens, heads, head_dim = kv.shape
    return kv.permute(1, 2, 0, 3, 4, 5).reshape(layers, two, pages * page_tokens, heads, head_dim)


def into_pages(layers: Tensor, kv: Tensor) -> None:
    """The opposite of :func:`in_layers`."""
    pages, count, two, page_tokens, heads, head_dim = kv.shape
    kv.copy_(layers.reshape(count, two, pages, page_tokens, heads, head_dim).permute(2, 0, 1, 3, 4, 5))


def answer(model: Model, pages: Pages, tokens: Tensor, page_tokens: int) -> tuple[Tensor, int, int, float]:
    """Prefill with what the cache has, save the rest; logits, tokens restored, pages kept, seconds to the logits."""
    began = time.perf_counter()
    kv = pages.new_kv(len(tokens))
    restored = pages.restore(tokens, kv)
    layers = in_layers(kv)
    logits = model.prefill(tokens, layers, restored, page_tokens)
    seconds = time.perf_counter() - began
    into_pages(layers, kv)
    return logits, restored, pages.save(tokens, kv, restored), seconds


def run(cache: fs3.kvcache.KVCache, arguments: argparse.Namespace) -> None:
    """All requests, without and with the cache."""
    shape = Shape(arguments.layers, arguments.heads, arguments.head_dim)
    page_tokens = arguments.page_tokens
    model = Model(shape, seed=1)
    pages = Pages(cache, shape, page_tokens)
    draw = torch.Generator().manual_seed(2)

    def words(count: int) -> Tensor:
        return torch.randint(shape.vocabulary, (count,), generator=draw)

    prompt = words(arguments.prompt_tokens)
    print(f"a page of {page_tokens} tokens has {page_tokens * shape.kv_bytes / 1024:.0f} KiB")
    for number in range(arguments.requests):
        tokens = torch.cat([prompt, words(arguments.question_tokens)])
        began = time.perf_counter()
        expected = model.prefill(tokens, in_layers(pages.new_kv(len(tokens))), 0, page_tokens)
        without_s = time.perf_counter() - began
        logits, restored, kept, with_s = answer(model, pages, tokens, page_tokens)
        if not torch.equal(logits, expected):
            raise SystemExit(f"request {number}: the logits differ by {(logits - expected).abs().max()}")
        print(
            f"request {number}: {len(tokens)} tokens, {restored} restored, {kept} pages saved; prefill "
            f"{1000 * without_s:.0f} ms without, {1000 * with_s:.0f} ms with the cache; logits are equal"
        )
    stats = cache.stats().client
    print(
        f"pages: {stats.hits} hits, {stats.misses} misses; a batch of gets took {1e3 * stats.get_p50_s:.1f} ms (median)"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="the cluster (default: that of FS3_URL)")
    parser.add_argument("--namespace", default="/kv/attention", help="directory of the cache (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="that all requests begin with")
    parser.add_argument("--question-tokens", type=int, default=100, help="that each request has of its own")
    parser.add_argument("--page-tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    arguments = parser.parse_args()
    # Another model, or pages of another size, are another version: their entries never match.
    version = f"example-1/{arguments.layers}x{arguments.heads}x{arguments.head_dim}/float32/{arguments.page_tokens}"
    with fs3.kvcache.open(arguments.url, arguments.namespace, version=version) as cache:
        run(cache, arguments)


if __name__ == "__main__":
    main()
