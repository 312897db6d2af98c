"""TCP ports for services that keep theirs over restarts."""

from __future__ import annotations

import random
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from fs3.core.errors import error
from fs3.v1.frame_pb2 import Code

# What the kernel gives to connections and to listeners that name no port.
EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
EPHEMERAL_DEFAULT = (32768, 60999)
# Below are the well-known ports of programs that may not run just now.
LASTING_FIRST = 10000
PORT_LAST = 65535


def lasting_ports(count: int) -> list[int]:
    """`count` different ports of 127.0.0.1 that nobody listens on now, outside the ephemeral range.

    A port of the ephemeral range may become the local end of any connection between the choice and the bind, and
    while its service is down. Chosen at random, so that clusters made at the same time hardly meet.
    Raises UNAVAILABLE.
    """
    first, last = _ephemeral()
    candidates = [*range(LASTING_FIRST, first), *range(last + 1, PORT_LAST + 1)]
    if len(candidates) < count:
        # Nearly all is ephemeral here: what cannot be avoided is accepted.
        candidates = list(range(LASTING_FIRST, PORT_LAST + 1))
    return _unused(random.sample(candidates, len(candidates)), count)


def _ephemeral() -> tuple[int, int]:
    try:
        first, last = EPHEMERAL_RANGE.read_text().split()
    except OSError:
        return EPHEMERAL_DEFAULT
    return int(first), int(last)


def _unused(candidates: Sequence[int], count: int) -> list[int]:
    ports: list[int] = []
    with ExitStack() as held:
        for port in candidates:
            if len(ports) == count:
                return ports
            probe = held.enter_context(socket.socket())
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
    if len(ports) == count:
        return ports
    raise error(Code.CODE_UNAVAILABLE, f"{len(ports)} ports of 127.0.0.1 are free and {count} are needed")
