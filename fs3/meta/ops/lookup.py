"""One component of one directory."""

from __future__ import annotations

from fs3.kv.api import Transaction
from fs3.meta import tree, walk
from fs3.meta.context import OpContext
from fs3.v1.meta_pb2 import AttrResponse, LookupRequest


async def run(tr: Transaction, request: LookupRequest, ctx: OpContext) -> AttrResponse:
    """The attributes of entry `name` of `parent`; "." and ".." work. Symlinks are not followed."""
    name = request.name
    walk.check_name(name)
    directory = await tree.load_handle(tr, request.parent)
    walk.enter(directory, request.caller)
    if name == b".":
        child = directory
    elif name == b"..":
        child = await walk.parent_of(tr, directory)
    else:
        found = None if tree.removed(directory) else await walk.entry_of(tr, directory, name)
        if found is None:
            raise walk.missing(name)
        child = found
    return AttrResponse(attr=await tree.complete(tr, child))
