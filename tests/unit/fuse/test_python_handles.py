from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

from fs3.fuse.python_handles import (
    FIRST_ENTRY,
    TELL_CLOSE,
    TELL_SYNC,
    TELL_WRITE,
    Directory,
    OpenFiles,
    Recent,
    Version,
)

PAGE = 3


def fake_file(inode: int) -> Any:
    return SimpleNamespace(inode=inode)


def listed(directory: Directory, names: list[bytes], offset: int = FIRST_ENTRY) -> list[tuple[int, bytes]]:
    """List `names` from `offset` on with pages of three entries: (offset, name) of each."""
    seen = []
    while True:
        there = directory.at(offset, False)
        if isinstance(there, tuple):
            first, after = there
            rest = [name for name in names if name > after]
            page: list[Any] = [SimpleNamespace(name=name) for name in rest[:PAGE]]
            directory.fill(first, after, page, len(rest) <= PAGE, False)
            continue
        if not there:
            return seen
        for entry in there:
            seen.append((offset, entry.name))
            offset += 1


def test_every_offset_of_a_directory_continues_where_it_was() -> None:
    names = [b"%02d" % n for n in range(10)]
    whole = listed(Directory(7), names)
    assert whole == [(FIRST_ENTRY + n, name) for n, name in enumerate(names)]
    directory = Directory(7)
    listed(directory, names)
    for offset, _ in reversed(whole):
        assert listed(directory, names, offset) == whole[offset - FIRST_ENTRY :]


def test_entries_that_go_while_a_directory_is_read_do_not_hide_others() -> None:
    names = [b"%02d" % n for n in range(10)]
    directory = Directory(7)
    first = directory.at(FIRST_ENTRY, False)
    assert first == (FIRST_ENTRY, b"")
    directory.fill(FIRST_ENTRY, b"", [SimpleNamespace(name=n) for n in names[:PAGE]], False, False)  # type: ignore[misc]
    rest = listed(directory, names[PAGE:], FIRST_ENTRY + PAGE)
    assert [name for _, name in rest] == names[PAGE:]


def test_an_empty_page_ends_a_directory_whatever_the_service_says() -> None:
    directory = Directory(7)
    directory.fill(FIRST_ENTRY, b"", [], False, False)
    assert directory.at(FIRST_ENTRY, False) == []


def test_the_kernel_keeps_its_cache_only_of_a_file_that_is_as_it_was() -> None:
    files, version = OpenFiles(), Version(5, 1, 1, 0)
    assert not files.keep_cache(9, version)
    assert files.keep_cache(9, version)
    assert not files.keep_cache(9, Version(5, 2, 2, 0))
    number = files.add(fake_file(9), write=True, sync=False)
    handle = files.get(number)
    assert handle is not None
    with files.writing(handle):
        assert not files.keep_cache(9, version)
    assert not files.keep_cache(9, version), "the service does not know of it yet"
    files.published(handle.node, float("inf"))
    assert not files.keep_cache(9, version)
    assert files.keep_cache(9, version)


def test_a_write_that_ends_while_others_are_published_is_published_later() -> None:
    files = OpenFiles()
    handle = files.get(files.add(fake_file(9), write=True, sync=False))
    assert handle is not None
    before_s = time.monotonic()
    with files.writing(handle):
        pass
    files.published(handle.node, before_s)
    assert [node for node, _ in files.unpublished(0.0)] == [handle.node]
    files.published(handle.node, float("inf"))
    assert files.unpublished(0.0) == []


def test_a_failed_write_is_told_once_by_each_call_that_tells_more() -> None:
    files = OpenFiles()
    handle = files.get(files.add(fake_file(9), write=True, sync=False))
    assert handle is not None
    try:
        with files.writing(handle):
            raise OSError(5, "no")
    except OSError:
        pass
    assert handle.new_failure(TELL_WRITE) is not None
    assert handle.new_failure(TELL_WRITE) is None
    assert handle.new_failure(TELL_CLOSE) is not None
    assert handle.new_failure(TELL_SYNC) is not None
    assert handle.new_failure(TELL_SYNC) is None
    later = files.get(files.add(fake_file(9), write=True, sync=False))
    assert later is not None
    assert later.new_failure(TELL_SYNC) is None, "earlier failures have nothing to do with a new handle"


def test_only_the_latest_values_are_remembered_and_not_for_ever() -> None:
    recent: Recent[int, str] = Recent(2)
    for number in range(3):
        recent.put(number, str(number))
    assert [recent.get(number) for number in range(3)] == [None, "1", "2"]
    stale: Recent[int, str] = Recent(2, 0.0)
    stale.put(1, "1")
    assert stale.get(1) is None


def test_a_node_goes_with_its_last_handle() -> None:
    files = OpenFiles()
    one, other = (files.add(fake_file(9), write=True, sync=False) for _ in range(2))
    files.remove(one)
    assert files.node(9) is not None
    assert files.remove(one) is None
    files.remove(other)
    assert files.node(9) is None
