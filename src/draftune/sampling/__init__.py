"""Noise schedules and samplers: pure functions that know no model, no reward and no LoRA."""
