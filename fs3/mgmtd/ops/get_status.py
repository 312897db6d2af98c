"""GetStatus: what the primary counts."""

from __future__ import annotations

from fs3.mgmtd.manager import Manager
from fs3.v1.mgmtd_pb2 import ManagerStatus


def get_status(manager: Manager) -> ManagerStatus:
    """Tell what this primary counted since it took over."""
    return ManagerStatus(routing_sent=manager.teller.sent)
