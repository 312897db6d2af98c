"""Runs a module, such as the simulator or pytest, with a mutant of the Python sources.

Called by tools/mutants.py: mutant_child.py MODULE ARGUMENTS...; the mutant's name comes in FS3_MUTANT.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

from mutants import ROOT, SWITCH, Edit, load, mutated


class _Loader(SourceFileLoader):
    """Loads a module from its source with some texts replaced."""

    def __init__(self, name: str, path: str, edits: list[Edit]) -> None:
        super().__init__(name, path)
        self._edits = edits

    def get_code(self, fullname: str) -> object:
        """Compile the replaced source, past every cache."""
        path = self.get_filename(fullname)
        return compile(mutated(Path(path).read_text(), self._edits), path, "exec", dont_inherit=True)


class _Finder(MetaPathFinder):
    """Finds the sources to be mutated."""

    def __init__(self, edits: dict[str, list[Edit]]) -> None:
        self._edits = edits

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module whose source a mutant changes."""
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.origin is None or spec.origin not in self._edits:
            return None
        loader = _Loader(fullname, spec.origin, self._edits[spec.origin])
        return importlib.util.spec_from_file_location(fullname, spec.origin, loader=loader)


def main() -> None:
    """Become the module."""
    edits: dict[str, list[Edit]] = {}
    for mutant in load():
        for edit in mutant.python if mutant.name == os.environ.get(SWITCH) else ():
            edits.setdefault(str(ROOT / edit.file), []).append(edit)
    sys.path.insert(0, str(ROOT))
    sys.meta_path.insert(0, _Finder(edits))
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


main()
