"""A training run on disk: write it, resume it, load it, export it."""
