"""Where the caches of the connectors' tests are."""

from __future__ import annotations

import os
from typing import Any

from fs3.testing.cluster import LocalCluster


def fresh_options(cluster: LocalCluster) -> dict[str, Any]:
    """Options of a connector for a namespace of its own; the token is in the environment."""
    return {"url": cluster.url, "namespace": f"/kv-{os.urandom(6).hex()}", "capacity": "64MiB"}
