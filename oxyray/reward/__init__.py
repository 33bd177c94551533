"""What a generated item is worth: the unified ranker, and the mapping from scores to one reward by scenario (paper 2.4.2)."""
