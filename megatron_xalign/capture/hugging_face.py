"""Causal language models of transformers, read from a folder: their forward pass as capture wants it.

Nothing is downloaded, no code of the folder is run, and weights are read from safetensors only.
"""

# B sequences, S tokens, V vocabulary

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from megatron_xalign.batch import Batch, CurrentBatch
from megatron_xalign.capture.hook_points import hook_modules
from megatron_xalign.capture.probe import ForwardOnly
from megatron_xalign.errors import CheckpointError, ConfigError
from megatron_xalign.formats.atomic import read_json

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(folder: str | Path, device: torch.device, dtype: str = "float32") -> Any:
    """Load a model of a kind that ``names.HOOK_MODULES`` knows, in evaluation mode.

    Raises:
        CheckpointError: the folder is no Hugging Face folder, or lacks weights of its model.
        ConfigError: transformers is not installed, or capture has no hook points for this kind of model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json; it is no Hugging Face folder.")
    settings = read_json(folder / "config.json")
    hook_modules(str(settings.get("model_type")))
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} holds no *.safetensors. Weights in other files (pytorch_model.bin) are pickled and not read; "
            "save the model with safetensors first."
        )
    transformers = _transformers()
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=DTYPES[dtype],
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {_first_line(error)}") from error
    wrong = {kind: sorted(map(str, loading[kind])) for kind in ("missing_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise CheckpointError(
            f"{folder} does not hold the tensors of {type(model).__name__}: "
            + "; ".join(f"{kind} {', '.join(found[:5])}" for kind, found in wrong.items() if found) + "."
        )
    if loading["unexpected_keys"]:
        log.warning("%s holds tensors its model does not use: %s", folder, sorted(loading["unexpected_keys"])[:5])
    return model.to(device).eval()


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a Hugging Face folder.

    Raises:
        CheckpointError: there is none that transformers can read.
    """
    try:
        return _transformers().AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CheckpointError(f"the tokenizer of {folder} cannot be loaded: {_first_line(error)}") from error


def encode(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, without special tokens."""
    return [np.array(ids, np.int64) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]


def prefix_token(tokenizer: Any, asked: str) -> int | None:
    """The token in front of every probe sentence.

    Args:
        tokenizer: of transformers.
        asked: ``auto`` (what the tokenizer itself puts there, else its end-of-text token, which documents follow in
            training), ``bos``, ``eos``, ``none`` or a token id.

    Raises:
        ConfigError: the tokenizer has no such token, or it is none of these.
    """
    if asked == "none":
        return None
    if asked.isdigit():
        return int(asked)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if asked == "auto":
        first = tokenizer("a")["input_ids"][:1]
        return bos if bos is not None and first == [bos] else eos
    if asked not in ("bos", "eos"):
        raise ConfigError(f"a prefix of {asked!r} is not one of auto, bos, eos, none or a token id.")
    found = bos if asked == "bos" else eos
    if found is None:
        raise ConfigError(f"the tokenizer has no {asked} token; name a token id, or none.")
    return int(found)


def build_forward_only(model: Any, current_batch: CurrentBatch, device: torch.device) -> ForwardOnly:
    """A function that runs batches through the model without gradients and gives the loss of every token, [B, S]."""

    @torch.no_grad()
    def run(batches: Sequence[Batch]) -> list[torch.Tensor]:
        losses = []
        for batch in batches:
            on_device = batch.to(device)
            current_batch.batch = on_device
            try:
                logits_BSV = model(input_ids=on_device.tokens, use_cache=False).logits
            finally:
                current_batch.batch = None
            # A sentence at a time: a copy in float32 of all logits may be larger than the model.
            losses.append(
                torch.stack([
                    functional.cross_entropy(logits_SV.float(), labels_S, reduction="none")
                    for logits_SV, labels_S in zip(logits_BSV, on_device.labels, strict=True)
                ])
            )
        return losses

    return run


def longest_sequence(model: Any) -> int:
    """Tokens that the model takes at once."""
    return int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)


def _transformers() -> Any:
    try:
        import transformers
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise ConfigError(
            f"Hugging Face models need transformers ({error}): pip install 'transformers>=4.48'."
        ) from None
    transformers_logging.disable_progress_bar()
    return transformers


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
