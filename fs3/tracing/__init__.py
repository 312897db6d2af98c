"""Traces of what this process' clients do, for Perfetto and Chrome; they merge with those of the PyTorch profiler."""

from fs3.tracing.merge import merge_traces
from fs3.tracing.recorder import Trace, trace

__all__ = ["Trace", "merge_traces", "trace"]
