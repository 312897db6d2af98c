"""A short campaign: `make fsx` is the long one. And that the checker fails when it has to."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fsx.campaign import BINARY, Trial, fsx, two_mounts

SEED = int(os.environ.get("FS3_FSX_SEED", "1"))
PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two mounts of one cluster."""
    with two_mounts(tmp_path_factory.mktemp("fsx")) as both:
        yield both


@pytest.mark.parametrize(
    "trial",
    [
        Trial("alone", 4000, jobs=2),
        Trial("two-mounts", 2000, two_mounts=True),
        Trial("shared", 2000, jobs=2, shared=True),
    ],
    ids=lambda trial: trial.name,
)
def test_files_hold_what_memory_would(mounts: tuple[Path, Path], tmp_path: Path, trial: Trial) -> None:
    done = fsx(trial.argv(*mounts, SEED, tmp_path / "log"), timeout_s=PATIENCE_S)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert done.stdout.count("operations agree") == trial.jobs


def test_a_byte_that_another_process_flips_is_found(tmp_path: Path) -> None:
    path, log = tmp_path / "file", tmp_path / "log"
    argv = [str(BINARY), str(path), "--ops", "100000000", "--seed", "7", "--log", str(log)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + PATIENCE_S
        while child.poll() is None and time.monotonic() < deadline:
            if path.exists() and (size := path.stat().st_size):
                with path.open("r+b") as file:
                    old = os.pread(file.fileno(), 1, size // 2)
                    if old:
                        os.pwrite(file.fileno(), bytes([old[0] ^ 1]), size // 2)
        child.kill()
        output = child.communicate()[0]
    assert child.returncode == 1
    assert "FAILED: seed 7, operation " in output
    again = fsx([str(BINARY), str(path), "--replay", str(log)], timeout_s=PATIENCE_S)
    assert again.returncode == 0, f"without the other process all agrees: {again.stdout}"


def test_mounts_that_do_not_show_the_same_file_are_found_and_the_sequence_is_made_short(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    argv = [str(BINARY), str(tmp_path / "one"), "--second", str(tmp_path / "other"), "--seed", "3", "--shrink"]
    done = fsx([*argv, "--log", str(tmp_path / "log")], timeout_s=PATIENCE_S)
    assert done.returncode == 1
    assert "fails, 1 operations" in done.stdout
    assert (tmp_path / "log.short").read_text().splitlines()[0] == "# seed 3"


def test_bad_arguments_say_what_is_wrong(tmp_path: Path) -> None:
    done = fsx([str(BINARY), str(tmp_path / "f"), "--without", "zeros"], timeout_s=PATIENCE_S)
    assert done.returncode == 2
    assert "no operation is called" in done.stderr
