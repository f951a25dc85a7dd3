"""Measurements beside the peers, each in the same run; `python -m jobs.benchmark NAME`."""
