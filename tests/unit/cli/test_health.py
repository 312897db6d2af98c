from fs3.cli.health import describe_metas, meta_lines
from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import MetaStatus
from fs3.v1.routing_pb2 import RoutingSent


def test_removed_files_that_wait_and_services_that_are_silent_are_told() -> None:
    idle = MetaStatus(served=5)
    assert meta_lines(describe_metas({1: idle})) == []
    busy = MetaStatus(served=7, gc_waiting=12, gc_oldest_ms=3400, gc_refused=2, routing_sent=RoutingSent(deltas=4))
    silent = error(Code.CODE_TIMEOUT, "no answer")
    described = describe_metas({1: idle, 2: busy, 3: silent})
    assert described[1]["gc_waiting"] == 12
    assert described[1]["routing_sent"]["deltas"] == 4
    assert meta_lines(described) == [
        "node 3 does not answer: no answer",
        "12 removed files wait for their space to be freed, the first for 3 s; storage does not take 2 of them now",
    ]
