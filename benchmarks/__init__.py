"""Measured claims: one file a claim, `python -m benchmarks.NAME [--quick]`; results lie in `benchmarks/results/`."""
