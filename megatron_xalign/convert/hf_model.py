"""A Hugging Face folder's model: whole, or one layer at a time for models that do not fit into memory.

transformers' own classes compute; no code of the folder is run, and only ``*.safetensors`` are read.
"""

# S tokens, H hidden, V vocabulary

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from megatron_xalign import names
from megatron_xalign.convert.safetensors_files import FolderTensors
from megatron_xalign.errors import CheckpointError, ConfigError

_ROWS = 4096
"""Rows of the output matrix that are float32 at a time."""


def load_whole(folder: Path) -> Any:
    """The folder's model in float32.

    Raises:
        CheckpointError: the folder's tensors are not the ones its class expects.
        ConfigError: transformers is not installed.
    """
    transformers = _transformers()
    FolderTensors.check(folder)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, loading[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise CheckpointError(
            f"{folder} does not hold the tensors of {type(model).__name__}: "
            + "; ".join(f"{kind} {', '.join(found)}" for kind, found in wrong.items() if found) + "."
        )
    return model.float().eval()


class StatesListener:
    """Hidden states of a whole model by place."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @torch.no_grad()
    def states(self, tokens_S: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Hidden states [S, H] of one sequence by name, and its logits [S, V]."""
        found: dict[str, torch.Tensor] = {}
        modules, handles = dict(self._model.named_modules()), []
        try:
            for name in places(self._model.config.num_hidden_layers):
                handles.append(modules[name].register_forward_hook(_hook(found, name)))
            logits_SV = self._model(tokens_S[None], use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return found, logits_SV


def places(num_layers: int) -> list[str]:
    """Every place whose state is compared, in the order of a forward pass."""
    inside = [names.place_in_layer(point, layer) for layer in range(num_layers) for point in names.COMPARED]
    return [names.EMBEDDING.hugging_face, *inside]


def _hook(found: dict[str, torch.Tensor], name: str) -> Any:
    def hook(module: Any, args: Any, output: Any) -> None:
        state = (output[0] if isinstance(output, tuple) else output).detach().float()
        found[name] = state.reshape(-1, state.shape[-1]).clone()

    return hook


@torch.no_grad()
def run_layerwise(folder: Path, sequences: Sequence[torch.Tensor]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """States of the folder's model, place by place: [S, H] for each sequence; at last ``logits``, [S, V].

    One layer (or the embedding, or the output matrix) is in memory at a time.

    Raises:
        CheckpointError: the folder's tensors are not the ones its class expects.
        ConfigError: transformers is not installed.
    """
    transformers = _transformers()
    settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    settings._attn_implementation = "sdpa"  # causal without a mask
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings)
    with ExitStack() as stack:
        tensors = FolderTensors(folder, stack)
        _check_names(model, tensors)
        rotary = type(model.model.rotary_emb)(config=settings)
        table = tensors.read("model.embed_tokens.weight")
        hidden = [table[tokens].float() for tokens in sequences]
        del table
        yield names.EMBEDDING.hugging_face, hidden
        layer = copy.deepcopy(model.model.layers[0]).to_empty(device="cpu").float().eval()
        for number in range(settings.num_hidden_layers):
            _fill(layer, tensors, f"{names.LAYERS.hugging_face}.{number}.")
            found: list[dict[str, torch.Tensor]] = []
            modules = dict(layer.named_modules())
            for state_SH in hidden:
                inside: dict[str, torch.Tensor] = {}
                handles = [
                    modules[point.hugging_face].register_forward_hook(_hook(inside, point.hugging_face))
                    for point in names.COMPARED
                ]
                positions = torch.arange(len(state_SH))[None]
                layer(
                    state_SH[None], attention_mask=None, position_ids=positions,
                    position_embeddings=rotary(state_SH[None], positions),
                )
                for handle in handles:
                    handle.remove()
                found.append(inside)
            for point in names.COMPARED:
                yield names.place_in_layer(point, number), [item[point.hugging_face] for item in found]
            hidden = [item[names.RESIDUAL.hugging_face] for item in found]
        norm = copy.deepcopy(model.model.norm).to_empty(device="cpu").float()
        _fill(norm, tensors, "model.norm.")
        hidden = [norm(state_SH) for state_SH in hidden]
        tied = bool(settings.tie_word_embeddings)
        yield "logits", _project(tensors.read("model.embed_tokens.weight" if tied else "lm_head.weight"), hidden)


def _transformers() -> Any:
    try:
        import transformers
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise ConfigError(
            f"running a Hugging Face model needs transformers ({error}): pip install 'megatron-xalign[convert]'."
        ) from None
    transformers_logging.disable_progress_bar()
    return transformers


def _fill(module: Any, tensors: FolderTensors, prefix: str) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(tensors.read(prefix + name))


def _check_names(model: Any, tensors: FolderTensors) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    found = {name: tensors.shape(name) for name in tensors.names()}
    wrong = {
        "missing_keys": expected.keys() - found.keys(), "unexpected_keys": found.keys() - expected.keys(),
        "mismatched_keys": {name for name in expected.keys() & found.keys() if expected[name] != found[name]},
    }
    if any(wrong.values()):
        raise CheckpointError(
            f"{tensors.folder} does not hold the tensors of {type(model).__name__}: "
            + "; ".join(f"{kind} {', '.join(sorted(some))}" for kind, some in wrong.items() if some) + "."
        )


def _project(matrix_VH: torch.Tensor, hidden: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    logits = [torch.empty(len(state_SH), len(matrix_VH)) for state_SH in hidden]
    for first in range(0, len(matrix_VH), _ROWS):
        rows = matrix_VH[first : first + _ROWS].float()
        for out_SV, state_SH in zip(logits, hidden, strict=True):
            out_SV[:, first : first + len(rows)] = state_SH @ rows.T
    return logits
