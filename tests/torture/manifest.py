"""What was acknowledged, written down outside the cluster: one append-only file of JSON lines per slotted file.

A line is in the kernel before the next operation starts, so it outlives kill -9 of its writer; what a sync made
durable is itself synced, so that it outlives the machine that runs the campaign.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Journal:
    """An append-only file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, *lines: object) -> None:
        """Append."""
        os.write(self._descriptor, b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    def sync(self) -> None:
        """Make it survive anything."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)


def lines(path: Path) -> list[Any]:
    """What a journal holds; a line that a kill cut off is left out."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith(b"\n")]


@dataclass
class SlotRecord:
    """What is known of a slot."""

    issued: int = 0
    acknowledged: tuple[int, int] = (0, 0)
    synced: int = 0
    # Writes that failed: such a write may take effect later, or never.
    failed: set[int] = field(default_factory=set)

    def floor(self, epoch: int) -> int:
        """The oldest version that may be there in this epoch of the power."""
        return max(self.synced, self.acknowledged[1] if self.acknowledged[0] == epoch else 0)

    def open_versions(self) -> set[int]:
        """Versions whose outcome was not recorded, because the writer was killed."""
        last = max(self.acknowledged[1], self.synced, *self.failed, 0)
        return set(range(last + 1, self.issued + 1))


class Manifest:
    """The manifest of one file. Its writer adds, everybody may replay."""

    def __init__(self, path: Path) -> None:
        self._journal = Journal(path)

    def issue(self, slot: int, version: int) -> None:
        """Before a write is sent."""
        self._journal.add(["I", slot, version])

    def acknowledge(self, slot: int, version: int, epoch: int) -> None:
        """After it was acknowledged, within an epoch of the power."""
        self._journal.add(["A", slot, version, epoch])

    def fail(self, slot: int, version: int) -> None:
        """After an error."""
        self._journal.add(["F", slot, version])

    def sync(self, versions: dict[int, int]) -> None:
        """After a sync made these versions of slots durable."""
        self._journal.add(*(["S", slot, version] for slot, version in versions.items()))
        self._journal.sync()

    def close(self) -> None:
        """Close it."""
        self._journal.close()


def replay(path: Path) -> dict[int, SlotRecord]:
    """What a manifest says, by slot."""
    slots: dict[int, SlotRecord] = {}
    for line in lines(path):
        record = slots.setdefault(line[1], SlotRecord())
        version = line[2]
        match line[0]:
            case "I":
                record.issued = version
            case "A":
                record.acknowledged = (line[3], version)
            case "F":
                record.failed.add(version)
            case "S":
                record.synced = version
    return slots
