"""Errors keep everything they say when they travel."""

from __future__ import annotations

import pickle

from fs3.core.errors import Fs3Error, error
from fs3.v1.frame_pb2 import Code


def test_errors_are_pickled_whole() -> None:
    told = error(Code.CODE_NOT_FOUND, "gone", retryable=True, maybe_applied=True, routing_version=7, primary="h:1")
    told.filename, told.filename2 = "/a", b"/b"
    again = pickle.loads(pickle.dumps(told))
    assert type(again) is type(told)
    assert isinstance(again, FileNotFoundError)
    assert again.to_detail() == told.to_detail()
    assert str(again) == str(told) == "[Errno 2] gone: '/a' -> b'/b'"
    assert pickle.loads(pickle.dumps(Fs3Error(Code.CODE_INTERNAL, "x"))).filename is None
