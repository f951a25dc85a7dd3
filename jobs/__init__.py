"""What a cluster runs: `python -m jobs` lists it."""
