"""The peer of the mount: `passthrough_hp` of libfuse, a daemon that shows the kernel the files of a local directory.

Its source comes from Debian's archive of source packages, is checked against a digest and compiled once, into the
cache directory of fs3; libfuse's headers are needed (Debian: libfuse3-dev). This release knows no kernel passthrough:
every byte goes through the daemon, as it does in fs3.
"""

from __future__ import annotations

import contextlib
import hashlib
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from fs3.fuse.table import mounted_at
from fs3.testing import measure
from fs3.testing.measure import Measured

RELEASE = "3.14.0"
URL = f"http://deb.debian.org/debian/pool/main/f/fuse3/fuse3_{RELEASE}.orig.tar.xz"
SHA256 = "96115b2a8ff34bd1e0c7b00c5dfd8297571d7e165042b94498c9a26356a9a70a"
DOWNLOAD_S_MAX = 60.0
MOUNT_S_MAX = 10.0


class Unavailable(Exception):
    """The peer cannot be had here; says why and what to do."""


def _download() -> bytes:
    try:
        with urllib.request.urlopen(URL, timeout=DOWNLOAD_S_MAX) as answer:
            data: bytes = answer.read()
    except OSError as e:
        raise Unavailable(f"libfuse's source cannot be fetched from {URL}: {e}") from e
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise Unavailable(f"what {URL} gave is not libfuse {RELEASE}")
    return data


def _install_headers() -> None:
    if subprocess.run(["pkg-config", "--exists", "fuse3"], check=False).returncode == 0:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise Unavailable("libfuse's headers are missing: install libfuse3-dev and pkg-config")
    install = ["apt-get", "install", "-y", "-qq", "libfuse3-dev", "pkg-config", "g++"]
    done = subprocess.run(
        install, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise Unavailable(f"`{' '.join(install)}` failed: {done.stderr.strip()}")


def build() -> Path:
    """The program, compiled if it is not there yet. Raises Unavailable."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fs3"
    program = cache / f"passthrough_hp-{RELEASE}"
    if program.exists():
        return program
    _install_headers()
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(fileobj=BytesIO(lzma.decompress(_download()))) as archive:
            archive.extractall(scratch, filter="data")
        example = Path(scratch) / f"fuse-{RELEASE}" / "example"
        flags = subprocess.run(
            ["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True, check=True
        )
        made = Path(scratch) / "passthrough_hp"
        command = ["g++", "-O2", "-std=c++17", "-w", "-o", str(made), "passthrough_hp.cc", *flags.stdout.split()]
        done = subprocess.run(command, cwd=example, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Unavailable(f"libfuse's passthrough_hp does not compile: {done.stderr.strip()[-500:]}")
        cache.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, program.with_suffix(".new"))
        program.with_suffix(".new").replace(program)
    return program


@contextmanager
def served(program: Path, directory: Path) -> Iterator[tuple[Path, int]]:
    """A mount of an empty directory made below `directory`; its path and the daemon's pid."""
    source, mountpoint = directory / "passthrough-files", directory / "passthrough"
    source.mkdir()
    mountpoint.mkdir()
    daemon = subprocess.Popen([program, "--foreground", source, mountpoint], stdout=subprocess.DEVNULL)
    try:
        ends_s = time.monotonic() + MOUNT_S_MAX
        while mounted_at(str(mountpoint)) is None:
            if daemon.poll() is not None or time.monotonic() > ends_s:
                raise Unavailable("passthrough_hp does not mount")
            time.sleep(0.02)
        yield mountpoint, daemon.pid
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=False, capture_output=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(timeout=MOUNT_S_MAX)
        daemon.kill()
        daemon.wait()
        shutil.rmtree(source)
        mountpoint.rmdir()


def figures(directory: Path, *, size_bytes: int, files: int, times: int) -> dict[str, Measured]:
    """What the mount is compared with, by the same measurements. Raises Unavailable."""
    with served(build(), directory) as (mountpoint, pid):
        file, pids = mountpoint / "file", [pid]
        found = {
            "passthrough_write": measure.middle(
                [measure.mount_write(file, size_bytes, pids=pids) for _ in range(times + 1)][1:]
            ),
            "passthrough_read": measure.middle(
                [measure.mount_read(file, size_bytes, pids=pids) for _ in range(times + 1)][1:]
            ),
            "passthrough_random_read": measure.middle(
                measure.mount_random_read(file, file_bytes=size_bytes, operations=files * 2, pids=pids)
                for _ in range(times)
            ),
        }
        for jobs in (1, 8):
            small = [
                measure.mount_small_files(mountpoint / "small", jobs=jobs, operations=files, pids=pids)
                for _ in range(times)
            ]
            for label, name in (("create_write_close", "create"), ("stat", "stat"), ("unlink", "unlink")):
                found[f"passthrough_{name}_{jobs}"] = measure.middle(f[label] for f in small)
        return found
