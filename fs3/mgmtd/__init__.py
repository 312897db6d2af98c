"""The cluster manager."""
