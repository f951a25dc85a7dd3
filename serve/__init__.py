"""The Ray Serve application: zero-shot classification, embeddings and ranking over HTTP."""
