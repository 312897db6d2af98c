"""File systems travel as the arguments they were connected with, and connect when they are used."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest

import fs3
from fs3.client.aio import AsyncFileSystem
from fs3.client.connection import Connection, connect_options
from fs3.client.filesystem import FileSystem
from fs3.core.config import RdmaOptions
from fs3.core.errors import Fs3Error

URL = "fs3://127.0.0.1:9,[::1]:9/a%20b"


def test_a_pickle_has_the_arguments_and_nothing_that_was_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "token").write_text("of-the-file")
    options = {"timeout_s": 3.5, "uid": 7, "rdma": RdmaOptions(), "transport": "tcp"}
    fs = FileSystem(Connection(connect_options(f"{URL}?token_file=token", **options)))
    data = pickle.dumps(fs)
    assert b"of-the-file" not in data
    # In another directory, with another token in the same file.
    monkeypatch.chdir("/")
    (tmp_path / "token").write_text("of-tomorrow")
    found = pickle.loads(data)
    assert isinstance(found, FileSystem)
    made = found._connection.options
    assert (made.token, made.timeout_s, made.uid, made.limits) == ("of-tomorrow", 3.5, 7, {"transport": "tcp"})
    assert made.url.metas == ("127.0.0.1:9", "[::1]:9")
    assert found.url == fs.url == "fs3://127.0.0.1:9,[::1]:9/a b"


def test_a_token_that_was_an_argument_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FS3_TOKEN", "of-the-environment")
    for kind in (FileSystem, AsyncFileSystem):
        for token, expected in (("secret", "secret"), (None, "of-the-environment")):
            fs = kind(Connection(connect_options(URL, token)))
            again = copy.copy(fs)
            assert type(again) is kind
            assert again._connection.options.token == expected
            assert (b"secret" in pickle.dumps(fs)) == (token is not None)
            assert "secret" not in repr(again._connection.options)


def test_the_url_of_the_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FS3_URL", "fs3://127.0.0.1:9/data")
    assert connect_options().url.base == "data"
    assert connect_options("fs3://h:1").url.metas == ("h:1",)
    monkeypatch.delenv("FS3_URL")
    with pytest.raises(Fs3Error, match="no URL was given and FS3_URL is not set"):
        fs3.connect()


def test_a_closed_file_system_that_never_connected_stays_closed() -> None:
    fs = FileSystem(Connection(connect_options(URL)))
    fs.close()
    with pytest.raises(Fs3Error, match="closed; connect again"):
        fs.exists("/")
