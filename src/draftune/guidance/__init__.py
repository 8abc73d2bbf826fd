"""Use a reward without training: guided sampling (`sample`) and optimization of the initial noise."""
