"""A job that never ends its save, to be killed: ``python -m tests.workloads.killed_job URL PATH``.

The token is in FS3_TOKEN.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import fs3
from fs3 import checkpoint


class Stuck(dcp.DefaultSavePlanner):
    """A planner that keeps the last tensor back for ever, and says so."""

    def resolve_data(self, write_item: Any) -> Any:
        if write_item.index.fqn == "last":
            print("stuck", flush=True)
            threading.Event().wait()
        return super().resolve_data(write_item)


if __name__ == "__main__":
    state = {f"tensor-{number}": torch.ones(4 << 20) for number in range(5)} | {"last": torch.ones((4 << 20) + 1)}
    checkpoint.save(state, fs3.connect(sys.argv[1]), sys.argv[2], planner=Stuck())
