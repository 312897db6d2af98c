"""Real clusters for the workloads, as in tests/cluster."""

from __future__ import annotations

from tests.cluster.conftest import cluster, make_cluster, shared_cluster

__all__ = ["cluster", "make_cluster", "shared_cluster"]
