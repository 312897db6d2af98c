from fs3.meta import keys, model
from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, run


def test_keepalive_writes_the_clients_record_and_says_how_often() -> None:
    async def main() -> None:
        meta = await Meta.start(session_ms=8000)
        response = await meta.do("Keepalive", client_id=b"c" * 16, description="mount on host" + "x" * 1000)
        assert response.interval_ms == 2000
        [(key, value)] = await meta.rows(keys.KEEPALIVE)
        assert key == keys.keepalive(b"c" * 16)
        assert len(model.decode_keepalive(value).description) == 256
        assert await meta.code("Keepalive", client_id=b"short") == Code.CODE_INVALID_ARGUMENT

    run(main())
