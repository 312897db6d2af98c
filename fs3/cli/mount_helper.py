"""What mount(8) runs for the types `fs3` and `fuse.fs3`.

``mount.fs3 SOURCE DIRECTORY [-sfnv] [-N NS] [-o OPTIONS] [-t TYPE]``

Install it as /sbin/mount.fs3 and /sbin/mount.fuse.fs3 (docs/operations.md). Exit statuses are those of mount(8).
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import NoReturn

from fs3.client.url import parse_url
from fs3.core.errors import Fs3Error, error
from fs3.fuse import MountOptions, mount, parse_options
from fs3.fuse.table import mounted_at, real_path
from fs3.v1.frame_pb2 import Code

WRONG_USAGE = 1
INTERRUPTED = 8
FAILED = 32

_TYPES = ("fs3", "fuse.fs3")
_CLONE_NEWNS = 0x20000
_MS_RDONLY = 1
_MS_REMOUNT = 32
# Flags that a remount would take away if they were not repeated.
_MOUNT_FLAGS = {"nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "nodiratime": 2048, "relatime": 1 << 21}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"mount.fs3: {message}", file=sys.stderr)
        self.print_usage(sys.stderr)
        sys.exit(WRONG_USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("mount.fs3", description="Mount an fs3 cluster; run by mount(8).")
    parser.add_argument("source", help="fs3://host:port[,host:port]/[directory]")
    parser.add_argument("directory")
    parser.add_argument("-o", action="append", default=[], metavar="OPTIONS", dest="options")
    parser.add_argument("-t", choices=_TYPES, default=_TYPES[0], metavar="TYPE", dest="fstype")
    parser.add_argument("-f", action="store_true", dest="fake", help="check the arguments only")
    parser.add_argument("-s", action="store_true", dest="sloppy", help="leave out options that are not known")
    parser.add_argument("-v", action="store_true", dest="verbose", help="say what is mounted")
    parser.add_argument("-n", action="store_true", help="without effect: there is no /etc/mtab")
    parser.add_argument("-N", dest="namespace", metavar="NS", help="mount namespace: a file of it, or a process in it")
    return parser


def _known(options: str) -> str:
    """The options that can be parsed."""

    def is_known(option: str) -> bool:
        try:
            parse_options(option)
        except Fs3Error:
            return False
        return True

    return ",".join(filter(is_known, options.split(",")))


def _enter(namespace: str) -> None:
    """Enter a mount namespace. Raises OSError."""
    path = f"/proc/{namespace}/ns/mnt" if namespace.isdigit() else namespace
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNS) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(descriptor)


def _flags_of(mountpoint: str) -> int:
    """The flags of the topmost mount there that a remount has to repeat."""
    there = mounted_at(mountpoint)
    if there is None or not there.is_fs3:
        raise error(Code.CODE_NOT_FOUND, f"{mountpoint} is no mount of fs3, so it cannot be remounted")
    return sum(_MOUNT_FLAGS.get(option, 0) for option in there.options)


def remount(directory: str, *, read_only: bool) -> None:
    """Make a mount read-only or writable; nothing else can change. Raises Fs3Error."""
    path = real_path(directory)
    flags = _flags_of(path) | _MS_REMOUNT | (_MS_RDONLY if read_only else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(path), None, ctypes.c_ulong(flags), None) != 0:
        number = ctypes.get_errno()
        why = "files are open for writing" if number == errno.EBUSY else os.strerror(number)
        raise error(Code.CODE_BUSY, f"{directory} cannot be remounted: {why}")


def _run(arguments: argparse.Namespace) -> None:
    text = ",".join(arguments.options)
    words = text.split(",")
    again = "remount" in words
    # With a remount mount(8) also passes what the mount table has; only these of it can change.
    text = ",".join(word for word in words if word in ("ro", "rw")) if again else text
    options: MountOptions = parse_options(_known(text) if arguments.sloppy else text)
    if not again:
        parse_url(arguments.source)
    if arguments.fake:
        return
    if arguments.namespace:
        _enter(arguments.namespace)
    if again:
        remount(arguments.directory, read_only=options.read_only)
    else:
        mount(arguments.source, arguments.directory, options=options)
    if arguments.verbose:
        print(f"{arguments.source} is mounted on {Path(arguments.directory).absolute()}")


def main(argv: list[str] | None = None) -> int:
    """Run the helper and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        _run(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Fs3Error as e:
        print(f"mount.fs3: {e.message}", file=sys.stderr)
        return WRONG_USAGE if e.code == Code.CODE_INVALID_ARGUMENT else FAILED
    except OSError as e:
        print(f"mount.fs3: {e.filename or arguments.directory}: {e.strerror or e}", file=sys.stderr)
        return FAILED
    return 0
