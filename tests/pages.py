"""Pages of the documentation whose examples are run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fs3.testing.cluster import LocalCluster

DOCS = Path(__file__).resolve().parents[1] / "docs"


def run_examples(
    name: str, cluster: LocalCluster, directory: Path, monkeypatch: pytest.MonkeyPatch, *, shell: bool = False
) -> int:
    """Run the Python blocks of ``docs/name.md`` in their order and one scope; how many ran.

    `cluster` is the one that the page means, `directory` (empty) the one that it works in. With `shell` also the shell
    blocks, each of which must be one `fs3` command.
    """
    page = DOCS / f"{name}.md"
    blocks = re.findall(r"```(python|sh)\n(.*?)```", page.read_text(), re.DOTALL)
    # The page's cluster is the one that `fs3 up` makes.
    (directory / "fs3-cluster").symlink_to(cluster.directory)
    monkeypatch.chdir(directory)
    monkeypatch.setenv("FS3_URL", f"{cluster.url}?token_file={cluster.token_file}")
    address = cluster.url.removeprefix("fs3://").rstrip("/")
    scope: dict[str, Any] = {}
    ran = 0
    try:
        for language, block in blocks:
            if language == "python":
                exec(compile(block.replace("127.0.0.1:7000", address), str(page), "exec"), scope)
            elif shell:
                subprocess.run([sys.executable, "-m", *block.split()], check=True)
            else:
                continue
            ran += 1
    finally:
        if "fs" in scope:
            scope["fs"].close()
    return ran
