"""Ids as types of their own, so that a chain is never passed for a target."""

from __future__ import annotations

from typing import NewType

NodeId = NewType("NodeId", int)
"""A service process' node, numbered by the cluster manager from 1."""
TargetId = NewType("TargetId", int)
"""One replica of a chain on one disk: node id * TARGETS_PER_NODE_MAX + ordinal."""
ChainId = NewType("ChainId", int)
"""A replication chain, numbered from 1."""
InodeId = NewType("InodeId", int)
"""An inode; 1 is the root directory."""

TARGETS_PER_NODE_MAX = 1000
UUID_BYTES = 16


def target_id(node: NodeId, ordinal: int) -> TargetId:
    """Make the id of the `ordinal`-th target (0 ..) of a node."""
    if not 0 <= ordinal < TARGETS_PER_NODE_MAX:
        raise ValueError(f"target ordinal {ordinal} is not in 0..{TARGETS_PER_NODE_MAX - 1}")
    return TargetId(node * TARGETS_PER_NODE_MAX + ordinal)


def node_of(target: TargetId) -> NodeId:
    """Name the node that a target lives on."""
    return NodeId(target // TARGETS_PER_NODE_MAX)
