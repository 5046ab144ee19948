"""Megatron checkpoints to Hugging Face folders, and the proof that both compute the same."""
