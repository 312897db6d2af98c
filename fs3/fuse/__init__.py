"""Mounting a cluster through FUSE: what `fs3 mount` and `fs3 umount` do."""

from fs3.fuse.control import mount, take_over, umount
from fs3.fuse.options import MountOptions, parse_options

__all__ = ["MountOptions", "mount", "parse_options", "take_over", "umount"]
