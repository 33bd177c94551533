"""Evaluation: metrics, baselines from the same split, the table beside published rows, and the report."""
