"""Metrics of images and models, and the tables that compare them."""
