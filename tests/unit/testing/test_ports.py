"""Ports for services that keep theirs over restarts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from fs3.core.errors import Fs3Error
from fs3.testing import ports


def _ephemeral_is(monkeypatch: pytest.MonkeyPatch, directory: Path, text: str) -> None:
    path = directory / "range"
    path.write_text(text)
    monkeypatch.setattr(ports, "EPHEMERAL_RANGE", path)


def test_connections_cannot_take_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _ephemeral_is(monkeypatch, tmp_path, "10100\t65500\n")
    chosen = ports.lasting_ports(20)
    assert len(set(chosen)) == 20
    assert all(10000 <= port < 10100 or 65500 < port <= 65535 for port in chosen)


def test_ports_in_use_are_not_chosen() -> None:
    [taken, *free] = ports.lasting_ports(4)
    with socket.create_server(("127.0.0.1", taken)):
        assert ports._unused([taken, *free], 3) == free
        with pytest.raises(Fs3Error, match=r"3 ports of 127\.0\.0\.1 are free and 4 are needed"):
            ports._unused([taken, *free], 4)


def test_where_all_are_ephemeral_those_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _ephemeral_is(monkeypatch, tmp_path, "1024 65535\n")
    [port] = ports.lasting_ports(1)
    assert 10000 <= port <= 65535
