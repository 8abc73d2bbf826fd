"""Helpers that know nothing of diffusion models: paths, tables, tensors, images, memory, processes."""
