"""The examples do what they say: a training run that is killed and started again goes on as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fs3
from fs3.testing.cluster import LocalCluster

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TRAIN = EXAMPLES / "train" / "train.py"
SEARCH = EXAMPLES / "embedding_search" / "search.py"
RUN_S = 240
# An epoch has 15 steps, and 16 samples are left over for the last: the run is killed in the second.
STEPS, SAVE_EVERY, KILLED_AT = 34, 4, 22


@pytest.fixture
def url(shared_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("FS3_TOKEN", shared_cluster.token)
    return f"{shared_cluster.url}examples"


def arguments(url: str, checkpoints: str) -> list[str]:
    return [
        *(sys.executable, str(TRAIN), url, "--samples", "1000", "--batch", "69", "--steps", str(STEPS)),
        *("--save-every", str(SAVE_EVERY), "--workers", "1", "--checkpoints", checkpoints),
    ]


def losses(text: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r"^step (\d+) loss (\S+)$", text, re.MULTILINE)}


def test_a_run_that_is_killed_and_resumed_has_the_same_losses(url: str, shared_cluster: LocalCluster) -> None:
    def run(checkpoints: str) -> str:
        return subprocess.run(
            arguments(url, checkpoints), stdout=subprocess.PIPE, text=True, timeout=RUN_S, check=True
        ).stdout

    whole = losses(run("/whole"))
    assert list(whole) == list(range(1, STEPS + 1))

    # In a session of its own, so that its readers can be killed with it.
    process = subprocess.Popen(arguments(url, "/killed"), stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    before = ""
    for line in process.stdout:
        before += line
        if line.startswith(f"step {KILLED_AT} "):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    killed = losses(before)
    assert killed == {step: whole[step] for step in killed}

    output = run("/killed")
    resumed = losses(output)
    saved = int(re.findall(r"resumed from /killed/step-(\d+)", output)[0])
    # The first checkpoint after it may have been on its way.
    assert KILLED_AT - 2 * SAVE_EVERY < saved <= KILLED_AT
    assert resumed == {step: whole[step] for step in range(saved + 1, STEPS + 1)}
    with fs3.connect(url) as fs:
        assert len(fs.listdir("/killed")) == 2


def test_embedding_search_finds_the_nearest(url: str) -> None:
    tiny = ("--vectors", "3000", "--dimensions", "32", "--lists", "16", "--queries", "40", "--probes", "4")
    output = subprocess.run(
        [sys.executable, str(SEARCH), f"{url}/search", *tiny],
        stdout=subprocess.PIPE,
        text=True,
        timeout=RUN_S,
        check=True,
    ).stdout
    assert output.startswith("3000 vectors of 32 numbers, 16 lists\nexact: ")
    recall = float(re.findall(r"^recall@10: (\S+)$", output, re.MULTILINE)[0])
    assert 0.6 < recall <= 1
