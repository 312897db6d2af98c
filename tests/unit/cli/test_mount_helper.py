from __future__ import annotations

from pathlib import Path

import pytest

from fs3.cli.mount_helper import FAILED, WRONG_USAGE, main


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["fs3://a:1/"], WRONG_USAGE, "usage:"),
        (["fs3://a:1/", "/mnt", "-t", "ext4"], WRONG_USAGE, "invalid choice"),
        (["/dev/sda1", "/mnt"], WRONG_USAGE, "not the URL of a cluster"),
        (["fs3://a:1/", "/mnt", "-o", "rw,allow_othr"], WRONG_USAGE, "did you mean allow_other?"),
        (["fs3://a:1/", "/mnt", "-o", "sync"], WRONG_USAGE, "unknown mount option 'sync'"),
        (["fs3://a:1/", "/none/at/all", "-o", "rw"], FAILED, "does not exist"),
        (["fs3://a:1/", "/", "-o", "remount,ro"], FAILED, "no mount of fs3"),
        (["fs3://a:1/", "/mnt", "-N", "/none"], FAILED, "/none"),
    ],
)
def test_what_cannot_be_mounted_ends_with_the_status_of_mount(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as e:
        code = e.code  # type: ignore[assignment]
    assert code == status
    assert said in capsys.readouterr().err


def test_a_trial_run_checks_the_arguments_and_a_sloppy_one_leaves_out_what_it_does_not_know(tmp_path: Path) -> None:
    line = "rw,_netdev,x-systemd.automount,subdir=data"
    assert main(["fs3://a:1/", str(tmp_path), "-f", "-n", "-v", "-t", "fuse.fs3", "-o", line]) == 0
    assert main(["fs3://a:1/", str(tmp_path), "-f", "-o", "barrier=1"]) == WRONG_USAGE
    assert main(["fs3://a:1/", str(tmp_path), "-f", "-s", "-o", "barrier=1,ro"]) == 0
