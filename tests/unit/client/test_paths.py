"""Paths and modes as users give them."""

from __future__ import annotations

import io
import os
from pathlib import PurePosixPath

import pytest

from fs3.client.file import check_arguments, parse_mode
from fs3.client.paths import current_umask, join, to_service


@pytest.mark.parametrize(
    ("base", "path", "expected"),
    [
        (b"", "/", b""),
        (b"", "", b""),
        (b"", "/a/b", b"a/b"),
        (b"", "a/b/", b"a/b"),
        (b"", b"/\xff", b"\xff"),
        (b"", PurePosixPath("/a"), b"a"),
        (b"", "ä", "ä".encode()),
        (b"base/dir", "/", b"base/dir"),
        (b"base", "/x", b"base/x"),
    ],
)
def test_paths_start_at_the_base(base: bytes, path: str, expected: bytes) -> None:
    assert to_service(base, path) == expected


def test_a_nul_byte_is_refused_as_os_does() -> None:
    with pytest.raises(ValueError, match="embedded null byte"):
        to_service(b"", "a\0b")


def test_names_that_are_not_utf8_survive() -> None:
    assert to_service(b"", join("/d", os.fsdecode(b"\xff\xfe"))) == b"d/\xff\xfe"


def test_the_umask_is_found_without_changing_it() -> None:
    old = os.umask(0o027)
    try:
        assert current_umask() == 0o027
    finally:
        os.umask(old)


@pytest.mark.parametrize("mode", ["r", "w", "a", "x", "r+", "w+", "a+", "x+", "rb", "wb+", "+br", "rt", "tw"])
def test_modes_mean_what_open_makes_of_them(mode: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("mode") / "f"
    if "x" not in mode:
        path.write_text("x")
    parsed = parse_mode(mode)
    with open(path, mode) as file:
        assert (parsed.reads, parsed.writes) == (file.readable(), file.writable())
        assert parsed.binary != isinstance(file, io.TextIOBase)


@pytest.mark.parametrize("mode", ["", "b", "rw", "rr", "U", "rbt", "q", "r++", "+"])
def test_bad_modes_are_refused_as_open_does(mode: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_mode(mode)
    with pytest.raises(ValueError, match=r"."), open(os.devnull, mode):
        pass


def test_arguments_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="unbuffered text"):
        check_arguments(parse_mode("r"), 0, None, None, None)
    with pytest.raises(ValueError, match="encoding"):
        check_arguments(parse_mode("rb"), -1, "utf-8", None, None)
    check_arguments(parse_mode("rb"), 0, None, None, None)
