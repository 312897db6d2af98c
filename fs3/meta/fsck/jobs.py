"""Audits that clients start, follow and end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from dataclasses import asdict
from typing import Final

from fs3.core.errors import Fs3Error, error
from fs3.kv.api import KvError
from fs3.meta.engine import Engine
from fs3.meta.fsck.audit import LOOK_PAUSE_S, Audit, Options
from fs3.meta.fsck.chunks import ChunkAudit, ChunkLister
from fs3.meta.fsck.entries import check_entries
from fs3.meta.fsck.inodes import check_inodes
from fs3.meta.fsck.quotas import check_quotas
from fs3.meta.fsck.report import Report
from fs3.meta.fsck.sorter import Sorter
from fs3.meta.fsck.tables import check_answers, check_inode_counter, check_tables
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import (
    Empty,
    FsckCancelRequest,
    FsckFinding,
    FsckPollRequest,
    FsckPollResponse,
    FsckStartRequest,
    FsckStartResponse,
)

log = logging.getLogger("fs3.meta.fsck")

# An audit that nobody has asked about for so long is ended.
ABANDONED_S: Final = 60.0
WAIT_S_MAX: Final = 20.0
POLL_S: Final = 0.1
# Findings in one answer, far below the frame's body limit.
POLL_FINDINGS_MAX: Final = 500


async def run_audit(engine: Engine, lister: ChunkLister, options: Options, report: Report) -> None:
    """Look at everything; `report` grows meanwhile. Raises KvError, Fs3Error, OSError (no room for sorting)."""
    audit = Audit(engine.store, engine.clock, engine.context, options, report, served=lambda: engine.collector.served())
    with contextlib.closing(Sorter()) as names:
        await check_entries(audit, names)
        await check_inodes(audit, names)
    await check_tables(audit)
    await check_answers(audit, engine.sweeper)
    await check_inode_counter(audit)
    await check_quotas(audit)
    if options.chunks:
        await ChunkAudit(audit, lister).run()
    if report.counts["not-queued"]:
        engine.collector.wake()


class _Job:
    """An audit that runs or has run. `limit`, once there, ends it unless it is moved on."""

    def __init__(self) -> None:
        self.id = secrets.token_bytes(16)
        self.report = Report()
        self.error = ""
        self.limit: asyncio.Timeout | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether the report is complete."""
        return self.task is not None and self.task.done()

    def asked(self) -> None:
        """Somebody still wants to know."""
        if self.limit is not None and not self.ended and not self.limit.expired():
            self.limit.reschedule(asyncio.get_running_loop().time() + ABANDONED_S)


class FsckJobs:
    """The audit of one metadata service, one at a time. Belongs to one event loop."""

    def __init__(self, engine: Engine, lister: ChunkLister) -> None:
        self._engine = engine
        self._lister = lister
        self._job: _Job | None = None

    async def start(self, request: FsckStartRequest) -> FsckStartResponse:
        """Begin an audit. Raises NOT_PERMITTED for anybody but root, BUSY while another runs."""
        if request.caller.uid != 0:
            raise error(Code.CODE_NOT_PERMITTED, "only root audits a cluster")
        if self._job is not None and not self._job.ended:
            raise error(Code.CODE_BUSY, "another audit runs in this metadata service; wait until it has ended")
        options = Options(
            repair=request.repair,
            repair_chunks=request.repair_chunks,
            chunks=not request.skip_chunks,
            orphan_age_s=request.orphan_age_ms / 1000,
            look_pause_s=request.look_pause_ms / 1000 or LOOK_PAUSE_S,
        )
        self._job = job = _Job()
        job.task = asyncio.create_task(self._run(job, options), name="fs3-meta-fsck")
        return FsckStartResponse(job=job.id)

    async def _run(self, job: _Job, options: Options) -> None:
        try:
            async with asyncio.timeout(ABANDONED_S) as job.limit:
                await run_audit(self._engine, self._lister, options, job.report)
        except Fs3Error as exc:
            job.error = exc.message
        except TimeoutError:
            job.error = "nobody asked about the audit any more"
            log.info("an audit is ended: %s", job.error)
        except (KvError, OSError) as exc:
            job.error = str(exc)
        except Exception:
            job.error = "the audit failed by a bug; see the log of the metadata service"
            log.exception("an audit failed by a bug")

    async def poll(self, request: FsckPollRequest, left_s: float) -> FsckPollResponse:
        """Tell what is new, waiting up to ``wait_ms`` for that. Raises NOT_FOUND for an audit that is not this one."""
        job = self._find(request.job)
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + min(request.wait_ms / 1000, WAIT_S_MAX, max(0.0, left_s))
        while not job.ended and len(job.report.findings) <= request.known and (left_s := ends_s - loop.time()) > 0:
            assert job.task is not None
            await asyncio.wait({job.task}, timeout=min(POLL_S, left_s))
        job.asked()
        return self._answer(job, request.known)

    @staticmethod
    def _answer(job: _Job, known: int) -> FsckPollResponse:
        assert job.task is not None
        report = job.report
        told = report.findings[known : known + POLL_FINDINGS_MAX]
        return FsckPollResponse(
            findings=[FsckFinding(**asdict(finding)) for finding in told],
            ended=job.ended and known + len(told) == len(report.findings),
            error="the audit was ended" if job.task.cancelled() else job.error,
            step=report.step,
            looked_at=report.looked_at,
            counts=report.counts,
            unrepaired=report.unrepaired,
            unsettled=report.unsettled,
        )

    async def cancel(self, request: FsckCancelRequest) -> Empty:
        """End an audit. Repairs that it has made stay."""
        job = self._find(request.job)
        if job.task is not None:
            job.task.cancel()
        return Empty()

    def _find(self, job_id: bytes) -> _Job:
        if self._job is None or self._job.id != job_id:
            message = "the metadata service knows of no such audit, it was restarted: begin again"
            raise error(Code.CODE_NOT_FOUND, message)
        return self._job

    async def stop(self) -> None:
        """End what runs."""
        if self._job is not None and self._job.task is not None:
            self._job.task.cancel()
            await asyncio.gather(self._job.task, return_exceptions=True)
