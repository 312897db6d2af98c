"""A successor of a mount's daemon that stops at one step: `successor.py MOUNTPOINT STEP`, until it is killed.

It is the daemon that `fs3 mount --takeover` starts, and says STEP when it is there. It ends with its standard input.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys

from fs3.fuse import serve
from fs3.fuse.handover import Predecessor, _send
from fs3.fuse.table import real_path

# Its predecessor serves on when it dies at one of these,
BEFORE = ("asks", "holds", "ready")
# and the mount is its own at these.
AFTER = ("asked", "left", "serves")


def stop(step: str) -> None:
    """Stay here for ever if this is the step."""
    if step == sys.argv[2]:
        print(step, flush=True)
        sys.stdin.read()
        os._exit(1)


class Stopping(Predecessor):
    """Stops between what is said to it."""

    def hand_over(self, successor: bytes) -> tuple[bytes, list[int]]:
        stop("asks")
        state, descriptors = super().hand_over(successor)
        stop("holds")
        return state, descriptors

    def depart(self) -> None:
        stop("ready")
        if sys.argv[2] == "asked":
            _send(self._channel, {"ask": "depart"})
        stop("asked")
        super().depart()
        stop("left")


def main() -> int:
    with Predecessor(serve.door_file(real_path(sys.argv[1]))) as predecessor:
        old = serve.Parameters.from_json(json.dumps(predecessor.parameters()))
    serve.Predecessor = Stopping  # type: ignore[misc]
    return serve.serve(dataclasses.replace(old, takeover=True), lambda: stop("serves"))


if __name__ == "__main__":
    sys.exit(main())
