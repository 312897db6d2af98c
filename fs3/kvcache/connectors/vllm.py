"""vLLM (0.33): a secondary tier of its offloading connector, behind the tier in the memory of the host.

The interface is vLLM's `SecondaryTierManager`. Chunks move straight between the primary tier's memory and the cache, on
threads of the tier: everything that the scheduler calls returns at once.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, ClassVar, TypeAlias

from vllm.v1.kv_offload.base import Locality, LookupResult, Medium, RequestOffloadingContext
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from fs3.kvcache import KVCache
from fs3.kvcache.connectors.common import key_prefix, open_cache

LOG = logging.getLogger(__name__)
# Threads that move chunks; a job is one batch on one of them.
THREADS = 4
# Changes when values of the same form would mean something else.
FORMAT = 1
# What a job does with keys and the memory of their chunks; which chunks are there then.
Work: TypeAlias = Callable[[list[bytes], list[memoryview]], list[bool]]


class Fs3Tier(SecondaryTierManager):  # type: ignore[misc]
    """vLLM's chunks in a namespace of the KV cache.

    What a configuration in `secondary_tiers` has besides `type` and `module_path` are the options of
    :func:`fs3.kvcache.connectors.common.open_cache`, and `locality` ("LOCAL" or "REMOTE").
    """

    medium: ClassVar[Medium] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        locality: str | None = None,
        backpressure_detector: Any | None = None,
        **options: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self.locality = Locality(locality) if locality is not None else None
        self._memory = primary_kv_view.cast("B")
        self._chunk_bytes: int = self.block_size_bytes
        form = {"format": FORMAT, "chunk_bytes": self._chunk_bytes, **_form(offloading_spec.config)}
        self._prefix = key_prefix("vllm", offloading_spec.config.model.name, form)
        self._cache = open_cache(options, f"the secondary tier {tier_type}")
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="fs3-kv-vllm")
        self._running: set[Future[None]] = set()
        self._finished: queue.SimpleQueue[tuple[JobResult, list[bytes]]] = queue.SimpleQueue()
        self._lookups = _Lookups(self._cache, self._prefix, tier_type)

    def on_new_request(self, req_context: Any) -> RequestOffloadingContext:
        """Chunks are offloaded as they are computed."""
        return RequestOffloadingContext()

    def lookup(self, key: bytes, req_context: Any) -> LookupResult:
        """Whether a chunk is there; RETRY until the answer has come."""
        found = self._lookups.lookup(key, req_context)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def on_schedule_end(self, context: Any) -> None:
        """Ask for what was looked up in this step."""
        self._lookups.flush()

    def on_request_finished(self, req_context: Any) -> None:
        """Forget the request's lookups."""
        self._lookups.cleanup(req_context.req_id)

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Begin to store chunks of the primary tier."""
        self._submit(job_metadata, self._store)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Begin to read chunks into the primary tier."""
        self._submit(job_metadata, self._load)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Results of the jobs that ended since the last call."""
        results: list[JobResult] = []
        while True:
            try:
                result, missed = self._finished.get_nowait()
            except queue.Empty:
                break
            # Else the scheduler would try to load them again and again.
            self._lookups.mark_miss(missed)
            results.append(result)
        self._running = {job for job in self._running if not job.done()}
        return results

    def drain_jobs(self) -> None:
        """Wait for every job; the results stay to be asked for."""
        wait(self._running)

    def shutdown(self) -> None:
        """End threads and connection; chunks stay."""
        self._lookups.shutdown()
        self._threads.shutdown(wait=True)
        self._cache.close()
        # vLLM unmaps the memory next.
        self._memory.release()

    def _submit(self, job: TransferJob, work: Work) -> None:
        chunks = [int(chunk) * self._chunk_bytes for chunk in job.chunk_ids]
        keys = list(job.keys)
        if len(keys) != len(chunks):
            raise ValueError(f"job {job.job_id} has {len(keys)} keys and {len(chunks)} chunks")
        if any(not 0 <= start <= len(self._memory) - self._chunk_bytes for start in chunks):
            raise ValueError(f"job {job.job_id} has chunks outside of the primary tier")
        self._running.add(self._threads.submit(self._run, job, work, keys, chunks))

    def _run(self, job: TransferJob, work: Work, keys: list[bytes], chunks: list[int]) -> None:
        """Do a job; whatever happens, its result is told."""
        began = time.monotonic()
        try:
            there = work(keys, [self._memory[start : start + self._chunk_bytes] for start in chunks])
        except Exception:
            LOG.exception("job %s of the secondary tier %s failed", job.job_id, self.tier_type)
            there = [False] * len(keys)
        done = [key for key, known in zip(keys, there, strict=True) if known]
        partly = job.is_promotion and 0 < len(done) < len(keys)
        result = JobResult(
            job_id=job.job_id,
            success=len(done) == len(keys),
            successful_keys=tuple(done) if partly else None,
            transfer_time=time.monotonic() - began,
            transfer_bytes=len(done) * self._chunk_bytes,
        )
        # A chunk that could not be stored was not found missing.
        missed = [key for key, known in zip(keys, there, strict=True) if not known] if job.is_promotion else []
        self._finished.put((result, missed))

    def _store(self, keys: list[bytes], memory: list[memoryview]) -> list[bool]:
        names = [self._prefix + key.hex().encode() for key in keys]
        there = self._cache.exists_batch(names)
        absent = [i for i, known in enumerate(there) if not known]
        stored = self._cache.put_batch([names[i] for i in absent], [memory[i] for i in absent])
        for i, done in zip(absent, stored, strict=True):
            there[i] = done
        return there

    def _load(self, keys: list[bytes], memory: list[memoryview]) -> list[bool]:
        found = self._cache.get_batch_into([self._prefix + key.hex().encode() for key in keys], memory)
        return [length == self._chunk_bytes for length in found]


class _Lookups(AsyncLookupManager):  # type: ignore[misc]
    """vLLM's own bookkeeping of lookups, which asks on a thread of its own."""

    def __init__(self, cache: KVCache, prefix: bytes, tier_type: str) -> None:
        self._cache = cache
        self._prefix = prefix
        super().__init__(tier_type=tier_type)

    def batch_lookup(self, keys: list[bytes], req_context: Any) -> Iterable[bool]:
        """Which chunks are there."""
        return self._cache.exists_batch([self._prefix + key.hex().encode() for key in keys])


def _form(config: Any) -> dict[str, Any]:
    """What the bytes of a chunk depend on; ranks and sizes of parallelism only where they do."""
    parallel = config.parallel
    form = {
        "dtype": config.model.dtype,
        "hash_tokens": config.cache.tokens_per_hash,
        "blocks_per_chunk": config.cache.blocks_per_chunk,
        "groups": [(group.tokens_per_block, list(group.layer_names)) for group in config.groups],
        "canonical": config.canonical_layout,
        "layout": config.kv_cache_layout,
        "replicated": config.replicated_layout,
    }
    if parallel.is_parallelism_agnostic or config.replicated_layout:
        return form
    ranks = (parallel.rank, parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size)
    return {**form, "ranks": ranks}
