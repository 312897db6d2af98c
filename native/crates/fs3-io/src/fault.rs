//! A disk in memory that fails on demand and forgets unsynced writes. For tests.
