"""Expressions such as `clip + 0.1*"mine.py:red"(k=2)`, and the objects that they name."""
