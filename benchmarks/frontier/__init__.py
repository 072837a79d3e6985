"""`python -m benchmarks frontier`: bytes per parameter against held-out loss, for every optimizer."""
