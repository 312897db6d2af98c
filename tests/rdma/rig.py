"""A machine with RDMA devices on one that has none.

The guest is a User Mode Linux kernel, an ordinary process, with soft-RoCE and soft-iWARP built in. Its root is the
host's file system under a layer that is lost with it, so that every program of the host runs in there at the same path.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fs3.core.process import last_line

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fs3"
SOURCE = "linux-source-6.1"
# Changed with what `_compile` does, as the configuration is part of the key by itself.
RECIPE = 1
# Of the guest's memory three quarters may hold what it writes outside of its disk.
MEMORY_MIB = 4096
DISK_BYTES = 8 << 30
END_S = 5.0
CALIBRATION_S = 0.2
PR_SET_PDEATHSIG = 1

# What has to be there -> the Debian package that brings it.
BUILD = {
    "gcc": "gcc",
    "/usr/include/stdio.h": "libc6-dev",
    "make": "make",
    "bc": "bc",
    "flex": "flex",
    "bison": "bison",
    "xz": "xz-utils",
}
GUEST = {
    "gcc": "gcc",
    "ibv_devinfo": "ibverbs-utils",
    "ib_read_bw": "perftest",
    "rdma": "iproute2",
    "mkfs.ext4": "e2fsprogs",
    "/usr/lib/*/libibverbs/librxe-rdmav*.so": "ibverbs-providers",
}


class RigError(Exception):
    """The rig cannot work here; the message says what to do."""


def _present(what: str) -> bool:
    if what.startswith("/"):
        return any(Path("/").glob(what[1:]))
    return shutil.which(what, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None


def install(needed: Mapping[str, str]) -> None:
    """Install the packages of what is missing. Raises RigError where that takes another user or system."""
    missing = sorted({package for what, package in needed.items() if not _present(what)})
    if not missing:
        return
    names = " ".join(missing)
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise RigError(f"missing: {names}; install them (as root: apt-get install {names}) and run this again")
    print(f"installing {names}", flush=True)
    quiet: dict[str, Any] = {
        "stdout": subprocess.DEVNULL,
        "check": True,
        "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
    }
    subprocess.run(["apt-get", "update", "-qq"], **quiet)
    subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing], **quiet)


def download(package: str, directory: Path) -> Path:
    """Unpack a Debian package below `directory` without installing it, and return where. Raises RigError."""
    if shutil.which("apt-get") is None:
        raise RigError(f"the Debian package {package} is needed, and there is no apt-get here")
    command = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package]
    if subprocess.run(command, cwd=directory, stderr=subprocess.DEVNULL).returncode != 0:
        # No package lists yet, or lists older than the mirror.
        if os.geteuid() == 0:
            subprocess.run(["apt-get", "update", "-qq"], stdout=subprocess.DEVNULL)
        if subprocess.run(command, cwd=directory).returncode != 0:
            raise RigError(f"apt-get cannot download {package}; it needs Debian 12 and its package lists")
    archive = next(directory.glob(f"{package}_*.deb"))
    unpacked = directory / archive.stem
    subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
    archive.unlink()
    return unpacked


@contextmanager
def _made_once(final: Path) -> Iterator[Path | None]:
    """Give None when `final` is there, else a directory that becomes it when the block ends well.

    One process at a time; what a killed one left is taken away.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    with open(final.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if final.exists():
            yield None
            return
        for left in final.parent.glob("making-*"):
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix="making-", dir=final.parent) as made:
            work = Path(made) / "result"
            work.mkdir()
            yield work
            work.rename(final)


@contextmanager
def _session(command: Sequence[str | Path], pinned: bool = False, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process in a session of its own, on one CPU if `pinned`. When the block ends, all of it has ended."""

    def prepare() -> None:
        if pinned:
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL, preexec_fn=prepare, **options)
    try:
        yield process
    finally:
        for end in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, end)
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)


def kernel() -> Path:
    """Return the kernel, built when there is none of this configuration. Takes minutes then; raises RigError."""
    config = HERE / "kernel.config"
    key = hashlib.sha256(f"{SOURCE} {RECIPE} {platform.machine()}\n{config.read_text()}".encode()).hexdigest()[:16]
    final = CACHE / "rdma-kernel" / key
    with _made_once(final) as made:
        if made is not None:
            if platform.machine() != "x86_64":
                raise RigError(f"User Mode Linux runs on x86-64 only, not on {platform.machine()}")
            install(BUILD)
            log = CACHE / "rdma-kernel" / "build.log"
            print(f"building the kernel of the RDMA tests, once, for some minutes; see {log}", flush=True)
            with open(log, "wb") as output:
                _compile(config, made, log, output.fileno())
    return final / "linux"


def _compile(config: Path, made: Path, log: Path, output: int) -> None:
    """Make `made`/linux in a sibling directory."""

    def step(*command: str | Path) -> None:
        with _session(command, stdout=output, stderr=output, env={**os.environ, "ARCH": "um"}) as process:
            if process.wait() != 0:
                raise RigError(f"the kernel cannot be built; {log} ends with: {last_line(log)}")

    work = made.parent
    package = download(SOURCE, work)
    step("tar", "-C", work, "--exclude=*/drivers/gpu/drm/amd/include/*", "-xf", *package.glob("usr/src/*.tar.xz"))
    source = work / SOURCE
    # Two processes that poll take turns on the guest's one CPU, of a tick each; its default tick is 10 ms.
    kconfig = source / "arch/um/Kconfig"
    text, count = re.subn(r"(?m)(^config HZ\n\tint\n\tdefault) 100$", r"\1 1000", kconfig.read_text())
    if count != 1:
        raise RigError(f"{SOURCE} has another arch/um/Kconfig than expected")
    kconfig.write_text(text)
    step("make", "-s", "-C", source, f"KCONFIG_ALLCONFIG={config}", "allnoconfig")
    taken = (source / ".config").read_text().splitlines()
    if lost := [line for line in config.read_text().splitlines() if line[:1] not in ("", "#") and line not in taken]:
        raise RigError(f"{SOURCE} does not take {', '.join(lost)}")
    step("make", "-s", "-C", source, f"-j{os.cpu_count()}", "linux")
    step("strip", "-o", made / "linux", source / "linux")
    (made / "version").write_text(f"{package.name}\n")


def pyverbs() -> Path:
    """Return a directory for sys.path with Debian's pyverbs in it, which is unpacked there once. Raises RigError."""
    final = CACHE / "rdma-pyverbs"
    with _made_once(final) as made:
        if made is not None:
            shutil.copytree(download("python3-pyverbs", made.parent) / "usr", made / "usr", symlinks=True)
    return final / "usr/lib/python3/dist-packages"


def _clock(made: Path) -> None:
    """Compile clock.c for this machine as `made`. Its time stamp counter has to run at a constant rate."""
    if "nonstop_tsc" not in Path("/proc/cpuinfo").read_text():
        raise RigError("the processor's time stamp counter stops at times; the guest's clock cannot be read from it")

    def build(*options: str) -> ctypes.CDLL:
        command = ["gcc", "-O2", "-shared", "-fPIC", *options, "-o", made, HERE / "clock.c"]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(made))

    ticks = build().ticks
    ticks.restype = ctypes.c_uint64
    began_ticks, began_ns = ticks(), time.monotonic_ns()
    time.sleep(CALIBRATION_S)
    passed_ticks, passed_ns = ticks() - began_ticks, time.monotonic_ns() - began_ns
    made.unlink()
    build(f"-DNS_PER_TICK_32={(passed_ns << 32) // passed_ticks}ull")


def _memory_directory(memory_mib: int) -> Path:
    """Find a place for the file that is the guest's memory: it is mapped executable, and should be in memory itself."""
    for name in ("/dev/shm", tempfile.gettempdir()):
        with suppress(OSError):
            found = os.statvfs(name)
            if not found.f_flag & os.ST_NOEXEC and found.f_bavail * found.f_frsize > memory_mib << 20:
                return Path(name)
    raise RigError(f"neither /dev/shm nor {tempfile.gettempdir()} has {memory_mib} MiB free and may be executed from")


def run(linux: Path, command: str, *, out: Path, timeout_s: float, environment: Mapping[str, str]) -> int:
    """Run a shell command as root in a new guest, its output on our standard output, and return its exit status.

    It starts in our working directory with our environment plus `environment`; `out` is $RIG_OUT in there and the one
    place where what it writes remains. 124: ended after `timeout_s`; 125: the guest failed, see `out`/console.txt.
    """
    place = _memory_directory(MEMORY_MIB)
    for left in place.glob("fs3-rdma-*"):
        if not Path("/proc", left.name.split("-")[2]).exists():
            shutil.rmtree(left, ignore_errors=True)
    rig = Path(tempfile.mkdtemp(prefix=f"fs3-rdma-{os.getpid()}-", dir=place))
    try:
        shutil.copy(HERE / "guest.sh", rig)
        _clock(rig / "clock.so")
        shutil.copy("/proc/cpuinfo", rig / "cpuinfo")
        (rig / "out").write_text(str(out))
        variables = {**os.environ, "TERM": "dumb", **environment, "RIG_OUT": "/rig.out", "TMPDIR": "/rig.disk"}
        exports = [f"export {k}={shlex.quote(v)}" for k, v in variables.items() if k.isidentifier()]
        (rig / "command.sh").write_text("\n".join([*exports, f"cd {shlex.quote(os.getcwd())}", command, ""]))
        with open(rig / "disk", "wb") as disk:
            disk.truncate(DISK_BYTES)
        arguments: list[str | Path] = [
            linux, f"mem={MEMORY_MIB}M", f"uml_dir={rig}", f"ubd0={rig}/disk", "root=/dev/root", "rootfstype=hostfs",
            "rootflags=/", "ro", f"init={rig}/guest.sh", f"rig={rig}", "quiet", "loglevel=4", "panic=-1",
            "con=null", "con0=null,fd:2", "con1=null,fd:1",
        ]  # fmt: skip
        with open(out / "console.txt", "wb") as console:
            # The kernel's process and those it traces hand over to each other at every system call and page fault.
            # Across CPUs that takes three times as long.
            options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": console}
            with _session(arguments, pinned=True, env={**os.environ, "TMPDIR": str(rig)}, **options) as guest:
                if not _pass_on(guest, timeout_s):
                    print(f"ended after {timeout_s:.0f} s", file=sys.stderr)
                    return 124
        status = rig / "status"
        return int(status.read_text()) if status.exists() else 125
    finally:
        shutil.rmtree(rig)


def _pass_on(guest: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Copy what the guest writes until it ends; False when it did not in time."""
    assert guest.stdout is not None
    deadline = time.monotonic() + timeout_s
    while (left_s := deadline - time.monotonic()) > 0 and select.select([guest.stdout], [], [], left_s)[0]:
        data = os.read(guest.stdout.fileno(), 1 << 16)
        if not data:
            return True
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    return False
