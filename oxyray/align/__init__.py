"""Post-training (paper 2.4): the policy learns from the rewards of what it generates."""
