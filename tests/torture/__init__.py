"""Real processes, real faults: writers and readers on a cluster that is killed, stopped, cut off and powered down.

`make torture` is the long campaign, `test_torture.py` a short one of the same code. Needs root: services live in
network namespaces of their own or on one host, their disks are FUSE mounts of `fs3-faultdisk`.
"""
