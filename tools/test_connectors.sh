#!/bin/bash
# The connectors of the KV cache against the real SGLang, LMCache and vLLM: `make test-connectors`.
#
# Of their wheels only what is imported is unpacked, without what they depend on (other releases of PyTorch, CUDA):
# the interfaces need the few small packages below. About 400 MB are fetched, once for a release.
set -euo pipefail

venv=$1
cache=${XDG_CACHE_HOME:-$HOME/.cache}/fs3/connectors
# The releases that the connectors were written for.
releases=(sglang==0.5.23 lmcache==0.5.6 vllm==0.33.0)
needed=(aiofile aiohappyeyeballs aiohttp aiosignal attrs cachetools caio certifi cffi charset_normalizer cryptography
    frozenlist idna ipython llvmlite msgspec multidict numba orjson prometheus_client propcache psutil py-cpuinfo
    pybase64 pydantic pydantic-core pyzmq regex requests starlette traitlets transformers typing-inspection urllib3 yarl)

unpack() { # RELEASE: its Python files and LMCache's native modules, whole or not at all
    local into=$cache/$1
    [ -d "$into" ] && return
    echo "fetching $1 ..." >&2
    rm -rf "$into.new" "$into.wheel"
    "$venv/bin/pip" download -q --no-deps --only-binary :all: -d "$into.wheel" "$1"
    "$venv/bin/python" - "$into.wheel" "$into.new" <<'EOF'
import pathlib, sys, zipfile

for wheel in pathlib.Path(sys.argv[1]).glob("*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        keep = (".py", "METADATA", ".so") if wheel.name.startswith("lmcache") else (".py", "METADATA")
        archive.extractall(sys.argv[2], [name for name in archive.namelist() if name.endswith(keep)])
EOF
    rm -rf "$into.wheel"
    mv "$into.new" "$into"
}

mkdir -p "$cache"
if [ ! -d "$cache/needed" ]; then
    echo "fetching what they need ..." >&2
    rm -rf "$cache/needed.new"
    "$venv/bin/pip" install -q --no-deps --no-compile --target "$cache/needed.new" "${needed[@]}"
    mv "$cache/needed.new" "$cache/needed"
fi
status=0
for release in "${releases[@]}"; do
    software=${release%%==*}
    unpack "$release"
    echo "== $release"
    PYTHONPATH="$cache/$release:$cache/needed" FS3_CONNECTORS_REAL=1 \
        "$venv/bin/pytest" -q -p no:cacheprovider "tests/workloads/test_kv_$software.py" || status=1
done
exit $status
