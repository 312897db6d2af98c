"""The operations by method number."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from google.protobuf.message import Message

from fs3.kv.api import KvStore, Transaction
from fs3.meta.context import OpContext
from fs3.meta.ops import (
    accessed,
    append,
    await_lock,
    batch_stat,
    close,
    create,
    get_lock,
    getxattr,
    hold,
    keepalive,
    link,
    list,
    listxattr,
    lock,
    lookup,
    mkdir,
    open,
    quota_get,
    quota_list,
    quota_set,
    remove_all,
    removexattr,
    rename,
    rmdir,
    setattr,
    setxattr,
    stat,
    statfs,
    symlink,
    sync,
    trash_list,
    trash_purge,
    trash_restore,
    truncate,
    unlink,
)
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Method

Prepare: TypeAlias = Callable[[KvStore, Any], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation. `name` is its gRPC method.

    ``mutates``: it carries an OpId and its answer is stored, unless ``only_reads`` says of a request that no run
    of it can write anything. ``cuts``: it may leave a pending truncation of the inode it answers with. ``prepare``
    runs before the transaction, outside of it. ``unhurried``: its commit may wait for company. ``batched``: it changes
    the inode that the request names, and many clients may do so at once (see `fs3.meta.batches`).
    """

    name: str
    method: int
    request: type[Message]
    response: type[Message]
    run: Callable[[Transaction, Any, OpContext], Awaitable[Any]]
    mutates: bool = False
    cuts: bool = False
    prepare: Prepare | None = None
    only_reads: Callable[[Any], bool] | None = None
    unhurried: bool = False
    batched: bool = False


_M = Method

OPERATIONS: Final[tuple[Operation, ...]] = (
    Operation("Lookup", _M.METHOD_META_LOOKUP, pb.LookupRequest, pb.AttrResponse, lookup.run),
    Operation("Stat", _M.METHOD_META_STAT, pb.StatRequest, pb.AttrResponse, stat.run),
    Operation("BatchStat", _M.METHOD_META_BATCH_STAT, pb.BatchStatRequest, pb.BatchStatResponse, batch_stat.run),
    Operation("List", _M.METHOD_META_LIST, pb.ListRequest, pb.ListResponse, list.run),
    Operation("Create", _M.METHOD_META_CREATE, pb.CreateRequest, pb.OpenResponse, create.run, mutates=True, cuts=True),
    Operation(
        "Open",
        _M.METHOD_META_OPEN,
        pb.OpenRequest,
        pb.OpenResponse,
        open.run,
        mutates=True,
        cuts=True,
        only_reads=open.only_reads,
    ),
    Operation(
        "Close",
        _M.METHOD_META_CLOSE,
        pb.CloseRequest,
        pb.AttrResponse,
        close.run,
        mutates=True,
        unhurried=True,
        batched=True,
    ),
    Operation("Sync", _M.METHOD_META_SYNC, pb.SyncRequest, pb.AttrResponse, sync.run, mutates=True, batched=True),
    Operation(
        "Append",
        _M.METHOD_META_APPEND,
        pb.AppendRequest,
        pb.AppendResponse,
        append.run,
        mutates=True,
        batched=True,
    ),
    Operation("Mkdir", _M.METHOD_META_MKDIR, pb.MkdirRequest, pb.AttrResponse, mkdir.run, mutates=True),
    Operation("Symlink", _M.METHOD_META_SYMLINK, pb.SymlinkRequest, pb.AttrResponse, symlink.run, mutates=True),
    Operation("Link", _M.METHOD_META_LINK, pb.LinkRequest, pb.AttrResponse, link.run, mutates=True),
    Operation("Unlink", _M.METHOD_META_UNLINK, pb.UnlinkRequest, pb.UnlinkResponse, unlink.run, mutates=True),
    Operation("Rmdir", _M.METHOD_META_RMDIR, pb.RmdirRequest, pb.Empty, rmdir.run, mutates=True),
    Operation(
        "RemoveAll",
        _M.METHOD_META_REMOVE_ALL,
        pb.RemoveAllRequest,
        pb.Empty,
        remove_all.run,
        mutates=True,
        prepare=remove_all.prepare,
    ),
    Operation("Rename", _M.METHOD_META_RENAME, pb.RenameRequest, pb.RenameResponse, rename.run, mutates=True),
    Operation("Setattr", _M.METHOD_META_SETATTR, pb.SetattrRequest, pb.AttrResponse, setattr.run, mutates=True),
    Operation(
        "Truncate",
        _M.METHOD_META_TRUNCATE,
        pb.TruncateRequest,
        pb.AttrResponse,
        truncate.run,
        mutates=True,
        cuts=True,
    ),
    Operation("Getxattr", _M.METHOD_META_GETXATTR, pb.GetxattrRequest, pb.GetxattrResponse, getxattr.run),
    Operation("Setxattr", _M.METHOD_META_SETXATTR, pb.SetxattrRequest, pb.AttrResponse, setxattr.run, mutates=True),
    Operation("Listxattr", _M.METHOD_META_LISTXATTR, pb.ListxattrRequest, pb.ListxattrResponse, listxattr.run),
    Operation(
        "Removexattr",
        _M.METHOD_META_REMOVEXATTR,
        pb.RemovexattrRequest,
        pb.AttrResponse,
        removexattr.run,
        mutates=True,
    ),
    Operation("TrashList", _M.METHOD_META_TRASH_LIST, pb.TrashListRequest, pb.TrashListResponse, trash_list.run),
    Operation(
        "TrashRestore",
        _M.METHOD_META_TRASH_RESTORE,
        pb.TrashRestoreRequest,
        pb.AttrResponse,
        trash_restore.run,
        mutates=True,
    ),
    Operation(
        "TrashPurge",
        _M.METHOD_META_TRASH_PURGE,
        pb.TrashPurgeRequest,
        pb.TrashPurgeResponse,
        trash_purge.run,
        mutates=True,
    ),
    Operation("Statfs", _M.METHOD_META_STATFS, pb.StatfsRequest, pb.StatfsResponse, statfs.run),
    Operation(
        "QuotaSet", _M.METHOD_META_QUOTA_SET, pb.QuotaSetRequest, pb.QuotaSetResponse, quota_set.run, mutates=True
    ),
    Operation("QuotaGet", _M.METHOD_META_QUOTA_GET, pb.QuotaGetRequest, pb.QuotaGetResponse, quota_get.run),
    Operation("QuotaList", _M.METHOD_META_QUOTA_LIST, pb.QuotaListRequest, pb.QuotaListResponse, quota_list.run),
    Operation("Keepalive", _M.METHOD_META_KEEPALIVE, pb.KeepaliveRequest, pb.KeepaliveResponse, keepalive.run),
    Operation("Accessed", _M.METHOD_META_ACCESSED, pb.AccessedRequest, pb.Empty, accessed.run),
    Operation("Lock", _M.METHOD_META_LOCK, pb.LockRequest, pb.LockResponse, lock.run, mutates=True, batched=True),
    Operation("Hold", _M.METHOD_META_HOLD, pb.HoldRequest, pb.HoldResponse, hold.run, mutates=True, unhurried=True),
    Operation("GetLock", _M.METHOD_META_GET_LOCK, pb.GetLockRequest, pb.GetLockResponse, get_lock.run),
)

# By frames only, where it waits.
AWAIT_LOCK: Final = Operation(
    "AwaitLock", _M.METHOD_META_AWAIT_LOCK, pb.AwaitLockRequest, pb.AwaitLockResponse, await_lock.run
)
