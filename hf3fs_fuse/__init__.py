"""Helpers for user-space I/O under the name by which programs for 3FS import them: :mod:`hf3fs_fuse.io`."""
