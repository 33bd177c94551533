"""Generation: beam search held to the prefix index, so that every result is a real item of the asked pool."""
