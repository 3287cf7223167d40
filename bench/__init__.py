"""Throughput of the ops beside everything else that computes them: `make bench`, `make bench-check`."""
