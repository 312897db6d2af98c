"""fs3: a distributed file system for AI training and inference."""

__version__ = "0.1.0"
