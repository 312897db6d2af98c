"""The same system calls on a mount of fs3 and on a local file system: whatever a program can see has to be the same.

`make posix-diff` is the long campaign, `test_differential.py` a short one of the same code. Needs root, because two
users take part.
"""
