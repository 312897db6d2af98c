"""Connectors of inference software to the KV cache, one module each; docs/kvcache.md shows how each is configured.

A module imports the software that it connects, and nothing else of fs3 imports it.
"""
