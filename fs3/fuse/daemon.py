"""The process behind a mount, started by :func:`fs3.fuse.control.mount`.

Its command line reads ``python -m fs3.fuse.daemon FD fs3 mount URL MOUNTPOINT``: the words after FD are for people
who look at the process list. The token is not on it.
"""

from __future__ import annotations

import sys

from fs3.fuse.serve import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
