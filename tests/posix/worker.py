"""`python -m tests.posix.worker UID GID GROUPS`: does operations as a user, one line of JSON for each.

`["chdir", path]` and `["snapshot"]` are orders; everything else is an operation. Needs root to become the user.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from tests.posix.operations import perform, snapshot


def obey(order: list[Any]) -> Any:
    """One line."""
    if order[0] == "chdir":
        os.chdir(order[1])
        return None
    if order[0] == "snapshot":
        return snapshot()
    return perform(order)


def main() -> int:
    """Become the user, then serve until the end of the input."""
    uid, gid, *groups = map(int, sys.argv[1:])
    os.umask(0)
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
