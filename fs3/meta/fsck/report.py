"""Findings, and how far an audit is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Final

# Findings that are kept with all they say; more are only counted.
FINDINGS_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `where` is a path or key; `repair` says what a repair does, "" when nothing can be done.

    ``bytes``: of chunks that nobody can read.
    """

    kind: str
    inode: int
    where: str
    problem: str
    repair: str = ""
    repaired: bool = False
    bytes: int = 0


class Report:
    """Grows while the audit runs. `unsettled`: things that changed so often that they could not be judged."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.counts: Counter[str] = Counter()
        self.unrepaired = 0
        self.unsettled = 0
        self.step = ""
        # Rows, or chunks, that the running step has looked at.
        self.looked_at = 0

    def begin(self, step: str) -> None:
        """Another step runs."""
        self.step, self.looked_at = step, 0

    def add(self, finding: Finding, *, repaired: bool) -> None:
        """Take a finding that was confirmed."""
        self.counts[finding.kind] += 1
        self.unrepaired += not repaired
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(replace(finding, repaired=repaired))
