"""Comparing what the replicas of every chain hold."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

from fs3 import native
from fs3.client import FileSystem

# How long replicas have to become equal, and how often is looked.
EQUAL_S = 30.0
LOOK_S = 0.2


@dataclass
class ReplicaReport:
    """`chunks` distinct chunks, on at least `replicas` replicas each; one line per difference."""

    chunks: int = 0
    replicas: int = 0
    differences: list[str] = field(default_factory=list)


def _content(replica: native.Replica) -> dict[bytes, tuple[int, int, int]]:
    """Committed version, length and checksum by chunk."""
    return {c.chunk_id: (c.committed_version, c.length, c.chunk_crc32c) for c in replica.chunks if c.committed_version}


def compare_replicas(fs: FileSystem) -> ReplicaReport:
    """List every target of every chain and compare versions, lengths and checksums chunk by chunk.

    Call it while nothing is being written or removed. Raises Fs3Error UNAVAILABLE when a target cannot be listed.
    """
    chains: dict[int, list[native.Replica]] = defaultdict(list)
    for replica in fs.list_replicas():
        chains[replica.chain_id].append(replica)
    report = ReplicaReport(replicas=min((len(replicas) for replicas in chains.values()), default=0))
    for chain_id, replicas in sorted(chains.items()):
        contents = [_content(r) for r in replicas]
        for chunk_id in sorted(set().union(*contents)):
            report.chunks += 1
            held = {r.target_id: content.get(chunk_id) for r, content in zip(replicas, contents, strict=True)}
            if len(set(held.values())) > 1:
                report.differences.append(f"chain {chain_id}, chunk {chunk_id.hex()}: {held}")
        for replica in replicas:
            report.differences += [
                f"chain {chain_id}, target {replica.target_id}: chunk {c.chunk_id.hex()} has a pending version"
                for c in replica.chunks
                if c.pending_version
            ]
    return report


def compare_settled_replicas(fs: FileSystem) -> ReplicaReport:
    """As :func:`compare_replicas`, where files have been removed lately.

    Their chunks go from one replica after the other: what differs is looked at again, for up to EQUAL_S.
    """
    deadline = time.monotonic() + EQUAL_S
    while (report := compare_replicas(fs)).differences and time.monotonic() < deadline:
        time.sleep(LOOK_S)
    return report
