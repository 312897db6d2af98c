"""Set an extended attribute."""

from __future__ import annotations

from fs3.core.errors import error
from fs3.kv.api import Transaction
from fs3.meta import walk, xattrs
from fs3.meta.context import OpContext
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import AttrResponse, SetxattrRequest


async def run(tr: Transaction, request: SetxattrRequest, ctx: OpContext) -> AttrResponse:
    """With `create` it must not exist (EXISTS), with `replace` it must (NO_DATA).

    Raises NOT_PERMITTED, ACCESS, NOT_SUPPORTED (unknown prefix), OUT_OF_RANGE, TOO_LARGE, NO_SPACE, INVALID_ARGUMENT.
    """
    name = request.name
    xattrs.check_name(name)
    xattrs.check_value(name, request.value)
    record = await walk.target(tr, request.at, request.caller)
    xattrs.require_write(record.attr, request.caller, name)
    old = await xattrs.load(tr, record, name)
    if old is None and request.replace:
        raise xattrs.missing(name)
    if old is not None and request.create:
        raise error(Code.CODE_EXISTS, f"there is an extended attribute {name!r}")
    if name in xattrs.ACLS:
        xattrs.set_acl(tr, record, name, request.value, request.caller)
    else:
        xattrs.put(tr, record, name, old, request.value)
    return AttrResponse(attr=await xattrs.changed(tr, record, ctx.now_ns))
