"""A small transformer (decoder only, in the style of Llama) that can go on from the attention KV of a prefix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    layers: int
    heads: int
    head_dim: int
    vocabulary: int = 1000

    @property
    def width(self) -> int:
        """Numbers for each token between layers."""
        return self.heads * self.head_dim

    @property
    def kv_bytes(self) -> int:
        """Attention KV of one token."""
        return 2 * self.layers * self.width * torch.float32.itemsize


class Layer(nn.Module):
    """Attention and a gated feed-forward network."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, hidden = shape.width, 3 * shape.width
        self.shape = shape
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, kv: Tensor, begin: int) -> Tensor:
        """`x` are tokens from `begin` on; `kv` has room for all, and holds those before."""
        tokens, end = x.shape[0], begin + x.shape[0]
        heads = self.qkv(self.norm1(x)).view(tokens, 3, self.shape.heads, self.shape.head_dim)
        positions = torch.arange(begin, end)
        q, k = rotated(heads[:, 0], positions), rotated(heads[:, 1], positions)
        kv[0, begin:end], kv[1, begin:end] = k, heads[:, 2]
        # A token sees those before it and itself.
        seen = torch.arange(end) <= positions[:, None]
        attended = scaled_dot_product_attention(
            q.transpose(0, 1), kv[0, :end].transpose(0, 1), kv[1, :end].transpose(0, 1), attn_mask=seen
        )
        x = x + self.out(attended.transpose(0, 1).reshape(tokens, -1))
        gate, value = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(silu(gate) * value)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Model(nn.Module):
    """Tokens to logits. The same seed makes the same weights everywhere."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm, self.head = nn.RMSNorm(shape.width), nn.Linear(shape.width, shape.vocabulary, bias=False)

    def prefill(self, tokens: Tensor, kv: Tensor, begin: int, page_tokens: int) -> Tensor:
        """Logits after the last of `tokens`; `kv` holds those before `begin`, and is filled with the others.

        Works page by page: so the numbers do not depend on where it begins.
        """
        with torch.inference_mode():
            for start in range(begin, len(tokens), page_tokens):
                x = self.embedding(tokens[start : start + page_tokens])
                for layer, of_layer in zip(self.layers, kv, strict=True):
                    x = layer(x, of_layer, start)
            logits: Tensor = self.head(self.norm(x[-1]))
        return logits
