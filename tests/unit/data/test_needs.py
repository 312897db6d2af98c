"""fs3 needs neither NumPy nor PyTorch; fs3.data needs NumPy, and says so."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_fs3_and_its_command_import_neither_numpy_nor_torch() -> None:
    found = run("import sys, fs3, fs3.client, fs3.cli.main, fs3.cli.data; print({'numpy', 'torch'} & set(sys.modules))")
    assert found.stdout == "set()\n"


def test_datasets_need_numpy_and_say_so_and_not_torch() -> None:
    found = run("import sys, fs3.data; print({'torch', 'pyarrow'} & set(sys.modules))")
    assert found.stdout == "set()\n"
    without = "import sys; sys.modules['numpy'] = None\n"
    assert "fs3.data needs NumPy: pip install numpy" in run(f"{without}import fs3.data").stderr
    command = run(f"{without}sys.argv = ['fs3', 'data', 'info', 'x']\nfrom fs3.cli.main import main; sys.exit(main())")
    assert command.stderr == "Error: fs3.data needs NumPy: pip install numpy\n"
    assert command.returncode == 1
