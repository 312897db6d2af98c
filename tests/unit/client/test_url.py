"""URLs of clusters and where tokens come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from fs3.client.url import ClusterUrl, find_token, parse_url
from fs3.core.errors import Fs3Error
from fs3.v1.frame_pb2 import Code


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FS3_TOKEN", raising=False)
    monkeypatch.delenv("FS3_TOKEN_FILE", raising=False)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("fs3://h:1", ClusterUrl(("h:1",))),
        ("fs3://h:1/", ClusterUrl(("h:1",))),
        ("fs3://a:1,b:2,10.0.0.3:65535/x/y/", ClusterUrl(("a:1", "b:2", "10.0.0.3:65535"), "x/y")),
        ("fs3://[::1]:80/d%20e", ClusterUrl(("[::1]:80",), "d e")),
        ("fs3://h:007?token_file=/etc/t", ClusterUrl(("h:7",), "", "/etc/t")),
    ],
)
def test_urls_name_metas_a_base_and_a_token_file(url: str, expected: ClusterUrl) -> None:
    assert parse_url(url) == expected


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://h:1", "does not begin with fs3://"),
        ("h:1", "does not begin with fs3://"),
        ("fs3://", "not host:port"),
        ("fs3://h", "not host:port"),
        ("fs3://h:1,", "not host:port"),
        ("fs3://h:x", "not a number from 1 to 65535"),
        ("fs3://h:0", "not a number from 1 to 65535"),
        ("fs3://h:65536", "not a number from 1 to 65535"),
        ("fs3://::1:80", "in brackets"),
        ("fs3://user:secret@h:1", "token_file="),
        ("fs3://h:1/?tokenfile=x", "unknown option 'tokenfile'"),
        ("fs3://h:1/a#b", "%23"),
    ],
)
def test_a_bad_url_is_refused_with_the_reason_and_an_example(url: str, why: str) -> None:
    with pytest.raises(Fs3Error) as caught:
        parse_url(url)
    assert caught.value.code == Code.CODE_INVALID_ARGUMENT
    assert why in caught.value.message
    assert "fs3://host:port" in caught.value.message
    assert "secret" not in caught.value.message


def test_a_url_prints_without_the_token_file() -> None:
    assert str(parse_url("fs3://a:1,b:2/x?token_file=t")) == "fs3://a:1,b:2/x"


def test_the_token_comes_from_the_nearest_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_url, in_environment = tmp_path / "url", tmp_path / "environment"
    in_url.write_text("of the url\n")
    in_environment.write_text("of the file\n")
    plain = ClusterUrl(("h:1",))
    assert find_token(plain, None) == ""
    monkeypatch.setenv("FS3_TOKEN_FILE", str(in_environment))
    assert find_token(plain, None) == "of the file"
    monkeypatch.setenv("FS3_TOKEN", "of the variable")
    assert find_token(plain, None) == "of the variable"
    named = ClusterUrl(("h:1",), "", str(in_url))
    assert find_token(named, None) == "of the url"
    assert find_token(named, "given") == "given"
    assert find_token(named, "") == ""


def test_a_token_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="missing cannot be read: No such file"):
        find_token(ClusterUrl(("h:1",), "", str(tmp_path / "missing")), None)
