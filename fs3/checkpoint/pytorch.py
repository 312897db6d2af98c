"""The one place that imports PyTorch, with an error that says what to do where it is missing."""

from __future__ import annotations

try:
    import torch
except ImportError as e:
    raise ImportError("this part of fs3.checkpoint needs PyTorch: pip install torch") from e

__all__ = ["torch"]
