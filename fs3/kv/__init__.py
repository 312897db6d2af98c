"""Transactional key-value stores: one interface (``api``), engines, and the retry loop."""
