from __future__ import annotations

import pytest

from fs3.core.errors import Fs3Error
from fs3.fuse.options import MountOptions, parse_address, parse_id_map, parse_options
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
    assert parse_options("max_memory=1GiB").max_memory_bytes == 1 << 30
    assert parse_options("metrics_port=9100").metrics == "127.0.0.1:9100"
    assert not parse_options("noexec").exec


def test_options_of_other_programs_in_an_fstab_line_are_passed_over() -> None:
    line = (
        "defaults,_netdev,nofail,noauto,user=anna,x-systemd.automount,x-systemd.idle-timeout=60,X-own.thing,comment=a"
    )
    assert parse_options(line) == MountOptions()


def test_a_cache_that_is_not_auto_keeps_no_attributes_whatever_the_timeouts_say() -> None:
    assert parse_options("").attr_timeout_s == 1.0
    for cache in ("strict", "none"):
        options = parse_options(f"cache={cache},attr_timeout_s=5")
        assert (options.attr_timeout_s, options.entry_timeout_s) == (0.0, 0.0)


def test_id_maps_may_be_given_at_once_or_one_by_one() -> None:
    at_once = parse_options("uidmap=1000:0:1/2000:500:10,gidmap=0:0:1")
    assert at_once == parse_options("uidmap=1000:0:1,gidmap=0:0:1,uidmap=2000:500:10")
    assert parse_id_map(at_once.uidmap) == [(1000, 0, 1), (2000, 500, 10)]
    assert parse_options("uid=33,gid=0") == MountOptions(uid=33, gid=0)


def test_an_address_has_a_host_and_a_port() -> None:
    assert parse_address("[::1]:80") == ("::1", 80)
    assert parse_address("localhost:9100") == ("localhost", 9100)


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
        ("cache=always", "cache must be one of auto, strict, none"),
        ("subdir=a/../b", "must not lead through '..'"),
        ("uid=-1", "uid must be in 0.."),
        ("uid=x", "uid is a number"),
        ("uidmap=1:2", "write LOCAL:CLUSTER:COUNT"),
        ("gidmap=1:2:0", "the count is at least 1"),
        ("gidmap=4294967295:0:1", "they are in 0.."),
        ("uid=1,uidmap=1:2:1", "exclude each other"),
        ("metrics=9100", "is not HOST:PORT"),
        ("metrics_port=x", "is not HOST:PORT"),
    ],
)
def test_a_wrong_option_is_named_with_what_to_write(text: str, hint: str) -> None:
    with pytest.raises(Fs3Error) as caught:
        parse_options(text)
    assert caught.value.code == Code.CODE_INVALID_ARGUMENT
    assert hint in caught.value.message
    assert "\n" not in caught.value.message


def test_an_engine_refuses_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_options("ro,noatime", engine="fusepy").engine == "fusepy"
    with pytest.raises(Fs3Error, match="engine must be one of native, fusepy, not 'fuse'"):
        parse_options("", engine="fuse")
    monkeypatch.setattr("fs3.fuse.options._FUSEPY_OPTIONS", frozenset({"engine"}))
    with pytest.raises(Fs3Error, match="the fusepy engine has no option noatime"):
        parse_options("noatime", engine="fusepy")
    assert parse_options("noatime").noatime
