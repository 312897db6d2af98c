"""A client says that it lives, so that its sessions stay."""

from __future__ import annotations

from typing import Final

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import tree
from fs3.meta.context import OpContext
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import KeepaliveRequest, KeepaliveResponse

CLIENT_ID_BYTES: Final = 16
DESCRIPTION_CHARACTERS_MAX: Final = 256


async def run(tr: Transaction, request: KeepaliveRequest, ctx: OpContext) -> KeepaliveResponse:
    """Renew the client's record; the response says how often to."""
    if len(request.client_id) != CLIENT_ID_BYTES:
        raise error(Code.CODE_INVALID_ARGUMENT, f"a client id has {CLIENT_ID_BYTES} bytes")
    tree.keep_alive(tr, ctx, request.client_id, request.description[:DESCRIPTION_CHARACTERS_MAX])
    return KeepaliveResponse(interval_ms=ctx.keepalive_ms, session_ms=ctx.session_ms)
