"""What a person running a job can get wrong, as exceptions the command line turns into one clear line."""

from __future__ import annotations


class XAlignError(Exception):
    """Something the person running a job can put right; the message says what, with its value, and how."""


class ConfigError(XAlignError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class CorpusError(XAlignError):
    """Input text is missing, empty, malformed or too small for what was asked."""


class FormatError(XAlignError):
    """A file of ours (or Megatron's) is truncated, corrupted, or of another version or tokenizer."""


class CheckpointError(XAlignError):
    """A checkpoint is missing, incomplete, or does not fit the model that is to be built from it."""


class WorkerError(XAlignError):
    """A worker process died, or its port, memory or time ran out; the message names the first cause."""


class StuckError(XAlignError):
    """A worker process hangs, is gone or has fallen behind; it is named, and it is the first cause."""


class StoppedEarly(Exception):  # noqa: N818 (it is no error)
    """A run was asked to stop, saved its state and left; the same command continues it. No error: requeue it."""
