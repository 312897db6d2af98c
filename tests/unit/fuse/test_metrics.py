from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request

import pytest

from fs3.fuse.metrics import render, serve_metrics
from fs3.testing.ports import lasting_ports

STATS = {
    "mountpoint": '/mnt/a "b"\n',
    "uptime_s": 1.5,
    "bytes_read": 7,
    "open_files": 2,
    "operations": {"read": {"count": 3, "total_s": 0.25, "max_s": 0.125}},
}


def test_counters_are_totals_and_the_rest_gauges() -> None:
    lines = render(STATS).splitlines()
    where = 'mountpoint="/mnt/a \\"b\\"\\n"'
    assert f"fs3_mount_uptime_seconds{{{where}}} 1.5" in lines
    assert f"fs3_mount_bytes_read_total{{{where}}} 7" in lines
    assert "# TYPE fs3_mount_open_files gauge" in lines
    assert f'fs3_mount_requests_total{{{where},operation="read"}} 3' in lines
    assert f'fs3_mount_request_seconds_max{{{where},operation="read"}} 0.125' in lines
    assert len(lines) == len(set(lines))


def test_they_are_served_until_the_end_and_only_where_they_should() -> None:
    [port] = lasting_ports(1)
    end = serve_metrics(("127.0.0.1", port), lambda: json.dumps(STATS))
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            assert answer.read().decode() == render(STATS)
        with pytest.raises(urllib.error.HTTPError) as other:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10)
        assert other.value.code == 404
        with pytest.raises(OSError, match="in use"):
            serve_metrics(("127.0.0.1", port), lambda: "{}")
    finally:
        end()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
