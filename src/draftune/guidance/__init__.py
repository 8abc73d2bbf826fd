"""Use a reward without training: guided sampling and noise optimization."""
