"""Pretrain language models with a controlled share of parallel data and watch cross-lingual alignment emerge."""

__version__ = "0.1.0"
