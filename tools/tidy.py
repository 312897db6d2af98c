"""Check the layout: import directions in Python and Rust, one importer of the native module, file sizes.

The directions are those of ARCHITECTURE.md. Prints one line per violation; exit status 1 if there is any.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINES_MAX = 900

# What each Python package may import of fs3, besides itself.
PYTHON: dict[str, set[str]] = {
    "v1": set(),
    "core": {"v1"},
    "native": {"core", "v1"},
    "kv": {"core", "v1"},
    "rpc": {"core", "v1", "native"},
    "mgmtd": {"core", "kv", "rpc", "v1"},
    "meta": {"core", "kv", "rpc", "v1"},
    "storage": {"core", "rpc", "native", "v1"},
    "client": {"core", "rpc", "native", "v1"},
    "checkpoint": {"core", "client", "native", "v1"},
    "data": {"core", "client", "native", "v1"},
    "fuse": {"core", "client", "native", "v1"},
    "tracing": {"core", "native", "v1"},
    "kvcache": {"core", "client", "native", "v1"},
    "testing": {"core", "kv", "rpc", "mgmtd", "meta", "storage", "client", "fuse", "native", "v1"},
    "cli": {
        "checkpoint",
        "core",
        "kv",
        "rpc",
        "mgmtd",
        "meta",
        "storage",
        "client",
        "data",
        "fuse",
        "kvcache",
        "native",
        "testing",
        "tracing",
        "v1",
    },
}

# Packages whose named modules are pure: no I/O, no clock, no randomness of their own.
PURE = [
    "fs3/mgmtd/chains.py",
    "fs3/mgmtd/placement.py",
    "fs3/mgmtd/lease.py",
    "fs3/meta/keys.py",
    "fs3/meta/model.py",
    "fs3/core/layout.py",
]
IMPURE_MODULES = {"time", "random", "socket", "asyncio", "threading", "os", "subprocess", "secrets", "pathlib"}

RUST: dict[str, set[str]] = {
    "fs3-core": set(),
    "fs3-proto": {"fs3-core"},
    "fs3-chunk": {"fs3-core", "fs3-proto"},
    "fs3-chain": {"fs3-core", "fs3-proto"},
    "fs3-io": {"fs3-core", "fs3-proto", "fs3-chunk", "fs3-rt"},
    "fs3-net": {"fs3-core", "fs3-proto", "fs3-rt", "fs3-verbs"},
    "fs3-kv": {"fs3-core"},
    "fs3-storage": {"fs3-core", "fs3-proto", "fs3-rt", "fs3-chunk", "fs3-chain", "fs3-io", "fs3-kv", "fs3-net"},
    "fs3-bench": {"fs3-core"},
    "fs3-rt": {"fs3-core"},
    "fs3-verbs": set(),
    "fs3-ring": set(),
    "fs3-usrbio": {"fs3-ring"},
    "fs3-sim": {"fs3-core", "fs3-proto", "fs3-rt", "fs3-chain", "fs3-io", "fs3-net", "fs3-storage", "fs3-client"},
    "fs3-client": {"fs3-core", "fs3-proto", "fs3-rt", "fs3-net"},
    "fs3-faultdisk": set(),
    "fs3-fsx": set(),
    "fs3-fuse": {"fs3-core", "fs3-proto", "fs3-client", "fs3-ring", "fs3-rt"},
    "fs3-py": {
        "fs3-bench",
        "fs3-client",
        "fs3-core",
        "fs3-fuse",
        "fs3-net",
        "fs3-proto",
        "fs3-ring",
        "fs3-sim",
        "fs3-storage",
    },
}


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """The absolute module names a file imports, with their lines."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
                continue
            yield node.lineno, node.module or ""
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def python_violations() -> Iterator[str]:
    """Imports against the directions, relative imports, second importers of the native module."""
    for path in sorted((ROOT / "fs3").rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative.parts[1] in ("v1", "__main__.py"):
            continue
        package = relative.parts[1] if len(relative.parts) > 2 else path.stem
        for line, name in imported_modules(path):
            where = f"{relative}:{line}"
            if name.startswith("."):
                yield f"{where}: relative import; write the full name"
            if name.startswith("fs3._native") and str(relative) != "fs3/native.py":
                yield f"{where}: only fs3/native.py imports fs3._native"
            if str(relative) in PURE and name.split(".")[0] in IMPURE_MODULES:
                yield f"{where}: a pure module imports {name}"
            parts = name.split(".")
            if parts[0] != "fs3" or len(parts) < 2 or package == "__init__":
                continue
            other = parts[1]
            if package not in PYTHON:
                yield f"{where}: package fs3.{package} is not in tools/tidy.py"
                break
            if other in PYTHON and other != package and other not in PYTHON[package]:
                yield f"{where}: fs3.{package} may not import fs3.{other}"


def rust_violations() -> Iterator[str]:
    """Crate dependencies against the directions."""
    for manifest in sorted((ROOT / "native" / "crates").glob("*/Cargo.toml")):
        data = tomllib.loads(manifest.read_text())
        name = data["package"]["name"]
        if name not in RUST:
            yield f"{manifest.relative_to(ROOT)}: crate {name} is not in tools/tidy.py"
            continue
        for dependency in data.get("dependencies", {}):
            if dependency.startswith("fs3-") and dependency not in RUST[name]:
                yield f"{manifest.relative_to(ROOT)}: {name} may not depend on {dependency}"


def long_files() -> Iterator[str]:
    """Files in which a reader gets lost."""
    for pattern in ("fs3/**/*.py", "native/crates/*/src/**/*.rs", "tests/**/*.py", "tools/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            if path.relative_to(ROOT).parts[:2] == ("fs3", "v1"):
                continue
            lines = len(path.read_text().splitlines())
            if lines > LINES_MAX:
                yield f"{path.relative_to(ROOT)}: {lines} lines (at most {LINES_MAX}); split it by responsibility"


def main() -> int:
    """Print every violation."""
    found = [*python_violations(), *rust_violations(), *long_files()]
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
