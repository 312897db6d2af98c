"""GetPrimary: who is primary, answered by every manager."""

from __future__ import annotations

from fs3.v1.disk_mgmtd_pb2 import ManagerLease
from fs3.v1.mgmtd_pb2 import GetPrimaryResponse


def get_primary(seen: ManagerLease, cluster_id: str) -> GetPrimaryResponse:
    """Say what the lease record said when it was last read; an empty address when nobody is known to be primary."""
    address = "" if seen.released else seen.address
    return GetPrimaryResponse(address=address, epoch=seen.epoch, cluster_id=cluster_id)
