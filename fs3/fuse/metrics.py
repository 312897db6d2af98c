"""Counters of a mount over HTTP, in the text format of Prometheus."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REQUEST_TIMEOUT_S = 10

# What is no total since the start.
_GAUGES = frozenset(
    ["uptime_s", "read_buffer_bytes", "write_buffer_bytes", "max_memory_bytes", "open_files", "open_directories"]
)


def _name(key: str) -> str:
    if key == "uptime_s":
        return "fs3_mount_uptime_seconds"
    return f"fs3_mount_{key}" + ("" if key in _GAUGES else "_total")


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _lines(stats: dict[str, Any]) -> Iterator[str]:
    where = f"mountpoint={_quoted(stats['mountpoint'])}"
    for key, value in stats.items():
        if isinstance(value, int | float):
            yield f"# TYPE {_name(key)} {'gauge' if key in _GAUGES else 'counter'}"
            yield f"{_name(key)}{{{where}}} {value}"
    of_operations = (
        ("requests_total", "counter", "count"),
        ("request_seconds_total", "counter", "total_s"),
        ("request_seconds_max", "gauge", "max_s"),
    )
    for name, kind, field in of_operations:
        yield f"# TYPE fs3_mount_{name} {kind}"
        for operation, counts in stats["operations"].items():
            yield f"fs3_mount_{name}{{{where},operation={_quoted(operation)}}} {counts[field]}"


def render(stats: dict[str, Any]) -> str:
    """What `3fs-virt/stats` has, as Prometheus reads it."""
    return "\n".join(_lines(stats)) + "\n"


def serve_metrics(address: tuple[str, int], snapshot: Callable[[], str]) -> Callable[[], None]:
    """Answer GET /metrics at `address` from threads of this process; `snapshot` gives the text of the JSON object.

    Returns a function that ends it. Raises OSError when the address cannot be used.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = REQUEST_TIMEOUT_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "there is /metrics")
                return
            body = render(json.loads(snapshot())).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # the other end has gone

    server = Server(address, Handler)
    thread = threading.Thread(target=server.serve_forever, name="fs3-mount-metrics", daemon=True)
    thread.start()

    def end() -> None:
        server.shutdown()
        server.server_close()

    return end
