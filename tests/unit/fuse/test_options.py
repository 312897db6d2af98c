from __future__ import annotations

import pytest

from fs3.core.errors import Fs3Error
from fs3.fuse.options import MountOptions, parse_options, parse_url
from fs3.v1.frame_pb2 import Code


def test_mount_options_are_read_as_mount_writes_them() -> None:
    options = parse_options("ro,allow_other,threads=4,max-memory-bytes=64MiB,attr_timeout_s=0.5,_netdev,,dev=0")
    assert options == MountOptions(
        read_only=True, allow_other=True, threads=4, max_memory_bytes=64 << 20, attr_timeout_s=0.5
    )
    assert parse_options("") == MountOptions()
    assert parse_options("rw,nosuid", suid=True).suid
    assert parse_options("noatime").noatime
    assert not parse_options("noatime,relatime").noatime


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("allow_othr", "did you mean allow_other?"),
        ("zzz=1", "there are allow_other,"),
        ("threads=many", "threads is a number"),
        ("threads", "threads needs a value"),
        ("ro=maybe", "unknown mount option 'ro'"),
        ("suid=maybe", "suid is a switch"),
        ("threads=-1", "threads must be in 0..256"),
        ("max_memory_bytes=1", "at least 16MiB"),
        ("attr_timeout_s=nan", "attr_timeout_s must be a number of seconds"),
        ("op_timeout_s=0", "op_timeout_s must be a number of seconds"),
        ("transport=udp", "transport must be one of auto, tcp, rdma"),
        ("rdma=mtu", "write --rdma key=value"),
    ],
)
def test_a_wrong_option_is_named_with_what_to_write(text: str, hint: str) -> None:
    with pytest.raises(Fs3Error) as caught:
        parse_options(text)
    assert caught.value.code == Code.CODE_INVALID_ARGUMENT
    assert hint in caught.value.message
    assert "\n" not in caught.value.message


def test_a_url_names_the_meta_services() -> None:
    assert parse_url("fs3://a:1,b.example:22/") == ["a:1", "b.example:22"]
    assert parse_url("fs3://[::1]:9") == ["[::1]:9"]


@pytest.mark.parametrize(
    "url", ["", "a:1", "fs3://", "fs3:///x", "fs3://a", "fs3://a:b/", "fs3://a:0", "fs3://a:1/dir"]
)
def test_what_is_not_the_url_of_a_whole_cluster_is_refused(url: str) -> None:
    with pytest.raises(Fs3Error) as caught:
        parse_url(url)
    assert caught.value.code == Code.CODE_INVALID_ARGUMENT


def test_an_engine_refuses_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_options("ro,noatime", engine="fusepy").engine == "fusepy"
    with pytest.raises(Fs3Error, match="engine must be one of native, fusepy, not 'fuse'"):
        parse_options("", engine="fuse")
    monkeypatch.setattr("fs3.fuse.options._FUSEPY_OPTIONS", frozenset({"engine"}))
    with pytest.raises(Fs3Error, match="the fusepy engine has no option noatime"):
        parse_options("noatime", engine="fusepy")
    assert parse_options("noatime").noatime
