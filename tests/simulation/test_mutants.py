"""The seeded bugs of tests/mutants fit the sources, and all of them are caught (tools/mutants.py)."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A build from nothing on a slow machine included.
SUITE_S_MAX = 3600


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools" / "mutants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module
    spec.loader.exec_module(module)
    return module


def test_every_mutant_fits_the_sources(tool: ModuleType) -> None:
    mutants = tool.load()
    assert len(mutants) >= 50
    assert tool.misfits(mutants) == []


def test_a_text_that_is_gone_or_there_twice_is_named(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    edits = (tool.Edit("a.py", "x = 1", "x = 2"), tool.Edit("a.py", "y", "z"), tool.Edit("b.py", "x", "z"))
    mutant = tool.Mutant(name="m", property="", why="", oracle="world", edits=edits)
    assert [line.split(" is ")[1][:7] for line in tool.misfits([mutant], tmp_path)] == ["2 times", "0 times", "0 times"]


def test_edits_of_one_file_are_found_in_the_original(tool: ModuleType) -> None:
    edits = [tool.Edit("a", "two", "one two"), tool.Edit("a", "one", "two one")]
    assert tool.mutated("one two three", edits) == "two one one two three"
    with pytest.raises(ValueError, match="same text"):
        tool.mutated("one two", [tool.Edit("a", "one t", "x"), tool.Edit("a", "two", "y")])


def test_every_mutant_is_caught_and_the_unmutated_code_is_quiet() -> None:
    suite = [sys.executable, str(ROOT / "tools" / "mutants.py")]
    done = subprocess.run(suite, capture_output=True, text=True, timeout=SUITE_S_MAX, check=False)
    print(done.stdout.splitlines()[-1:], file=sys.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
