"""A mount that an ordinary user makes, by the helper program of FUSE."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fs3.testing.cluster import LocalCluster
from tests.cluster.mounts import mounted

NOBODY = 65534
RUN_S = 120

# Runs as root in namespaces of its own: what it mounts, and the daemon, end with it. Everybody may open the device;
# the capability only lets the user find this Python, wherever it is installed.
SCRIPT = """
set -eu
mknod "$HOME/fuse" c 10 229; chmod 666 "$HOME/fuse"
mount --bind "$HOME/fuse" /dev/fuse
mount --bind "$HOME" /mnt
cd /mnt
export HOME=/mnt
exec setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps +dac_read_search --ambient-caps +dac_read_search \
  sh -eu -c '
    fs3() { "$PYTHON" -m fs3 "$@"; }
    fs3 mount -o subdir=/home mnt
    echo mine > mnt/file; mkdir mnt/directory; mv mnt/file mnt/directory/file
    stat -c %u mnt/directory/file
    cat mnt/directory/file
    fs3 umount mnt
    ls mnt
  '
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
@pytest.mark.skipif(shutil.which("fusermount3") is None, reason="needs fusermount3 of the package fuse3")
def test_an_ordinary_user_mounts_works_and_unmounts(shared_cluster: LocalCluster, tmp_path: Path) -> None:
    with mounted(shared_cluster, tmp_path / "root") as root:
        (root / "home").mkdir()
        os.chown(root / "home", NOBODY, NOBODY)
        home = tmp_path / "user"
        (home / "mnt").mkdir(parents=True)
        (home / "token").write_text(shared_cluster.token)
        for path in (home, home / "mnt", home / "token"):
            os.chown(path, NOBODY, NOBODY)
        environment = {
            **os.environ,
            "HOME": str(home),
            "PYTHON": sys.executable,
            "FS3_URL": f"{shared_cluster.url}?token_file=/mnt/token",
        }
        done = subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", SCRIPT],
            env=environment,
            capture_output=True,
            text=True,
            timeout=RUN_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(NOBODY), "mine"]
        assert (root / "home" / "directory" / "file").read_text() == "mine\n"
        assert os.stat(root / "home" / "directory" / "file").st_uid == NOBODY
