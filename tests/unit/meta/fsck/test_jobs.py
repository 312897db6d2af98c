from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from fs3.meta.fsck import jobs
from fs3.meta.fsck.jobs import FsckJobs
from fs3.meta.fsck.report import Finding
from fs3.v1 import meta_pb2 as pb
from fs3.v1.frame_pb2 import Code
from meta.harness import Meta, code, run, until, user

ROOT = pb.Caller(uid=0)


@asynccontextmanager
async def served() -> AsyncIterator[FsckJobs]:
    meta = await Meta.start()
    audits = FsckJobs(meta.engine, meta.chunks)
    try:
        yield audits
    finally:
        await audits.stop()


async def poll(audits: FsckJobs, job: bytes, known: int = 0, wait_ms: int = 10_000) -> pb.FsckPollResponse:
    return await audits.poll(pb.FsckPollRequest(job=job, known=known, wait_ms=wait_ms), 30.0)


def test_an_audit_is_started_and_followed_to_its_end() -> None:
    async def main() -> None:
        async with served() as audits:
            job = (await audits.start(pb.FsckStartRequest(caller=ROOT))).job
            answer = await poll(audits, job)
            assert answer.ended
            assert (answer.error, list(answer.findings), answer.unrepaired) == ("", [], 0)

    run(main())


def test_findings_are_told_once_in_bounded_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def found(engine: Any, lister: Any, options: Any, report: Any) -> None:
        for i in range(jobs.POLL_FINDINGS_MAX + 1):
            report.add(Finding("kind", i, "here", "wrong"), repaired=False)

    monkeypatch.setattr(jobs, "run_audit", found)

    async def main() -> None:
        async with served() as audits:
            job = (await audits.start(pb.FsckStartRequest(caller=ROOT))).job
            first = await poll(audits, job)
            while not first.findings:
                first = await poll(audits, job)
            assert (len(first.findings), first.ended) == (jobs.POLL_FINDINGS_MAX, False)
            second = await poll(audits, job, len(first.findings))
            assert [f.inode for f in second.findings] == [jobs.POLL_FINDINGS_MAX]
            assert second.ended
            assert second.counts["kind"] == second.unrepaired == jobs.POLL_FINDINGS_MAX + 1

    run(main())


async def forever(engine: Any, lister: Any, options: Any, report: Any) -> None:
    await asyncio.Event().wait()


def test_one_audit_at_a_time_until_it_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "run_audit", forever)

    async def main() -> None:
        async with served() as audits:
            job = (await audits.start(pb.FsckStartRequest(caller=ROOT))).job
            assert await code(audits.start(pb.FsckStartRequest(caller=ROOT))) == Code.CODE_BUSY
            assert not (await poll(audits, job, wait_ms=1)).ended
            await audits.cancel(pb.FsckCancelRequest(job=job))
            answer = await poll(audits, job)
            assert (answer.ended, answer.error) == (True, "the audit was ended")
            assert await code(audits.start(pb.FsckStartRequest(caller=ROOT))) == 0
            assert await code(poll(audits, job)) == Code.CODE_NOT_FOUND

    run(main())


def test_an_audit_that_nobody_asks_about_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "run_audit", forever)
    monkeypatch.setattr(jobs, "ABANDONED_S", 0.01)

    async def main() -> None:
        async with served() as audits:
            await audits.start(pb.FsckStartRequest(caller=ROOT))
            job = audits._job
            assert job is not None
            await until(lambda: job.ended)
            assert job.error == "nobody asked about the audit any more"

    run(main())


def test_only_root_audits() -> None:
    async def main() -> None:
        async with served() as audits:
            assert await code(audits.start(pb.FsckStartRequest(caller=user(4)))) == Code.CODE_NOT_PERMITTED

    run(main())
