from __future__ import annotations

import ctypes
import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from fs3.core.errors import Fs3Error
from fs3.fuse import libfuse, python_engine
from fs3.fuse.options import MountOptions
from fs3.fuse.python_operations import groups_of, without_set_id
from fs3.fuse.python_session import fill_stat
from fs3.v1.frame_pb2 import Code
from fs3.v1.meta_pb2 import FileType

MODULES = ("fs3.fuse.libfuse", "fs3.fuse.python_session", "mfusepy")


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As before libfuse was looked for."""
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("fs3.fuse.libfuse", raising=False)
    monkeypatch.delattr("fs3.fuse.python_session", raising=False)
    return monkeypatch


def test_without_its_package_the_engine_says_what_to_install(unloaded: pytest.MonkeyPatch) -> None:
    unloaded.setitem(sys.modules, "mfusepy", None)
    with pytest.raises(Fs3Error, match=r"pip install 'fs3\[fusepy\]'") as caught:
        python_engine._session_module()
    assert caught.value.code == Code.CODE_NOT_SUPPORTED


def test_without_libfuse_the_engine_says_what_to_install(unloaded: pytest.MonkeyPatch) -> None:
    unloaded.setenv("FUSE_LIBRARY_NAME", "no-such-library")
    with pytest.raises(Fs3Error, match="apt-get install fuse3") as caught:
        python_engine._session_module()
    assert caught.value.code == Code.CODE_NOT_SUPPORTED


def test_memory_bounds_the_threads() -> None:
    assert python_engine._threads(MountOptions()) == 16
    assert python_engine._threads(MountOptions(threads=5)) == 5
    assert python_engine._threads(MountOptions(threads=200, max_memory_bytes=32 << 20)) == 8


def test_options_reach_libfuse() -> None:
    options = MountOptions(allow_other=True, read_only=True, default_permissions=False, exec=False)
    arguments = python_engine._arguments(options, "fs3://a:1,b:2/")
    assert arguments == [b"fs3", b"-o", rb"fsname=fs3://a:1\,b:2/,subtype=fs3,allow_other,ro,noexec"]


def attr(**values: Any) -> Any:
    known = {
        "inode": 9, "type": FileType.FILE_TYPE_FILE, "mode": 0o640, "uid": 1, "gid": 2, "nlink": 3, "length": 5000,
        "rdev": 0, "atime_ns": -1, "mtime_ns": 2_000_000_003, "ctime_ns": 4, "layout": None, "symlink_target": b"",
    }  # fmt: skip
    return SimpleNamespace(**{**known, **values})


def shown(**values: Any) -> libfuse.c_stat:
    st = libfuse.c_stat()
    fill_stat(st, attr(**values))
    return st


def test_attributes_are_those_of_the_kernel() -> None:
    st = shown()
    assert (st.st_ino, st.st_mode, st.st_uid, st.st_gid, st.st_nlink) == (9, 0o100640, 1, 2, 3)
    assert (st.st_size, st.st_blocks) == (5000, 10)
    assert (st.st_atimespec.tv_sec, st.st_atimespec.tv_nsec) == (-1, 999_999_999)
    assert (st.st_mtimespec.tv_sec, st.st_mtimespec.tv_nsec) == (2, 3)
    link = shown(type=FileType.FILE_TYPE_SYMLINK, symlink_target=b"a/b", length=0, mode=0o777)
    assert (link.st_size, link.st_mode) == (3, 0o120777)
    large = shown(length=(1 << 20) + 1, layout=SimpleNamespace(chunk_bytes=1 << 20))
    assert large.st_blocks * 512 < large.st_size, "programs look for holes in files that use less than their length"


def test_structures_are_as_large_as_those_of_the_system() -> None:
    assert ctypes.sizeof(libfuse.fuse_ctx) == 16
    assert ctypes.sizeof(libfuse.fuse_lowlevel_ops) == len(libfuse.OPERATIONS) * ctypes.sizeof(ctypes.c_void_p)
    assert ctypes.sizeof(libfuse.fuse_entry_param) == 32 + ctypes.sizeof(libfuse.c_stat)


def test_groups_are_those_of_the_process() -> None:
    assert groups_of(os.getpid()) == os.getgroups()
    assert groups_of(1 << 30) == []


def test_a_write_leaves_set_group_id_where_the_group_does_not_execute() -> None:
    assert [without_set_id(mode) for mode in (0o6777, 0o6767, 0o644)] == [0o777, 0o2767, 0o644]
