"""Ray and nothing of recommendation: starting it, placing on it, watching over it."""
