"""`fs3 mount` and `fs3 umount`: checks, the daemon process, waiting with deadlines."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from fs3.client.url import find_token, parse_url
from fs3.core.errors import Fs3Error, error
from fs3.core.process import last_line
from fs3.fuse import serve
from fs3.fuse.handover import Predecessor
from fs3.fuse.options import MountOptions
from fs3.fuse.table import Daemon, Mounted, default_file, detach, mounted_at, real_path
from fs3.v1.frame_pb2 import Code

MOUNT_TIMEOUT_S = 30.0
UMOUNT_TIMEOUT_S = 90.0
_POLL_S = 0.02


def check_device(device: str = "/dev/fuse") -> None:
    """Raise with one line saying what to do when FUSE cannot be used here."""
    if not os.path.exists(device):
        raise error(
            Code.CODE_NOT_SUPPORTED, f"{device} is missing: load it (modprobe fuse) or give the container {device}"
        )
    if not os.access(device, os.R_OK | os.W_OK):
        raise error(Code.CODE_ACCESS, f"{device} may not be opened by this user: ask for read and write access to it")
    if os.geteuid() != 0 and not (shutil.which("fusermount3") or shutil.which("fusermount")):
        raise error(Code.CODE_NOT_SUPPORTED, "fusermount3 is missing: install the package fuse3, or mount as root")


def check_mountpoint(mountpoint: str) -> str:
    """The resolved mountpoint, if one can mount there. Raises with one line saying what is wrong."""
    path = real_path(mountpoint)
    there = mounted_at(path)
    if there is not None and there.is_fs3:
        raise error(Code.CODE_BUSY, f"{mountpoint} is mounted already; unmount it with `fs3 umount {mountpoint}`")
    try:
        kind = os.stat(path)
    except FileNotFoundError:
        raise error(Code.CODE_NOT_FOUND, f"{mountpoint} does not exist; make it first: mkdir -p {mountpoint}") from None
    except OSError as e:
        if e.errno == errno.ENOTCONN:
            raise error(
                Code.CODE_BUSY, f"{mountpoint} holds a dead mount; clear it with `fs3 umount {mountpoint}`"
            ) from e
        raise error(Code.CODE_ACCESS, f"{mountpoint} cannot be used: {e.strerror}") from e
    if not stat.S_ISDIR(kind.st_mode):
        raise error(Code.CODE_NOT_DIRECTORY, f"{mountpoint} is not a directory")
    if os.geteuid() != 0 and not os.access(path, os.W_OK):
        raise error(Code.CODE_ACCESS, f"{mountpoint} is not writable by this user, who therefore may not mount on it")
    return path


def _parameters(url: str, mountpoint: str, token: str | None, options: MountOptions) -> serve.Parameters:
    parsed = parse_url(url)
    if parsed.base and options.subdir:
        raise error(Code.CODE_INVALID_ARGUMENT, f"{url!r} names a directory, and so does subdir: give one of them")
    options = dataclasses.replace(options, subdir=parsed.base or options.subdir.strip("/"))
    if options.token_file and token is None:
        parsed = dataclasses.replace(parsed, token_file=options.token_file)
    found = find_token(parsed, token)
    check_device()
    path = check_mountpoint(mountpoint)
    return serve.Parameters(
        metas=list(parsed.metas),
        source=url,
        mountpoint=path,
        pid_file=str(Path(options.pid_file).absolute() if options.pid_file else default_file(path, ".pid")),
        log_file=str(Path(options.log_file).absolute() if options.log_file else default_file(path, ".log")),
        token=found,
        options=options,
    )


# Options that the kernel was told, or that what it keeps in memory depends on.
_KEPT = (
    "allow_other",
    "default_permissions",
    "read_only",
    "suid",
    "dev",
    "exec",
    "local_locks",
    "subdir",
    "uid",
    "gid",
    "uidmap",
    "gidmap",
    "cluster_id",
    "engine",
)


def take_over(
    mountpoint: str,
    *,
    options: Callable[[MountOptions], MountOptions] | None = None,
    timeout_s: float = MOUNT_TIMEOUT_S,
) -> None:
    """Have a new daemon go on with the mount on `mountpoint`, with what `options` makes of its options.

    Files stay open, locks stay held, rings go on; whoever uses the mount waits for a moment. When it fails the old
    daemon serves on. Returns when the new one serves, within `timeout_s` seconds. Raises Fs3Error: not mounted by a
    daemon that can hand over, BUSY when its requests or those of rings do not end, INVALID_ARGUMENT for options that
    the kernel was told when it was mounted.
    """
    path = real_path(mountpoint)
    there = mounted_at(path)
    if there is None or not there.is_fs3:
        raise error(Code.CODE_NOT_FOUND, f"no fs3 is mounted on {mountpoint}")
    with Predecessor(serve.door_file(path)) as predecessor:
        old = serve.Parameters.from_json(json.dumps(predecessor.parameters()))
    wanted = options(old.options) if options else old.options
    for name in _KEPT:
        if getattr(wanted, name) != getattr(old.options, name):
            raise error(Code.CODE_INVALID_ARGUMENT, f"{name} holds as long as the mount: unmount it to change that")
    parameters = dataclasses.replace(old, options=wanted, takeover=True)
    child, outcome = _spawn(parameters, f"fs3://{','.join(old.metas)}")
    try:
        # It is not killed when this fails: it may have the mount already, and ends by itself when it does not get it.
        _await_ready(child, outcome, parameters, time.monotonic() + timeout_s)
    finally:
        outcome.close()
        child.returncode = 0  # found by its pid file from here on; Popen must not warn that it still runs


def mount(
    url: str,
    mountpoint: str,
    *,
    token: str | None = None,
    options: MountOptions | None = None,
    foreground: bool = False,
    timeout_s: float = MOUNT_TIMEOUT_S,
) -> int:
    """Mount the cluster at `url`, or the directory of it that the URL names, on the directory `mountpoint`.

    The token is `token`, else what the option token_file, the URL, or the environment names.

    In the background: starts the daemon and returns 0 once the mount answers, within `timeout_s` seconds; otherwise
    nothing is left mounted. With `foreground` serves in this process (main thread only) until it is unmounted or
    gets SIGTERM, and returns the exit status.

    Raises Fs3Error with one line for a person: the mountpoint is missing, not a directory or mounted already;
    /dev/fuse cannot be used; the cluster cannot be reached, is another one, or refuses the token.
    """
    parameters = _parameters(url, mountpoint, token, options or MountOptions())
    if foreground:
        return serve.serve(parameters, lambda: serve.announce(parameters))
    deadline = time.monotonic() + timeout_s
    child, outcome = _spawn(parameters, url)
    try:
        _await_ready(child, outcome, parameters, deadline)
        _await_answer(parameters.mountpoint, deadline)
    except BaseException:
        _abandon(child, parameters.mountpoint)
        raise
    finally:
        outcome.close()
        child.returncode = 0  # found by its pid file from here on; Popen must not warn that it still runs
    return 0


def _spawn(parameters: serve.Parameters, url: str) -> tuple[subprocess.Popen[bytes], _Outcome]:
    log = Path(parameters.log_file)
    read_end, write_end = os.pipe()
    try:
        log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with log.open("ab") as out:
            child = subprocess.Popen(
                [sys.executable, "-m", "fs3.fuse.daemon", str(write_end), "fs3", "mount", url, parameters.mountpoint],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                pass_fds=[write_end],
                start_new_session=True,
            )
    except OSError as e:
        os.close(read_end)
        raise error(Code.CODE_ACCESS, f"the log file {log} cannot be written: {e.strerror}") from e
    finally:
        os.close(write_end)
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin:
        child.stdin.write(parameters.to_json().encode() + b"\n")
    return child, _Outcome(read_end)


class _Outcome:
    """The pipe on which the daemon tells, once, how it went."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, deadline: float) -> dict[str, object] | None:
        """What the daemon said; None when it ended without a word. Raises TimeoutError."""
        text = b""
        while not text.endswith(b"\n"):
            readable, _, _ = select.select([self._descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise TimeoutError
            part = os.read(self._descriptor, 65536)
            if not part:
                return None
            text += part
        said: dict[str, object] = json.loads(text)
        return said

    def close(self) -> None:
        os.close(self._descriptor)


def _await_ready(
    child: subprocess.Popen[bytes], outcome: _Outcome, parameters: serve.Parameters, deadline: float
) -> None:
    try:
        said = outcome.read(deadline)
    except TimeoutError:
        raise error(Code.CODE_TIMEOUT, f"the mount was not ready in time (log: {parameters.log_file})") from None
    if said is None:
        child.wait()
        last = last_line(Path(parameters.log_file))
        raise error(
            Code.CODE_UNAVAILABLE, f"the mount daemon ended: {last or 'no output'} (log: {parameters.log_file})"
        )
    if not said.get("ok"):
        raise error(int(str(said["code"])), str(said["message"]))


def _await_answer(mountpoint: str, deadline: float) -> None:
    """Return when a stat of the mount succeeds; it runs in a thread of its own because it may hang."""
    result: list[OSError | None] = []

    def look() -> None:
        try:
            os.stat(mountpoint)
            result.append(None)
        except OSError as e:
            result.append(e)

    thread = threading.Thread(target=look, name="fs3-mount-look", daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    if not result:
        raise error(Code.CODE_TIMEOUT, f"{mountpoint} was mounted but did not answer in time")
    if result[0] is not None:
        raise error(Code.CODE_UNAVAILABLE, f"{mountpoint} was mounted but does not answer: {result[0].strerror}")


def _abandon(child: subprocess.Popen[bytes], mountpoint: str) -> None:
    """Leave nothing behind of a mount that failed."""
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    there = mounted_at(mountpoint)
    if there is not None and there.is_fs3:
        with contextlib.suppress(Fs3Error):
            detach(mountpoint, lazy=True)


def _find_daemon(mountpoint: str, pid_file: str) -> Daemon | None:
    return Daemon.load(Path(pid_file) if pid_file else default_file(mountpoint, ".pid"))


def umount(mountpoint: str, *, lazy: bool = False, pid_file: str = "", timeout_s: float = UMOUNT_TIMEOUT_S) -> None:
    """Unmount and wait until the daemon has written everything and is gone, `timeout_s` seconds at most.

    `lazy`: take it away though files are open; the daemon lives until they are closed and is not waited for.
    `pid_file`: where the mount was told to note its process. A dead mount (its daemon gone) is cleared as well.
    Raises Fs3Error: not mounted, in use, not permitted, or the daemon did not end in time.
    """
    path = real_path(mountpoint)
    there: Mounted | None = mounted_at(path)
    if there is None:
        raise error(Code.CODE_NOT_FOUND, f"{mountpoint} is not mounted")
    if not there.is_fs3:
        raise error(Code.CODE_INVALID_ARGUMENT, f"{mountpoint} is a mount of type {there.fstype}, not of fs3")
    process = _find_daemon(path, pid_file)
    detach(path, lazy=lazy or process is None)
    if lazy or process is None:
        return
    deadline = time.monotonic() + timeout_s
    while process.alive():
        if time.monotonic() > deadline:
            raise error(
                Code.CODE_TIMEOUT,
                f"{mountpoint} is unmounted but its process {process.pid} has not ended after {timeout_s:g} s "
                f"(log: {process.log})",
            )
        time.sleep(_POLL_S)
