"""What the native code logs, and that its level changes while it runs. In a process of its own: it is set up once."""

from __future__ import annotations

import subprocess
import sys

CHILD = """
import os, sys, tempfile, time
from fs3 import native

log = tempfile.TemporaryFile()
told = os.dup(2)
os.dup2(log.fileno(), 2)

def logs():
    "Whether a client that finds no service is logged: at debug."
    begin = os.fstat(log.fileno()).st_size
    try:
        native.Client.connect(["127.0.0.1:1", "127.0.0.1:2"], "token", op_timeout_s=0.2).wait()
    except OSError:
        pass
    return os.fstat(log.fileno()).st_size > begin

def until(wanted):
    ends_s = time.monotonic() + 30
    while logs() != wanted:
        assert time.monotonic() < ends_s, "the level did not change"

try:
    native.set_log_level("debug")
except RuntimeError:
    pass
else:
    raise AssertionError("there is nothing yet whose level could change")
native.init_logging("error")
assert not logs()
native.set_log_level("debug")
until(True)
native.set_log_level("error")
until(False)
try:
    native.set_log_level("=loud=")
except ValueError:
    pass
else:
    raise AssertionError("this is no level")
os.write(told, b"done")
"""


def test_the_level_of_the_native_log_changes_while_it_runs() -> None:
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=120, check=False)
    assert (child.returncode, child.stderr) == (0, "done")


FULL = """
import os
from fs3 import native

os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
native.init_logging("trace")
try:
    native.Client.connect(["127.0.0.1:1"], "token", op_timeout_s=0.2).wait()
except OSError:
    os.write(1, b"told of the error")
"""


def test_a_log_on_a_full_disk_stops_nothing() -> None:
    child = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, timeout=120, check=False)
    assert (child.returncode, child.stdout) == (0, "told of the error")
