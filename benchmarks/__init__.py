"""Measurements beside the peers, each in the same run; `python -m benchmarks NAME`."""
