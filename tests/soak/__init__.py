"""Mixed work on a mount for a long time, while memory, descriptors and threads of every process are watched.

`make soak HOURS=…` is the long run, `test_soak.py` a short one of the same code.
"""
