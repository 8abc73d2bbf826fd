"""Noise schedules, samplers and gradient checkpointing. Independent of models, rewards and LoRA."""
