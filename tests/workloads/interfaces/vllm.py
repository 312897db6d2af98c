"""vLLM 0.33, `vllm.v1.kv_offload.tiering`: secondary tiers of its offloading connector, restated.

A tier is constructed as ``cls(offloading_spec=, primary_kv_view=, tier_type=, backpressure_detector=, **options)``.
The scheduler calls it under a lock and must not be kept: jobs are submitted, results polled. `chunk_ids` are rows of
the primary view. What was looked up is asked for once a step, in `on_schedule_end`; until then the answer is RETRY.
"""

from __future__ import annotations

import enum
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tests.workloads.interfaces import offer


class Medium(enum.Enum):
    """What a tier is made of."""

    CPU = "CPU"
    STORAGE = "STORAGE"


class Locality(enum.Enum):
    """Where a tier is."""

    LOCAL = "LOCAL"
    REMOTE = "REMOTE"


class LookupResult(enum.Enum):
    """What a lookup says."""

    MISS = enum.auto()
    HIT = enum.auto()
    HIT_PENDING = enum.auto()
    RETRY = enum.auto()


@dataclass
class RequestOffloadingContext:
    """What a tier wishes for a request: nothing."""


@dataclass
class ReqContext:
    """A request."""

    req_id: str


@dataclass
class TransferJob:
    """Chunks to move between the primary tier and this one."""

    job_id: int
    keys: Collection[bytes]
    chunk_ids: Any
    is_promotion: bool
    req_context: ReqContext
    submit_time: float = 0.0


@dataclass
class JobResult:
    """How a job ended; of a promotion that succeeded in part, which chunks were loaded."""

    job_id: int
    success: bool
    successful_keys: Collection[bytes] | None = None
    transfer_time: float | None = None
    transfer_bytes: int | None = None


class SecondaryTierManager(ABC):
    """What a tier derives from."""

    medium: ClassVar[Medium | None] = None

    def __init__(
        self, offloading_spec: Any, primary_kv_view: memoryview, tier_type: str, backpressure_detector: Any = None
    ) -> None:
        assert primary_kv_view.strides is not None
        self._block_size_bytes = primary_kv_view.strides[0]
        self.tier_type = tier_type
        self.locality: Locality | None = None

    @property
    def block_size_bytes(self) -> int:
        """Bytes of a chunk."""
        return self._block_size_bytes

    @abstractmethod
    def lookup(self, key: bytes, req_context: ReqContext) -> LookupResult: ...

    @abstractmethod
    def submit_store(self, job_metadata: TransferJob) -> None: ...

    @abstractmethod
    def submit_load(self, job_metadata: TransferJob) -> None: ...

    @abstractmethod
    def get_finished_jobs(self) -> Iterable[JobResult]: ...

    @abstractmethod
    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext: ...

    @abstractmethod
    def drain_jobs(self) -> None: ...


@dataclass
class _Lookup:
    result: bool | None = None
    requests: set[str] = field(default_factory=set)


class AsyncLookupManager(ABC):
    """Keeps lookups for as long as a request that wants them lives, and asks on a thread of its own."""

    def __init__(self, tier_type: str) -> None:
        self._lookups: dict[bytes, _Lookup] = {}
        self._step: list[tuple[bytes, ReqContext]] = []
        self._asked: queue.SimpleQueue[list[tuple[bytes, ReqContext]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    @abstractmethod
    def batch_lookup(self, keys: list[bytes], req_context: ReqContext) -> Iterable[bool]: ...

    def lookup(self, key: bytes, req_context: ReqContext) -> bool | None:
        """Whether it is there; None until that is known."""
        if key not in self._lookups:
            self._lookups[key] = _Lookup()
            self._step.append((key, req_context))
        self._lookups[key].requests.add(req_context.req_id)
        return self._lookups[key].result

    def flush(self) -> None:
        """Ask for what was looked up since the last time."""
        if self._step:
            self._asked.put(self._step)
            self._step = []

    def mark_miss(self, keys: Collection[bytes]) -> None:
        """These could not be loaded."""
        for key in keys:
            if key in self._lookups:
                self._lookups[key].result = False

    def cleanup(self, req_id: str) -> None:
        """The request has ended."""
        for key, lookup in list(self._lookups.items()):
            lookup.requests.discard(req_id)
            if not lookup.requests:
                del self._lookups[key]

    def shutdown(self) -> None:
        """End the thread."""
        self._asked.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (step := self._asked.get()) is not None:
            for (key, _), found in zip(step, self.batch_lookup([k for k, _ in step], step[0][1]), strict=True):
                if key in self._lookups:
                    self._lookups[key].result = found


INSTALLED = offer(
    {
        "vllm.v1.kv_offload.base": [Locality, LookupResult, Medium, ReqContext, RequestOffloadingContext],
        "vllm.v1.kv_offload.tiering.async_lookup": [AsyncLookupManager],
        "vllm.v1.kv_offload.tiering.base": [JobResult, SecondaryTierManager, TransferJob],
    }
)
