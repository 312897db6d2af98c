"""For tests, ours and our users': a local cluster of real processes."""
