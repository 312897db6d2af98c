"""Compile proto/ into fs3/v1/ (committed). `--check` fails when the committed files are not current."""

from __future__ import annotations

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def generate(out: Path) -> None:
    """Write the modules and stubs of every schema below `out`."""
    sources = sorted(str(p.relative_to(ROOT / "proto")) for p in (ROOT / "proto").rglob("*.proto"))
    bin_dir = Path(sys.executable).parent
    base = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(ROOT / "proto")]
    plugins = [f"--plugin=protoc-gen-{n}={bin_dir / f'protoc-gen-{n}'}" for n in ("mypy", "mypy_grpc")]
    subprocess.run([*base, *plugins, f"--python_out={out}", f"--mypy_out={out}", *sources], check=True)
    services = [s for s in sources if "\nservice " in (ROOT / "proto" / s).read_text()]
    subprocess.run([*base, *plugins, f"--grpc_python_out={out}", f"--mypy_grpc_out={out}", *services], check=True)


def main() -> int:
    """Generate, or compare with what is committed."""
    target = ROOT / "fs3" / "v1"
    with tempfile.TemporaryDirectory() as tmp:
        generate(Path(tmp))
        made = sorted((Path(tmp) / "fs3" / "v1").iterdir())
        if "--check" in sys.argv:
            stale = [
                p.name for p in made if not (target / p.name).exists() or not filecmp.cmp(p, target / p.name, False)
            ]
            if stale:
                print(f"stale: {', '.join(stale)}; run `make proto`", file=sys.stderr)
            return 1 if stale else 0
        for path in made:
            (target / path.name).write_bytes(path.read_bytes())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
