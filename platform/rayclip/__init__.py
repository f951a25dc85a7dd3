"""rayclip: train, measure, tune and serve your own CLIP on a Ray cluster."""

__version__ = "0.1.0"
