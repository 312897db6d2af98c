"""`fs3 quota`: limits of directories, and how much of them is used."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import click
from google.protobuf.message import Message

from fs3.cli.output import human_bytes, json_option, print_json, print_table
from fs3.cli.target import RemotePath, Target, cluster_options, default_target, remote_path
from fs3.client.paths import to_service
from fs3.client.url import find_token, parse_url
from fs3.core.errors import Fs3Error, error
from fs3.core.units import parse_bytes
from fs3.rpc.client import Peers
from fs3.v1.frame_pb2 import Code, Method, Role
from fs3.v1.meta_pb2 import (
    Caller,
    OpId,
    PathAt,
    QuotaGetRequest,
    QuotaGetResponse,
    QuotaInfo,
    QuotaListRequest,
    QuotaListResponse,
    QuotaSetRequest,
    QuotaSetResponse,
    QuotaState,
)

CALL_S: Final = 30.0
ROOT_INODE: Final = 1
NONE: Final = "none"
NO_LIMIT: Final = (1 << 64) - 1
STATES: Final = {
    QuotaState.QUOTA_STATE_COUNTING: "counting",
    QuotaState.QUOTA_STATE_ACTIVE: "active",
    QuotaState.QUOTA_STATE_CLEARING: "clearing",
}

T = TypeVar("T")
M = TypeVar("M", bound=Message)


class Service:
    """The metadata services of a cluster, called as this process' user."""

    def __init__(self, target: Target) -> None:
        url = parse_url(target.url)
        self._metas = url.metas
        self._base = os.fsencode(url.base)
        self._peers = Peers(role=Role.ROLE_CLIENT, cluster_id="", token=find_token(url, target.token))
        self.caller = Caller(uid=os.geteuid(), gid=os.getegid(), groups=os.getgroups())

    def at(self, path: str, *, follow: bool = True) -> PathAt:
        """A path on the cluster."""
        return PathAt(inode=ROOT_INODE, path=to_service(self._base, path), follow=follow)

    async def call(self, method: int, request: Message, response_class: type[M]) -> M:
        """Ask one service after the other, until one answers."""
        last: Fs3Error | None = None
        for address in self._metas:
            try:
                return (await self._peers.call(address, method, request, response_class, CALL_S))[0]
            except Fs3Error as exc:
                last = exc
                if exc.code not in (Code.CODE_UNAVAILABLE, Code.CODE_TIMEOUT):
                    break
        assert last is not None
        raise last

    async def close(self) -> None:
        """End the connections."""
        await self._peers.close()


def run(target: Target, work: Callable[[Service], Awaitable[T]]) -> T:
    """Do `work` with a cluster's services."""

    async def main() -> T:
        service = Service(target)
        try:
            return await work(service)
        finally:
            await service.close()

    return asyncio.run(main())


def quotas_of(remote: RemotePath, *, follow: bool = True) -> QuotaGetResponse:
    """The inode of a path, and the quotas that count it, the innermost first."""

    async def work(service: Service) -> QuotaGetResponse:
        request = QuotaGetRequest(caller=service.caller, at=service.at(remote.path, follow=follow))
        return await service.call(Method.METHOD_META_QUOTA_GET, request, QuotaGetResponse)

    return run(remote.target, work)


def own_quota(remote: RemotePath) -> QuotaInfo | None:
    """The quota of a directory itself, once everything in it is counted; a service older than quotas has none."""
    try:
        found = quotas_of(remote, follow=False)
    except Fs3Error as exc:
        if exc.code == Code.CODE_UNIMPLEMENTED:
            return None
        raise
    for quota in found.quotas:
        if quota.directory == found.inode and quota.state == QuotaState.QUOTA_STATE_ACTIVE:
            return quota
    return None


@click.group("quota")
def quota_command() -> None:
    """Limits for what is in a directory and below it: lengths of files, and how many there are."""


def _directory(path: str, where: dict[str, Any]) -> RemotePath:
    return remote_path(path, where["url"], where["cluster"], where["token_file"])


@quota_command.command("set")
@click.argument("directory", metavar="DIR")
@click.option(
    "--bytes", "size", metavar="SIZE", help=f"Limit of the lengths of all files, for example 10GiB, or {NONE}."
)
@click.option("--files", metavar="N", help=f"Limit of files and directories, DIR included, or {NONE}.")
@cluster_options
@json_option
def set_command(directory: str, size: str | None, files: str | None, as_json: bool, **where: Any) -> None:
    """Give DIR a quota, or change its limits. Root only.

    What is in DIR already is counted in the background; the limits are enforced once that is done. A quota without
    limits only counts. Quotas may be inside each other: all of them count.
    """
    remote = _directory(directory, where)
    quota = _set(remote, bytes_max=_limit(size, parse_bytes), inodes_max=_limit(files, _number))
    if as_json:
        print_json(described(quota.quota))


@quota_command.command("clear")
@click.argument("directory", metavar="DIR")
@cluster_options
def clear_command(directory: str, **where: Any) -> None:
    """Remove the quota of DIR. Root only."""
    _set(_directory(directory, where), clear=True)


def _set(remote: RemotePath, **fields: Any) -> QuotaSetResponse:
    async def work(service: Service) -> QuotaSetResponse:
        op = OpId(client_id=secrets.token_bytes(16), sequence=1)
        request = QuotaSetRequest(caller=service.caller, op=op, at=service.at(remote.path), **fields)
        return await service.call(Method.METHOD_META_QUOTA_SET, request, QuotaSetResponse)

    return run(remote.target, work)


def _limit(text: str | None, parse: Callable[[str], int]) -> int | None:
    """What a request says of a limit."""
    if text is None:
        return None
    return NO_LIMIT if text == NONE else parse(text)


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= NO_LIMIT:
        raise error(Code.CODE_INVALID_ARGUMENT, f"--files is a number or {NONE}, not {text!r}")
    return int(text)


@quota_command.command("get")
@click.argument("directory", metavar="DIR")
@cluster_options
@json_option
def get_command(directory: str, as_json: bool, **where: Any) -> int:
    """Show the quotas that count what is in DIR, its own first. Exit status 1 when there is none."""
    found = list(quotas_of(_directory(directory, where)).quotas)
    if not found and not as_json:
        click.echo(f"fs3: no quota counts what is in {directory}", err=True)
        return 1
    _show(found, as_json)
    return int(not found)


@quota_command.command("ls")
@cluster_options
@json_option
def ls_command(as_json: bool, url: str | None, cluster: str | None, token_file: str | None) -> None:
    """Show all quotas. Root only."""
    found = run(default_target(url, cluster, token_file), _all)
    _show(sorted(found, key=lambda quota: quota.path), as_json)


async def _all(service: Service) -> list[QuotaInfo]:
    found: list[QuotaInfo] = []
    while True:
        request = QuotaListRequest(caller=service.caller, after=found[-1].id if found else 0)
        page = await service.call(Method.METHOD_META_QUOTA_LIST, request, QuotaListResponse)
        found += page.quotas
        if page.end:
            return found


def described(quota: QuotaInfo) -> dict[str, Any]:
    """The machine-readable form."""
    bytes_max = quota.bytes_max if quota.HasField("bytes_max") else None
    files_max = quota.inodes_max if quota.HasField("inodes_max") else None
    return {
        "path": os.fsdecode(quota.path),
        "state": STATES.get(quota.state, "unknown"),
        "bytes": quota.bytes,
        "bytes_max": bytes_max,
        "bytes_percent": _percent(quota.bytes, bytes_max),
        "files": quota.inodes,
        "files_max": files_max,
        "files_percent": _percent(quota.inodes, files_max),
    }


def _percent(used: int, limit: int | None) -> float | None:
    if limit is None:
        return None
    return round(100 * used / limit, 1) if limit else 100.0


def _show(found: list[QuotaInfo], as_json: bool) -> None:
    rows = [described(quota) for quota in found]
    if as_json:
        print_json(rows)
        return
    header = ["BYTES", "LIMIT", "USED", "FILES", "LIMIT", "USED", "STATE", "PATH"]
    print_table(header, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[object]:
    def share(percent: float | None) -> str:
        return "-" if percent is None else f"{percent:.0f}%"

    return [
        human_bytes(row["bytes"]),
        "-" if row["bytes_max"] is None else human_bytes(row["bytes_max"]),
        share(row["bytes_percent"]),
        row["files"],
        "-" if row["files_max"] is None else row["files_max"],
        share(row["files_percent"]),
        row["state"],
        row["path"] or "(removed)",
    ]
