"""A short campaign against the local file system: `make posix-diff` is the long one."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.posix.campaign import SEED, campaign, reason_not_to_run
from tests.posix.compare import Side, drawn, run, shrunk

SECONDS = 30.0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_mount_does_what_the_local_file_system_does() -> None:
    if reason := reason_not_to_run():
        pytest.skip(reason)
    done, found = campaign(seed=SEED, seconds=SECONDS)
    assert found is None, f"{found}\nrepeat with: make posix-diff SEED={done.seed} SEEDS=1"
    assert done.operations > 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_difference_is_found_and_made_short() -> None:
    """Two local directories; in one of them, directories are made without set-id and sticky bits."""
    with ExitStack() as stack:
        # Other users have to get there; pytest's own directories are for one user.
        bases = [Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fs3-posix-"))) for _ in range(2)]
        for base in bases:
            base.chmod(0o755)
        one, other = (
            stack.enter_context(Side.open(name, base)) for name, base in zip(("one", "other"), bases, strict=True)
        )
        honest = other.perform
        other.perform = (
            lambda operation: honest(  # type: ignore[method-assign]
                [*operation[:-1], operation[-1] & 0o777] if operation[1] == "mkdir" else operation
            )
        )
        sides = (one, other)
        found = next(f for seed in range(1, 20) if (f := run(sides, drawn(seed, 60))))
        short = shrunk(sides, found)
        assert len(short.script) == 1
        assert short.script[0][1] == "mkdir"
        other.perform = honest  # type: ignore[method-assign]
        assert run(sides, drawn(1, 60)) is None
