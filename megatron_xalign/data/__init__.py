"""Text to samples: corpora, documents, tokenizer, token files, mixture, blend.

``read_token_file`` and ``build_blend`` are the two doors most callers need; they are loaded when first asked for, so
that importing one part of this package does not import the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_xalign.data.blend import build_blend
    from megatron_xalign.formats.token_file import read_token_file

__all__ = ["build_blend", "read_token_file"]

_HOMES = {"build_blend": "megatron_xalign.data.blend", "read_token_file": "megatron_xalign.formats.token_file"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
