"""`fs3 doctor`: what works on this machine, and what to do about the rest."""

from __future__ import annotations

import mmap
import os
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from fs3.cli.output import human_bytes, json_option, print_json
from fs3.core.errors import Fs3Error
from fs3.core.rdma import inspect

OPEN_FILES_WANTED = 4096
FREE_BYTES_WANTED = 10 << 30


@dataclass(frozen=True)
class Finding:
    """One check: `status` is "ok", "warn" (something is slower or missing) or "fail" (fs3 will not work)."""

    check: str
    status: str
    detail: str
    advice: str = ""


def _python() -> Finding:
    return Finding("python", "ok", ".".join(map(str, sys.version_info[:3])))


def _native() -> Finding:
    try:
        from fs3 import native
    except ImportError as e:
        return Finding("native module", "fail", str(e), "run `make build`, or install the wheel for this machine")
    if native.crc32c(b"123456789") != 0xE3069283:
        return Finding("native module", "fail", "its checksum is wrong on this CPU", "report this with /proc/cpuinfo")
    return Finding("native module", "ok", "loads, checksums are right")


def _fuse() -> Finding:
    device = Path("/dev/fuse")
    if not device.exists():
        return Finding("FUSE", "warn", "/dev/fuse is missing", "modprobe fuse, or give the container /dev/fuse")
    if not os.access(device, os.R_OK | os.W_OK):
        return Finding("FUSE", "warn", "/dev/fuse may not be opened by this user", "ask for access to /dev/fuse")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        return Finding("FUSE", "warn", "fusermount3 is missing", "install the package fuse3, or mount as root")
    return Finding("FUSE", "ok", "/dev/fuse can be opened")


def _direct_io(directory: Path) -> Finding:
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            block = mmap.mmap(-1, 4096)
            descriptor = os.open(file.name, os.O_RDWR | os.O_DIRECT)
            try:
                os.pwrite(descriptor, block, 0)
            finally:
                os.close(descriptor)
    except OSError as e:
        return Finding(
            "direct I/O",
            "fail",
            f"{directory}: {e.strerror}",
            "keep the cluster on ext4, xfs or another file system with O_DIRECT (`--dir`)",
        )
    return Finding("direct I/O", "ok", f"works in {directory}")


def _space(directory: Path) -> Finding:
    free = shutil.disk_usage(directory).free
    detail = f"{human_bytes(free)} free in {directory}"
    if free < FREE_BYTES_WANTED:
        return Finding("disk space", "warn", detail, f"a demo needs about {human_bytes(FREE_BYTES_WANTED)}")
    return Finding("disk space", "ok", detail)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < OPEN_FILES_WANTED:
        return Finding("open files", "warn", f"limit {soft} of {hard}", f"raise it: ulimit -n {OPEN_FILES_WANTED}")
    return Finding("open files", "ok", f"limit {soft}, may rise to {hard}")


def _loopback() -> Finding:
    try:
        with socket.create_server(("127.0.0.1", 0)):
            return Finding("loopback", "ok", "127.0.0.1 can be bound")
    except OSError as e:
        return Finding("loopback", "fail", f"127.0.0.1: {e.strerror}", "bring it up: ip link set lo up")


def _rdma() -> Finding:
    report = inspect()
    names = ", ".join(device.name for device in report.devices)
    if not names:
        return Finding("RDMA", "ok", "no devices; TCP is used")
    if report.usable:
        return Finding("RDMA", "ok", f"devices {names}")
    return Finding("RDMA", "warn", f"devices {names} cannot be used; TCP is", "see what to do: fs3 rdma check")


def _foundationdb() -> Finding:
    return Finding("FoundationDB", "ok", "not needed: the embedded store is used in this version")


@click.command("doctor")
@click.option(
    "--dir", "directory", default=".", type=click.Path(exists=True, file_okay=False), help="Where a cluster would live."
)
@json_option
def doctor_command(directory: str, as_json: bool) -> int:
    """Check this machine. Exit status 1 when something fs3 needs is missing."""
    path = Path(directory).absolute()
    checks: list[Callable[[], Finding]] = [
        _python,
        _native,
        _fuse,
        lambda: _direct_io(path),
        lambda: _space(path),
        _open_files,
        _loopback,
        _rdma,
        _foundationdb,
    ]
    findings = []
    for check in checks:
        try:
            findings.append(check())
        except (OSError, Fs3Error) as e:
            findings.append(Finding(getattr(check, "__name__", "check").strip("_"), "fail", str(e)))
    failed = any(f.status == "fail" for f in findings)
    if as_json:
        print_json({"ok": not failed, "checks": [asdict(f) for f in findings]})
        return int(failed)
    for finding in findings:
        advice = f"  → {finding.advice}" if finding.advice else ""
        click.echo(f"{finding.status:<5} {finding.check:<14} {finding.detail}{advice}")
    return int(failed)
