"""Semantic IDs: item text to vectors, vectors to codes (RQ-KMeans), codes to a versioned catalogue with its prefix index."""
