"""LMCache (0.5.6): a remote storage plug-in, and an L2 adapter for its multi-process server.

The interfaces are LMCache's `RemoteConnector` and `L2AdapterInterface`. Values move straight between the memory of
LMCache's objects and the cache.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import threading
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import AdapterUsage, L2AdapterInterface
from lmcache.v1.protocol import RemoteMetadata
from lmcache.v1.storage_backend.connector import ConnectorAdapter, ConnectorContext
from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

from fs3.kvcache.connectors.common import key_prefix, open_cache

LOG = logging.getLogger(__name__)
# The name of the plug-in in LMCache's `remote_storage_plugins`: this, or this with ".something".
PLUGIN = "fs3"
# Threads that wait for the cache on behalf of LMCache's event loop and controllers.
THREADS = 4
# Changes when values of the same form would mean something else.
FORMAT = 1
# A chunk has two entries: its bytes, and how they are to be understood.
BODY, FORM = b"/b", b"/f"

T = TypeVar("T")


class Fs3ConnectorAdapter(ConnectorAdapter):  # type: ignore[misc]
    """What LMCache's `remote_storage_plugin.fs3.class_name` names; it makes the connectors."""

    def __init__(self) -> None:
        super().__init__(f"plugin://{PLUGIN}")

    def can_parse(self, url: str) -> bool:
        """Whether a URL is that of a plug-in of the type `fs3`."""
        return url == self.schema or url.startswith(f"{self.schema}.")

    def create_connector(self, context: ConnectorContext) -> Fs3Connector:
        """Open the namespace that the plug-in's options in `extra_config` name."""
        begin = f"remote_storage_plugin.{context.plugin_name or PLUGIN}."
        extra = (context.config.extra_config if context.config else None) or {}
        options = {name.removeprefix(begin): value for name, value in extra.items() if name.startswith(begin)}
        for own in ("module_path", "class_name"):
            options.pop(own, None)
        return Fs3Connector(context, options, begin.rstrip("."))


class Fs3Connector(RemoteConnector):  # type: ignore[misc]
    """LMCache's remote storage in a namespace of the KV cache.

    Coroutines run on LMCache's loop; the cache is waited for on threads of the connector. Nothing raises for a value
    that is not there, or that could not be stored: it is a miss, then or later.
    """

    def __init__(self, context: ConnectorContext, options: Mapping[str, Any], where: str) -> None:
        super().__init__(context.config, context.metadata)
        self._memory = context.local_cpu_backend
        metadata = context.metadata
        form = {
            "format": FORMAT,
            "shapes": [list(shape) for shape in self.meta_shapes],
            "dtypes": self.meta_dtypes,
            "layout": self.meta_fmt,
            "chunk_tokens": metadata.chunk_size,
            "self_described": self.save_chunk_meta,
            "serde": context.config.remote_serde,
        }
        # Ranks, dtype and tags are in every key of LMCache.
        self._prefix = key_prefix("lmcache", metadata.model_name, form)
        self._cache = open_cache(options, where)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="fs3-kv-lmcache")

    async def exists(self, key: Any) -> bool:
        """Whether the chunk is there."""
        return await self._wait(self.exists_sync, key)

    def exists_sync(self, key: Any) -> bool:
        """Whether the chunk is there; it blocks."""
        return self.batched_contains([key]) == 1

    def support_batched_contains(self) -> bool:
        """It does."""
        return True

    def batched_contains(self, keys: Sequence[Any]) -> int:
        """How many chunks from the first on are there; it blocks."""
        return self._cache.match_prefix(self._entries(keys)) // self._entries_each

    async def batched_async_contains(self, lookup_id: str, keys: Sequence[Any], pin: bool = False) -> int:
        """How many chunks from the first on are there. They are not pinned: what is evicted later is a miss then."""
        return await self._wait(self.batched_contains, keys)

    async def get(self, key: Any) -> Any:
        """The chunk in new memory of LMCache's, or None."""
        return (await self._wait(self._load, [key]))[0]

    def support_batched_get(self) -> bool:
        """It does."""
        return True

    async def batched_get(self, keys: Sequence[Any]) -> Sequence[Any]:
        """The chunks in new memory of LMCache's, None for each that is not there."""
        return await self._wait(self._load, keys)

    async def batched_get_non_blocking(self, lookup_id: str, keys: Sequence[Any]) -> Sequence[Any]:
        """The chunks from the first on that are there."""
        found = await self._wait(self._load, keys)
        count = next((i for i, chunk in enumerate(found) if chunk is None), len(found))
        for chunk in found[count:]:
            if chunk is not None:
                chunk.ref_count_down()
        return found[:count]

    async def put(self, key: Any, memory_obj: Any) -> None:
        """Store a chunk; when it returns, it is stored or it was not possible. LMCache releases the memory."""
        await self.batched_put([key], [memory_obj])

    def support_batched_put(self) -> bool:
        """It does."""
        return True

    async def batched_put(self, keys: Sequence[Any], memory_objs: Sequence[Any]) -> None:
        """Store chunks, in one request for each storage node."""
        await self._wait(self._store, keys, memory_objs)

    def remove_sync(self, key: Any) -> bool:
        """Remove a chunk; whether it was there."""
        removed = [self._cache.remove(entry) for entry in self._entries([key])]
        return any(removed)

    async def list(self) -> Sequence[str]:
        """The keys of all chunks of this form."""
        return await self._wait(self._list)

    def support_ping(self) -> bool:
        """It does."""
        return True

    async def ping(self) -> int:
        """0: what a cache cannot reach is a miss, never an error."""
        await self._wait(self._cache.exists, self._prefix)
        return 0

    async def close(self) -> None:
        """End the connection; chunks stay."""
        await self._wait(self._cache.close)
        self._threads.shutdown(wait=False)

    @property
    def _entries_each(self) -> int:
        return 2 if self.save_chunk_meta else 1

    def _key(self, key: Any, part: bytes) -> bytes:
        return self._prefix + str(key.to_string()).encode() + part

    def _entries(self, keys: Sequence[Any]) -> Sequence[bytes]:
        parts = (BODY, FORM)[: self._entries_each]
        return [self._key(key, part) for key in keys for part in parts]

    def _list(self) -> Sequence[str]:
        # A set, as each replica is listed.
        names = {entry.key for entry in self._cache.keys(self._prefix)}
        return [name[len(self._prefix) : -len(BODY)].decode() for name in names if name.endswith(BODY)]

    def _store(self, keys: Sequence[Any], chunks: Sequence[Any]) -> None:
        names, values = [], []
        for key, chunk in zip(keys, chunks, strict=True):
            body = chunk.byte_array
            names.append(self._key(key, BODY))
            values.append(body)
            if self.save_chunk_meta:
                form = (chunk.get_shapes(), chunk.get_dtypes(), chunk.get_memory_format())
                names.append(self._key(key, FORM))
                values.append(RemoteMetadata(len(body), *form).serialize())
        self._cache.put_batch(names, values)

    def _load(self, keys: Sequence[Any]) -> Sequence[Any]:
        """Chunks in new memory; None where there is none, or no memory."""
        forms = self._forms(keys)
        chunks: MutableSequence[Any] = [self._allocate(form) if form is not None else None for form in forms]
        wanted = [i for i, chunk in enumerate(chunks) if chunk is not None]
        try:
            found = self._cache.get_batch_into(
                [self._key(keys[i], BODY) for i in wanted], [chunks[i].byte_array for i in wanted]
            )
        except BaseException:
            for i in wanted:
                chunks[i].ref_count_down()
            raise
        for i, length in zip(wanted, found, strict=True):
            chunks[i] = self._checked(chunks[i], length)
        return chunks

    def _forms(self, keys: Sequence[Any]) -> Sequence[tuple[Any, Any, Any] | None]:
        """Shapes, types and layout of each chunk, None where none is there."""
        if not self.save_chunk_meta:
            return [(self.meta_shapes, self.meta_dtypes, self.meta_fmt)] * len(keys)
        found = self._cache.get_batch([self._key(key, FORM) for key in keys])
        read = [RemoteMetadata.deserialize(value) if value is not None else None for value in found]
        return [(form.shapes, form.dtypes, form.fmt) if form is not None else None for form in read]

    def _allocate(self, form: tuple[Any, Any, Any]) -> Any:
        return self._memory.allocate(*form)

    def _checked(self, chunk: Any, length: int | None) -> Any:
        """The chunk, cut to what was read; None, with its memory released, where that is none of its lengths."""
        if length is not None and length == len(chunk.byte_array):
            return chunk
        if length is not None and not self.save_chunk_meta:
            try:
                # Only the last chunk of a sequence is shorter than the others.
                return self.reshape_partial_chunk(chunk, length)
            except ValueError:
                pass
        chunk.ref_count_down()
        return None

    async def _wait(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)


class Fs3L2Adapter(L2AdapterInterface):  # type: ignore[misc]
    """LMCache's second tier in a namespace of the KV cache; safe to use from several threads.

    `adapter_params` are the options of :func:`fs3.kvcache.connectors.common.open_cache` and, if wanted, `form`: a text
    that is part of all keys, for what LMCache's keys do not say (they have model, ranks and the salt of a tenant; give
    the data type, for one). Objects are not locked between lookup and load: what is evicted meanwhile is not loaded,
    and LMCache computes it. The storage servers evict, so LMCache is told no capacity.
    """

    def __init__(self, adapter_params: Mapping[str, Any], l1_memory_desc: Any | None = None) -> None:
        super().__init__()
        options = dict(adapter_params)
        self._form = str(options.pop("form", ""))
        self._cache = open_cache(options, "adapter_params")
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="fs3-kv-l2")
        self._stored, self._found, self._loaded = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3))
        self._lock = threading.Lock()
        self._tasks = 0
        self._results: dict[int, dict[int, Any]] = {event: {} for event in (self._stored, self._found, self._loaded)}

    def get_store_event_fd(self) -> int:
        """Readable when a store has ended."""
        return self._stored

    def get_lookup_and_lock_event_fd(self) -> int:
        """Readable when a lookup has ended."""
        return self._found

    def get_load_event_fd(self) -> int:
        """Readable when a load has ended."""
        return self._loaded

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Store objects that are not there yet; the memory must stay until it is done."""
        return self._submit(self._stored, self._store, L2StoreResult(False, 0), keys, objects)

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        """Results of stores that have ended since the last call, by task."""
        with self._lock:
            done = self._results[self._stored]
            self._results[self._stored] = {}
        return done

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: Mapping[int, Any]) -> int:
        """Look which objects are there."""
        return self._submit(self._found, self._lookup, Bitmap(len(keys)), keys)

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        """The bitmap of a lookup that has ended, once; else None."""
        return self._take(self._found, task_id)

    def submit_unlock(self, keys: list[Any]) -> None:
        """Nothing: objects are not locked."""

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Read objects into the memory of `objects`, which must stay until it is done."""
        return self._submit(self._loaded, self._load, Bitmap(len(keys)), keys, objects)

    def query_load_result(self, task_id: int) -> Any:
        """The bitmap of a load that has ended, once; else None."""
        return self._take(self._loaded, task_id)

    def delete(self, keys: list[Any]) -> None:
        """Remove objects; it blocks."""
        removed = [key for key in keys if self._cache.remove(self._key(key))]
        if removed:
            # What they occupied is counted by the servers: see get_usage.
            self._notify_keys_deleted(removed, [0] * len(removed))

    def get_usage(self) -> Any:
        """Bytes of the namespace, of all that use it; without a capacity, as LMCache is not to evict."""
        return AdapterUsage(total_bytes_used=self._cache.stats().bytes, total_capacity_bytes=0)

    def report_status(self) -> dict[str, Any]:
        """For LMCache's status page."""
        stats = self._cache.stats()
        return {"is_healthy": True, "type": "Fs3L2Adapter", "entries": stats.entries, "bytes": stats.bytes}

    def close(self) -> None:
        """Wait for what has begun and end the connection; objects stay."""
        self._threads.shutdown(wait=True)
        self._cache.close()
        for event in self._results:
            os.close(event)

    def _key(self, key: Any) -> bytes:
        prefix = _object_prefix(self._form, key.model_name, key.kv_rank, key.object_group_id)
        return prefix + f"{key.cache_salt}/{bytes(key.chunk_hash).hex()}".encode()

    def _submit(self, event: int, work: Callable[..., Any], failed: Any, *arguments: Any) -> int:
        with self._lock:
            self._tasks += 1
            task = self._tasks
        self._threads.submit(self._run, event, task, work, failed, arguments)
        return task

    def _run(self, event: int, task: int, work: Callable[..., Any], failed: Any, arguments: tuple[Any, ...]) -> None:
        """Do `work`; its result, or `failed`, is there before the event."""
        try:
            result = work(*arguments)
        except Exception:
            LOG.exception("a task of LMCache's second tier failed")
            result = failed
        with self._lock:
            self._results[event][task] = result
        os.eventfd_write(event, 1)

    def _take(self, event: int, task: int) -> Any:
        with self._lock:
            return self._results[event].pop(task, None)

    def _store(self, keys: list[Any], objects: list[Any]) -> Any:
        names = [self._key(key) for key in keys]
        absent = [i for i, there in enumerate(self._cache.exists_batch(names)) if not there]
        values = [objects[i].byte_array for i in absent]
        stored = self._cache.put_batch([names[i] for i in absent], values)
        done = [i for i, put in zip(absent, stored, strict=True) if put]
        sizes = [len(objects[i].byte_array) for i in done]
        if done:
            self._notify_keys_stored([keys[i] for i in done], sizes)
        return L2StoreResult(len(done) == len(absent), sum(sizes))

    def _lookup(self, keys: list[Any]) -> Any:
        return _bitmap(self._cache.exists_batch([self._key(key) for key in keys]))

    def _load(self, keys: list[Any], objects: list[Any]) -> Any:
        targets = [obj.byte_array for obj in objects]
        found = self._cache.get_batch_into([self._key(key) for key in keys], targets)
        whole = [length == len(target) for length, target in zip(found, targets, strict=True)]
        if any(whole):
            self._notify_keys_accessed([key for key, there in zip(keys, whole, strict=True) if there])
        return _bitmap(whole)


@functools.lru_cache(maxsize=256)
def _object_prefix(form: str, model: str, rank: int, group: int) -> bytes:
    return key_prefix("lmcache-l2", model, {"format": FORMAT, "form": form, "rank": rank, "group": group})


def _bitmap(bits: Sequence[bool]) -> Any:
    result = Bitmap(len(bits))
    for i, bit in enumerate(bits):
        if bit:
            result.set(i)
    return result
