"""What a setting must be, said where it is not."""

from __future__ import annotations

from megatron_xalign.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ``ConfigError`` with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)
