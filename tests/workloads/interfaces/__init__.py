"""Interfaces of inference software, restated: what its connectors are tested against where it is not installed.

SGLang, LMCache and vLLM pin other releases of PyTorch than ours and bring gigabytes of CUDA libraries, so they are not
among our dependencies. What a connector uses of each is restated here in our own words: names, signatures, what a
caller may rely on. Where the software can be imported (`make test-connectors` fetches it) the tests use it instead.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from types import ModuleType
from typing import Any


def offer(modules: dict[str, list[Any]]) -> bool:
    """Make restated classes importable from `modules`, unless the software is installed; whether it is.

    All modules are of one package; a class is found under its own name.
    """
    software = next(iter(modules)).partition(".")[0]
    if software in sys.modules:
        return hasattr(sys.modules[software], "__path__")
    if importlib.util.find_spec(software) is not None:
        return True
    assert "FS3_CONNECTORS_REAL" not in os.environ, f"{software} is not installed"
    for name, members in modules.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:depth]), ModuleType(".".join(parts[:depth])))
        for member in members:
            setattr(sys.modules[name], member.__name__, member)
    return False
