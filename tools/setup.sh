#!/usr/bin/env bash
# Makes the virtual environment and installs what fs3 needs; with "workloads", also the libraries that tests, examples and
# benchmarks use it from (PyTorch and others, gigabytes). Quick when there is nothing to do.
set -euo pipefail
venv=$1
lock=requirements${2:+-$2}.lock
cd "$(dirname "$0")/.."

need=()
command -v gcc >/dev/null || need+=(gcc)
command -v fusermount3 >/dev/null || need+=(fuse3)
command -v rsync >/dev/null || need+=(rsync)
command -v git >/dev/null || need+=(git)
command -v column >/dev/null || need+=(bsdextrautils)
if [ "$lock" = requirements-workloads.lock ]; then
    command -v ip >/dev/null || need+=(iproute2)
    command -v nft >/dev/null || need+=(nftables)
    command -v setfacl >/dev/null || need+=(acl)
fi
python=$(command -v python3.11 || command -v python3 || true)
if [ -z "$python" ]; then
    need+=(python3 python3-venv)
elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    need+=(python3-venv)
fi
if [ ${#need[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing ${need[*]}"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${need[@]}" >/dev/null
        python=$(command -v python3.11 || command -v python3)
    else
        echo "missing: ${need[*]}; install them (as root: apt-get install ${need[*]}) and run this again" >&2
        exit 1
    fi
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "fs3 needs Python 3.11 or newer; $python is $("$python" --version)" >&2
    exit 1
}
command -v cargo >/dev/null || {
    echo "fs3 needs Rust 1.90 or newer (cargo was not found); install it with rustup, https://rustup.rs" >&2
    exit 1
}

# The lock with the libraries of workloads holds the other one, too.
stamp=$venv/.$lock
if ! cmp -s "$lock" "$stamp" && ! cmp -s requirements-workloads.lock "$venv/.requirements-workloads.lock"; then
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    echo "installing the Python packages of $lock into $venv"
    "$venv/bin/pip" install -q --require-hashes -r "$lock"
    cp "$lock" "$stamp"
fi
