"""What `import rayclip` offers: `load` in loading, `train`, `evaluate` and `embed` in jobs."""
