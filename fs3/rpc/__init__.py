"""The frame protocol over uvloop, and gRPC helpers."""
