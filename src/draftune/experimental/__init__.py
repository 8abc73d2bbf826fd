"""Features that may change or be removed without notice. The core imports them only when a run uses them."""
