"""Measured experiments on the embedded model: `python -m experiments NAME`. Results are in RESULTS.md."""
