import os
import socket
import struct
from pathlib import Path

import pytest

from fs3.core.errors import Fs3Error, error
from fs3.fuse.handover import Door, Predecessor
from fs3.testing.process import wait_until
from fs3.v1.frame_pb2 import Code

CLIENT = bytes(range(16))


class FakeMount:
    """Notes what is asked of it. `refuses`: it cannot be handed over."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.calls: list[str] = []

    def hand_over(self, successor: bytes) -> tuple[bytes, list[int]]:
        self.calls.append(f"hand over to {successor.hex()}")
        if self.refuses:
            raise error(Code.CODE_BUSY, "requests did not end")
        return b'{"format": 1}', [os.open("/dev/null", os.O_RDONLY), os.open("/dev/zero", os.O_RDONLY)]

    def take_back(self, successor: bytes) -> None:
        self.calls.append(f"take back from {successor.hex()}")

    def depart(self) -> None:
        self.calls.append("depart")

    def open(self) -> None:
        self.calls.append("open")

    def close(self) -> None:
        self.calls.append("close")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A socket whose whole name would be too long for the system."""
    directory = tmp_path / ("d" * 120)
    directory.mkdir()
    return directory / "door.sock"


def door(path: Path, mount: FakeMount) -> Door:
    return Door(path, lambda: '{"mountpoint": "/mnt"}', mount, mount)


def test_a_successor_gets_the_parameters_the_state_and_the_devices(path: Path) -> None:
    mount = FakeMount()
    opened = door(path, mount)
    try:
        with Predecessor(path) as predecessor:
            assert predecessor.parameters() == {"mountpoint": "/mnt"}
            state, (null, zero) = predecessor.hand_over(CLIENT)
            assert (state, os.read(null, 1), os.read(zero, 1)) == (b'{"format": 1}', b"", b"\0")
            os.close(null)
            os.close(zero)
            predecessor.depart()
        wait_until(lambda: mount.calls[-1] == "depart", timeout_s=30, what="the departure")
    finally:
        opened.close()
    assert mount.calls == [f"hand over to {CLIENT.hex()}", "close", "depart"]
    assert not path.exists()


def test_a_successor_that_goes_away_leaves_everything_as_it_was(path: Path) -> None:
    mount = FakeMount()
    opened = door(path, mount)
    try:
        with Predecessor(path) as predecessor:
            for descriptor in predecessor.hand_over(CLIENT)[1]:
                os.close(descriptor)
        wait_until(lambda: mount.calls[-1] == "open", timeout_s=30, what="the mount to be taken back")
        assert mount.calls[1:] == ["close", f"take back from {CLIENT.hex()}", "open"]
        with Predecessor(path) as predecessor:
            assert predecessor.parameters()
    finally:
        opened.close()


def test_a_successor_that_cannot_hear_the_answer_does_not_get_the_mount(path: Path) -> None:
    mount = FakeMount()
    opened = door(path, mount)
    try:
        with Predecessor(path) as predecessor:
            for descriptor in predecessor.hand_over(CLIENT)[1]:
                os.close(descriptor)
            predecessor._channel.shutdown(socket.SHUT_RD)
            with pytest.raises(Fs3Error, match="has ended"):
                predecessor.depart()
            wait_until(lambda: mount.calls[-1] == "open", timeout_s=30, what="the mount to be taken back")
        assert not opened.departed
    finally:
        opened.close()
    assert mount.calls[1:] == ["close", f"take back from {CLIENT.hex()}", "open"]


def test_a_mount_is_not_served_without_the_answer_of_its_predecessor(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        directory = os.open(path.parent, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
        os.close(directory)
        listener.listen()
        with Predecessor(path) as predecessor:
            listener.accept()[0].close()
            with pytest.raises(Fs3Error) as refused:
                predecessor.depart()
    assert refused.value.code == Code.CODE_UNAVAILABLE


def test_a_refusal_reaches_the_successor(path: Path) -> None:
    opened = door(path, FakeMount(refuses=True))
    try:
        with Predecessor(path) as predecessor, pytest.raises(Fs3Error, match="requests did not end") as refused:
            predecessor.hand_over(CLIENT)
        assert refused.value.code == Code.CODE_BUSY
    finally:
        opened.close()


def test_nonsense_does_no_harm(path: Path) -> None:
    mount = FakeMount()
    opened = door(path, mount)
    try:
        for nonsense in (b"\0", struct.pack("!I", 1 << 31), struct.pack("!I", 2) + b"[]", struct.pack("!I", 9) + b"{}"):
            with socket.socket(socket.AF_UNIX) as channel:
                directory = os.open(path.parent, os.O_RDONLY)
                channel.connect(f"/proc/self/fd/{directory}/{path.name}")
                os.close(directory)
                channel.sendall(nonsense)
                channel.shutdown(socket.SHUT_WR)
                assert channel.recv(100) == b""
        with Predecessor(path) as predecessor:
            assert predecessor.parameters()
    finally:
        opened.close()
    assert mount.calls == []


def test_the_socket_of_a_successor_is_left_alone(path: Path) -> None:
    old, new = door(path, FakeMount()), door(path, FakeMount())
    old.close()
    try:
        with Predecessor(path) as predecessor:
            assert predecessor.parameters()
    finally:
        new.close()


def test_nobody_listens(path: Path) -> None:
    with pytest.raises(Fs3Error, match="no daemon that hands over"):
        Predecessor(path)
