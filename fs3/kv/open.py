"""Open a store by its URL."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

from fs3.kv.api import KvError, KvStore

_BOOLEANS = {"0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}


def open_store(url: str) -> KvStore:
    """Open ``memory:``, ``lmdb:/path[?durable=0][&map_bytes=N]`` or ``fdb:[/cluster/file][?timeout_ms=N]``.

    Raises KvError with one line that says what is wrong with the URL or the store. Call it where an event loop
    runs or will run; the store belongs to that loop. ``memory:`` is a new, empty store each time. ``fdb:`` without a
    file, or just ``fdb``, means $FDB_CLUSTER_FILE or the default one.
    """
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if parts.scheme == "memory":
        from fs3.kv.memory import MemoryKv

        _refuse_unknown(url, options, ())
        return MemoryKv()
    if parts.scheme == "lmdb":
        return _open_lmdb(url, parts.netloc + parts.path, options)
    if parts.scheme == "fdb":
        return _open_fdb(url, parts.netloc + parts.path, options)
    if url == "fdb":
        return _open_fdb(url, "", {})
    raise KvError(f"{url!r} is not a store URL: use memory:, lmdb:/path[?durable=0] or fdb:[/cluster/file]")


def lmdb_directory(url: str) -> str | None:
    """Return the directory of an ``lmdb:`` URL, None for other URLs."""
    parts = urlsplit(url)
    return parts.netloc + parts.path if parts.scheme == "lmdb" else None


def _open_lmdb(url: str, path: str, options: dict[str, str]) -> KvStore:
    from fs3.kv.lmdb import MAP_BYTES, LmdbKv

    _refuse_unknown(url, options, ("durable", "map_bytes"))
    if not path:
        raise KvError(f"{url!r} names no directory: use lmdb:/path")
    durable = options.get("durable", "1").lower()
    if durable not in _BOOLEANS:
        raise KvError(f"{url}: durable must be 0 or 1, not {durable!r}")
    map_bytes = options.get("map_bytes", str(MAP_BYTES))
    if not map_bytes.isascii() or not map_bytes.isdigit() or int(map_bytes) < 1 << 20:
        raise KvError(f"{url}: map_bytes must be a number of at least 1048576, not {map_bytes!r}")
    return LmdbKv(path, durable=_BOOLEANS[durable], map_bytes=int(map_bytes))


def _open_fdb(url: str, path: str, options: dict[str, str]) -> KvStore:
    from fs3.kv.fdb import TIMEOUT_MS, FdbKv

    _refuse_unknown(url, options, ("timeout_ms",))
    timeout_ms = options.get("timeout_ms", str(TIMEOUT_MS))
    if not timeout_ms.isascii() or not timeout_ms.isdigit() or int(timeout_ms) < 1:
        raise KvError(f"{url}: timeout_ms must be a number of at least 1, not {timeout_ms!r}")
    return FdbKv(path or None, timeout_ms=int(timeout_ms))


def _refuse_unknown(url: str, options: dict[str, str], known: tuple[str, ...]) -> None:
    for name in options:
        if name not in known:
            raise KvError(f"{url}: unknown option {name!r}; known: {', '.join(known) or 'none'}")
