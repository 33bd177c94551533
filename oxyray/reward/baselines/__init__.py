"""What the ranker must stand beside, on the same pages with the same heads: a point-wise deep model and boosted trees."""
