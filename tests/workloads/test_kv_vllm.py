"""vLLM's secondary tier on the KV cache; against `vllm` where it can be imported, else its restated interface."""

from __future__ import annotations

import mmap
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from fs3.testing.cluster import LocalCluster
from tests.workloads.interfaces.vllm import INSTALLED
from tests.workloads.kv_options import fresh_options

# isort: split
from vllm.v1.kv_offload.base import LookupResult, Medium, ReqContext
from vllm.v1.kv_offload.tiering.base import SecondaryTierManager, TransferJob

from fs3.kvcache.connectors.vllm import Fs3Tier

CHUNKS, CHUNK_BYTES = 32, 24 << 10
WAIT_S = 10.0
REQUEST = ReqContext("request")


def spec(*, agnostic: bool = False, dtype: str = "bfloat16", rank: int = 0, hash_tokens: int = 16) -> Any:
    """What a tier reads of vLLM's configuration."""
    sizes = {"tp_size": 2, "pp_size": 1, "pcp_size": 1, "dcp_size": 1}
    return SimpleNamespace(
        config=SimpleNamespace(
            model=SimpleNamespace(name="llama/tiny", dtype=dtype),
            cache=SimpleNamespace(tokens_per_hash=hash_tokens, blocks_per_chunk=1),
            parallel=SimpleNamespace(rank=rank, is_parallelism_agnostic=agnostic, **sizes),
            groups=(SimpleNamespace(tokens_per_block=16, layer_names=("0", "1")),),
            canonical_layout=False,
            kv_cache_layout="NHD",
            replicated_layout=False,
        )
    )


def key(number: int) -> bytes:
    return number.to_bytes(32, "big") + (0).to_bytes(4, "big")


def memory() -> np.ndarray:
    return np.random.default_rng(1).integers(-128, 128, (CHUNKS, CHUNK_BYTES), np.int8)


Make = Callable[..., Fs3Tier]


@pytest.fixture
def make(shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Tiers of one namespace, made as vLLM makes them from a configuration."""
    monkeypatch.setenv("FS3_TOKEN", shared_cluster.token)
    options, made = fresh_options(shared_cluster), []

    def tier(primary: np.ndarray | memoryview, **changed: Any) -> Fs3Tier:
        view = primary if isinstance(primary, memoryview) else memoryview(primary)
        configuration = {"type": "Fs3Tier", "module_path": "fs3.kvcache.connectors.vllm", **options}
        if INSTALLED:
            from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory

            found = SecondaryTierFactory.create_secondary_tier(configuration, view, spec(**changed))
        else:
            found = Fs3Tier(
                offloading_spec=spec(**changed),
                primary_kv_view=view,
                tier_type=configuration.pop("type"),
                backpressure_detector=None,
                **{name: value for name, value in configuration.items() if name != "module_path"},
            )
        made.append(found)
        return found

    yield tier
    for one in made:
        one.shutdown()


def job(number: int, chunks: dict[int, int], *, load: bool = False) -> TransferJob:
    """Move chunks between keys and rows."""
    rows = np.array(list(chunks.values()))
    return TransferJob(number, [key(n) for n in chunks], rows, is_promotion=load, req_context=REQUEST)


def finished(tier: Fs3Tier) -> dict[int, Any]:
    tier.drain_jobs()
    return {result.job_id: result for result in tier.get_finished_jobs()}


def looked_up(tier: Fs3Tier, number: int) -> LookupResult:
    """Step until the answer is there, as the scheduler does."""
    ends_s = time.monotonic() + WAIT_S
    while (found := tier.lookup(key(number), REQUEST)) == LookupResult.RETRY and time.monotonic() < ends_s:
        tier.on_schedule_end(None)
        time.sleep(0.001)
    return found


def test_the_class_is_what_vllm_loads() -> None:
    assert issubclass(Fs3Tier, SecondaryTierManager)
    assert not Fs3Tier.__abstractmethods__
    assert Fs3Tier.medium is Medium.STORAGE


def test_chunks_are_stored_and_loaded_by_another_engine(make: Make) -> None:
    written, read = memory(), np.zeros((CHUNKS, CHUNK_BYTES), np.int8)
    writer, reader = make(written), make(read)
    writer.on_new_request(REQUEST)
    assert writer.lookup(key(1), REQUEST) == LookupResult.RETRY
    assert looked_up(writer, 1) == LookupResult.MISS
    writer.on_request_finished(REQUEST)
    writer.submit_store(job(7, {1: 4, 2: 9}))
    writer.submit_store(job(8, {3: 31}))
    results = finished(writer)
    assert {number: (r.success, r.transfer_bytes) for number, r in results.items()} == {
        7: (True, 2 * CHUNK_BYTES),
        8: (True, CHUNK_BYTES),
    }
    assert finished(writer) == {}
    assert looked_up(reader, 1) == LookupResult.HIT
    reader.submit_load(job(1, {3: 0, 1: 20, 2: 21}, load=True))
    assert finished(reader)[1].success
    assert (read[[0, 20, 21]] == written[[31, 4, 9]]).all()
    assert not read[1:20].any()


def test_a_load_that_fails_in_part_says_what_came_and_is_not_tried_again(make: Make) -> None:
    primary = memory()
    tier = make(primary)
    tier.submit_store(job(1, {1: 0, 2: 1}))
    assert finished(tier)[1].success
    assert [looked_up(tier, number) for number in (1, 2)] == [LookupResult.HIT] * 2
    # It is evicted between lookup and load.
    assert tier._cache.remove(tier._prefix + key(2).hex().encode())
    tier.submit_load(job(2, {1: 10, 2: 11}, load=True))
    result = finished(tier)[2]
    assert (result.success, result.successful_keys) == (False, (key(1),))
    assert (primary[10] == primary[0]).all()
    assert [tier.lookup(key(n), REQUEST) for n in (1, 2)] == [LookupResult.HIT, LookupResult.MISS]
    # The next request asks anew.
    tier.on_request_finished(REQUEST)
    assert looked_up(tier, 2) == LookupResult.MISS


@pytest.mark.parametrize("changed", [{"dtype": "float16"}, {"rank": 1}, {"hash_tokens": 32}, {"agnostic": True}])
def test_chunks_of_another_form_never_match(make: Make, changed: dict[str, Any]) -> None:
    tier = make(memory())
    tier.submit_store(job(1, {1: 0}))
    assert finished(tier)[1].success
    assert looked_up(make(memory()), 1) == LookupResult.HIT
    other = make(memory(), **changed)
    assert looked_up(other, 1) == LookupResult.MISS
    other.submit_load(job(2, {1: 0}, load=True))
    assert not finished(other)[2].success


def test_ranks_share_chunks_that_do_not_depend_on_them(make: Make) -> None:
    tier = make(memory(), agnostic=True)
    tier.submit_store(job(1, {1: 0}))
    assert finished(tier)[1].success
    assert looked_up(make(memory(), agnostic=True, rank=1), 1) == LookupResult.HIT


@pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed; see make test-connectors")
def test_the_tiering_manager_of_vllm_itself_works_on_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its statistics import the whole engine, and are not asked for here.
    metrics = "vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics"
    for depth in range(2, len(metrics.split(".")) + 1):
        name = ".".join(metrics.split(".")[:depth])
        monkeypatch.setitem(sys.modules, name, MagicMock(__path__=[], __spec__=None))
    from vllm.v1.kv_offload.base import ScheduleEndContext
    from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager

    class Region:
        """The memory of the primary tier, which cannot be unmapped while somebody uses it."""

        def __init__(self) -> None:
            self.map = mmap.mmap(-1, CHUNKS * CHUNK_BYTES)
            self.rows = np.frombuffer(self.map, np.int8).reshape(CHUNKS, CHUNK_BYTES)

        def create_kv_memoryview(self) -> memoryview:
            return memoryview(self.rows)

        def cleanup(self) -> None:
            del self.rows
            self.map.close()

    def engine() -> tuple[Region, Any]:
        region = Region()
        primary = CPUPrimaryTierOffloadingManager(CHUNKS, region)
        return region, TieringOffloadingManager(primary, [make(primary.get_kv_memoryview())])

    def step_until(done: Callable[[], bool], manager: Any) -> None:
        ends_s = time.monotonic() + WAIT_S
        while not done() and time.monotonic() < ends_s:
            manager.on_schedule_end(ScheduleEndContext([REQUEST.req_id], []))
            time.sleep(0.001)
        assert done()

    keys = [key(number) for number in range(4)]
    written, first = engine()
    first.on_new_request(REQUEST)
    rows = first.prepare_store(keys, REQUEST).store_spec.block_ids
    written.rows[rows] = memory()[:4]
    first.complete_store(keys, REQUEST)
    step_until(lambda: not first._jobs, first)
    first.on_request_finished(REQUEST)

    # Another engine, whose memory has nothing, gets them from the tier.
    read, second = engine()
    second.on_new_request(REQUEST)
    step_until(lambda: {second.lookup(one, REQUEST) for one in keys} == {LookupResult.HIT}, second)
    assert second.lookup(key(99), REQUEST) != LookupResult.HIT
    assert (read.rows[second.prepare_load(keys, REQUEST).block_ids] == memory()[:4]).all()
    second.complete_load(keys, REQUEST)
    second.on_request_finished(REQUEST)
    for region, manager in ((written, first), (read, second)):
        manager.shutdown()
        assert region.map.closed


def test_jobs_outside_of_the_primary_tier_are_refused(make: Make) -> None:
    tier = make(memory())
    for chunks in ({1: CHUNKS}, {1: -1}):
        with pytest.raises(ValueError, match="outside of the primary tier"):
            tier.submit_load(job(1, chunks, load=True))
    with pytest.raises(ValueError, match="1 keys and 2 chunks"):
        tier.submit_load(TransferJob(1, [key(1)], np.array([1, 2]), is_promotion=True, req_context=REQUEST))


def test_bad_options_of_the_tier_are_refused() -> None:
    with pytest.raises(ValueError, match="the secondary tier t has the unknown option 'root_dir'"):
        Fs3Tier(spec(), memoryview(memory()), "t", root_dir="/kv")
