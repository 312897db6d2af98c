#!/usr/bin/env bash
# Builds the native module in release mode and installs fs3, editable, into the virtual environment; beside it the faulty
# disk and the file tester of the tests, and the C library of user-space I/O with its header (lib, include).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$PWD/$1

# maturin takes seconds even when cargo has nothing to do, so look first.
stamp=$venv/.native
newest=$(find native proto pyproject.toml -type f -not -path '*/target/*' -newer "$stamp" -print -quit 2>/dev/null || echo first)
if [ -n "$newest" ] || ! ls fs3/_native*.so >/dev/null 2>&1; then
    touch "$stamp.new"
    echo "building the native module (release)"
    PIP_QUIET=1 VIRTUAL_ENV=$venv "$venv/bin/maturin" develop -q --release
    (cd native && cargo build -q --locked --release -p fs3-faultdisk -p fs3-fsx -p fs3-usrbio)
    built=${CARGO_TARGET_DIR:-native/target}/release
    install "$built"/{fs3-faultdisk,fs3-fsx} "$venv/bin/"
    install -D -m 644 "$built/libhf3fs_api_shared.so" "$venv/lib/libhf3fs_api_shared.so"
    install -D -m 644 native/crates/fs3-usrbio/include/hf3fs_usrbio.h "$venv/include/hf3fs_usrbio.h"
    mv "$stamp.new" "$stamp"
fi
