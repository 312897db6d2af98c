"""`fs3 admin fsck`: the audit of a running cluster."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from typing import Any, Final

import click

from fs3.cli.output import human_bytes, json_option, print_json
from fs3.cli.target import Target, cluster_options, default_target
from fs3.client.url import find_token, parse_url
from fs3.core.errors import Fs3Error, error
from fs3.rpc.client import Peers
from fs3.v1.frame_pb2 import Code, Method, Role
from fs3.v1.meta_pb2 import (
    Caller,
    Empty,
    FsckCancelRequest,
    FsckFinding,
    FsckPollRequest,
    FsckPollResponse,
    FsckStartRequest,
    FsckStartResponse,
)

CALL_S: Final = 10.0
POLL_WAIT_MS: Final = 1000


@click.command("fsck")
@click.argument("directory", required=False, type=click.Path(file_okay=False))
@click.option("--repair", is_flag=True, help="Repair what can be repaired without losing data.")
@click.option("--repair-chunks", is_flag=True, help="Remove chunks of files that have been gone for a while.")
@click.option(
    "--orphan-age", "orphan_age_s", type=float, default=300.0, show_default=True, help="That while, in seconds."
)
@click.option("--namespace-only", is_flag=True, help="Leave out the chunks on storage.")
@cluster_options
@json_option
def fsck_command(
    directory: str | None,
    repair: bool,
    repair_chunks: bool,
    orphan_age_s: float,
    namespace_only: bool,
    as_json: bool,
    url: str | None,
    cluster: str | None,
    token_file: str | None,
) -> int:
    """Check everything stored in a cluster, local in DIRECTORY or by --url, while it is used.

    What loses its name and is repaired is found in /lost+found. Exit status 1 when something is wrong and was not
    repaired.
    """
    if repair_chunks and namespace_only:
        raise error(Code.CODE_INVALID_ARGUMENT, "--repair-chunks and --namespace-only exclude each other")
    if orphan_age_s < 0:
        raise error(Code.CODE_INVALID_ARGUMENT, "--orphan-age is not negative")
    request = FsckStartRequest(
        caller=Caller(uid=os.geteuid(), gid=os.getegid()),
        repair=repair,
        repair_chunks=repair_chunks,
        skip_chunks=namespace_only,
        orphan_age_ms=int(orphan_age_s * 1000),
    )
    target = default_target(url, cluster or directory, token_file)
    return asyncio.run(_fsck(target, request, as_json))


async def _fsck(target: Target, request: FsckStartRequest, as_json: bool) -> int:
    parsed = parse_url(target.url)
    peers = Peers(role=Role.ROLE_CLIENT, cluster_id="", token=find_token(parsed, target.token))
    findings: list[FsckFinding] = []
    last = FsckPollResponse()
    try:
        async for last in _follow(peers, parsed.metas, request):
            findings += last.findings
            if not as_json:
                _show(last)
    finally:
        await peers.close()
    if last.error:
        raise error(Code.CODE_UNAVAILABLE, f"the audit ended early: {last.error}")
    if as_json:
        print_json(_described(findings, last))
    else:
        _sum_up(findings, last)
    return 1 if last.unrepaired else 0


async def _follow(peers: Peers, metas: tuple[str, ...], request: FsckStartRequest) -> AsyncIterator[FsckPollResponse]:
    """Start an audit in the first metadata service that answers and tell how it goes; ends it when given up."""
    address, job = await _start(peers, metas, request)
    known = 0
    try:
        while True:
            poll = FsckPollRequest(job=job, known=known, wait_ms=POLL_WAIT_MS)
            answer, _ = await peers.call(address, Method.METHOD_META_FSCK_POLL, poll, FsckPollResponse, CALL_S)
            known += len(answer.findings)
            yield answer
            if answer.ended:
                return
    except (asyncio.CancelledError, GeneratorExit):
        with contextlib.suppress(Fs3Error):
            await peers.call(address, Method.METHOD_META_FSCK_CANCEL, FsckCancelRequest(job=job), Empty, CALL_S)
        raise


async def _start(peers: Peers, metas: tuple[str, ...], request: FsckStartRequest) -> tuple[str, bytes]:
    last: Fs3Error | None = None
    for address in metas:
        try:
            answer, _ = await peers.call(address, Method.METHOD_META_FSCK_START, request, FsckStartResponse, CALL_S)
            return address, answer.job
        except Fs3Error as exc:
            last = exc
            if exc.code not in (Code.CODE_UNAVAILABLE, Code.CODE_TIMEOUT):
                break
    assert last is not None
    raise last


def _show(answer: FsckPollResponse) -> None:
    """New findings on standard output, how far it is on a terminal."""
    terminal = sys.stderr.isatty()
    if terminal:
        click.echo("\r\x1b[K", nl=False, err=True)
    for finding in answer.findings:
        click.echo(_line(finding))
    if terminal and not answer.ended:
        click.echo(f"{answer.step}: {answer.looked_at} looked at", nl=False, err=True)


def _line(finding: FsckFinding) -> str:
    if finding.repaired:
        outcome = f"; repaired: {finding.repair}"
    else:
        outcome = f"; repair: {finding.repair}" if finding.repair else ""
    return f"{finding.kind}: {finding.where}: {finding.problem}{outcome}"


def _sum_up(findings: list[FsckFinding], last: FsckPollResponse) -> None:
    total = sum(last.counts.values())
    if total > len(findings):
        click.echo(f"... and {total - len(findings)} more: " + ", ".join(f"{n} {k}" for k, n in last.counts.items()))
    lost = sum(finding.bytes for finding in findings if not finding.repaired)
    bytes_lost = f"; {human_bytes(lost)} on each replica that nobody can read" if lost else ""
    if last.unsettled:
        click.echo(f"{last.unsettled} things changed too often to be judged; check again when less is going on")
    if total:
        click.echo(f"{total} findings, {total - last.unrepaired} repaired{bytes_lost}")
    else:
        click.echo("nothing is wrong")


def _described(findings: list[FsckFinding], last: FsckPollResponse) -> dict[str, Any]:
    return {
        "clean": not last.counts,
        "findings": [
            {
                "kind": finding.kind,
                "inode": finding.inode or None,
                "where": finding.where,
                "problem": finding.problem,
                "repair": finding.repair or None,
                "repaired": finding.repaired,
                "bytes": finding.bytes,
            }
            for finding in findings
        ],
        "counts": dict(sorted(last.counts.items())),
        "unrepaired": last.unrepaired,
        "unsettled": last.unsettled,
    }
