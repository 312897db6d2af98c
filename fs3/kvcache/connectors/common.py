"""What the connectors share: options, keys that name the format of what they hold, memory at an address."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import fs3.kvcache
from fs3.core.units import parse_bytes
from fs3.kvcache import KVCache

# Option -> types that it may have. Sizes may be texts such as "100GiB".
OPTIONS: dict[str, tuple[type, ...]] = {
    "url": (str,),
    "namespace": (str,),
    "create": (bool,),
    "capacity": (int, str),
    "ttl": (int, float),
    "replicas": (int,),
    "durable": (bool,),
    "timeout": (int, float),
}


def open_cache(options: Mapping[str, Any], where: str) -> KVCache:
    """Open the namespace that `options` name.

    `options`: `namespace`, the directory of the cache (needed); `url` of the cluster (else that of FS3_URL); and what
    :func:`fs3.kvcache.open` takes: `create`, `capacity` (bytes, or a text such as "100GiB"), `ttl` (seconds),
    `replicas`, `durable`, `timeout` (seconds). `where` names the place of the options, for errors. Raises ValueError
    for options that are unknown, missing or of a wrong type, OSError when the namespace cannot be opened.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError(f"{where} has the unknown option {name!r}; there are {', '.join(OPTIONS)}")
        kinds = OPTIONS[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{where}: {name} is {value!r}, which is no {' or '.join(k.__name__ for k in kinds)}")
    given = dict(options)
    namespace = given.pop("namespace", "")
    if not namespace.startswith("/"):
        raise ValueError(
            f"{where}: namespace names the directory of the cache, for example /kv/prod, not {namespace!r}"
        )
    if isinstance(given.get("capacity"), str):
        given["capacity"] = parse_bytes(given["capacity"])
    return fs3.kvcache.open(given.pop("url", None), namespace, **given)


def key_prefix(software: str, model: str | None, form: Mapping[str, Any]) -> bytes:
    """What keys of `software` for `model` begin with, when values are of the form `form`.

    `form` is all that the meaning of a value's bytes depends on: types, page size, layout, ranks. It is in the key as a
    hash, so that an entry of another form never matches; the model is readable, for `fs3 kv ls`.
    """
    text = json.dumps({**form, "model": model}, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
    return f"{software}/{model or '-'}/{digest}/".encode()


def memory_at(address: int, length_bytes: int) -> memoryview:
    """Memory that the caller vouches for: it must stay where it is for as long as the result is used."""
    return memoryview((ctypes.c_char * length_bytes).from_address(address)).cast("B")
