"""A checkpoint's model on one process, whole, with what is inside it: for comparing it with another program's."""

# B sequences, S tokens, V vocabulary, H hidden

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_xalign import names, topology
from megatron_xalign.config import ParallelConfig, RunConfig
from megatron_xalign.errors import CheckpointError
from megatron_xalign.formats.checkpoint import CheckpointReader
from megatron_xalign.training.checkpoint import unwrap
from megatron_xalign.training.inference import load_model
from megatron_xalign.training.model import build_model


class ListenedModel:
    """Megatron's model with the weights of a checkpoint, in float32."""

    def __init__(self, model: Any, vocab_size: int, device: torch.device) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._device = device

    @torch.no_grad()
    def states(self, tokens_S: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Hidden states [S, H] of one sequence by Hugging Face's name of the place, and its logits [S, V]."""
        tokens_BS = tokens_S[None].to(self._device)
        positions = torch.arange(tokens_BS.shape[1], device=self._device).expand_as(tokens_BS)
        found: dict[str, torch.Tensor] = {}
        with listening(self._model, found):
            logits_BSV: torch.Tensor = self._model(tokens_BS, positions, None)
        logits_SV = logits_BSV[0, :, : self._vocab_size].float().cpu()
        return {name: state_SBH[:, 0] for name, state_SBH in found.items()}, logits_SV


@contextmanager
def listening(model: Any, found: dict[str, torch.Tensor]) -> Iterator[None]:
    """Put what leaves the places of ``names.COMPARED`` into ``found`` while the block runs.

    Args:
        model: Megatron's; modules it lacks (of another pipeline stage) are passed over.
        found: filled, in float32 on the CPU, by Hugging Face's name of the place.
    """
    handles = []

    def hook_as(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            # A copy: Megatron may add the residual stream to it in place.
            found[name] = state.detach().float().cpu().clone()

        return hook

    modules = dict(model.named_modules())
    places = [(names.EMBEDDING.megatron, names.EMBEDDING.hugging_face)]
    layers = modules.get(names.LAYERS.megatron)
    for layer in range(0 if layers is None else len(layers)):
        for point in names.COMPARED:
            inside = f".{point.megatron}" if point.megatron else ""
            places.append((f"{names.LAYERS.megatron}.{layer}{inside}", names.place_in_layer(point, layer)))
    try:
        for path, name in places:
            if path in modules:
                handles.append(modules[path].register_forward_hook(hook_as(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def load_listened(
    checkpoint: str | Path, config: RunConfig | None = None, vocab_size: int | None = None
) -> Iterator[ListenedModel]:
    """Rebuild the model of a checkpoint, whatever layout wrote it, on this process alone; leave it after the block.

    Weights of our own checkpoints are read by Megatron, so that two programs have read them.

    Args:
        checkpoint: the folder.
        config: of the run, where the checkpoint is not one of ours; its weights are then read without Megatron, whose
            loader would unpickle whatever the folder holds.
        vocab_size: ids before padding, likewise.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not hold this model.
        ValueError: this process already belongs to a job.
    """
    if config is None or vocab_size is None:
        with load_model(checkpoint) as loaded:
            yield ListenedModel(unwrap(loaded.model_chunks[0]), loaded.vocab_size, loaded.ranks.device)
        return
    reader, parallel = CheckpointReader(checkpoint), ParallelConfig()
    with topology.start(parallel, config.seed) as ranks:
        chunks = build_model(
            config.model, padded_vocab_size=reader.shape("embedding.word_embeddings.weight")[0],
            seq_length=config.data.seq_length, parallel=parallel, params_dtype="fp32", recompute="none", ranks=ranks,
            seed=config.seed, vocab_size=vocab_size,
        )
        model = unwrap(chunks[0]).eval()
        fill(model, reader)
        yield ListenedModel(model, vocab_size, ranks.device)


@torch.no_grad()
def fill(model: Any, reader: CheckpointReader, first_layer: int = 0) -> None:
    """Read the weights of a ``GPTModel`` on one process, one tensor at a time, without Megatron's loader.

    Args:
        model: the model, or a stage of it.
        reader: of the checkpoint.
        first_layer: 0-based layer of the checkpoint that the model's first one is.

    Raises:
        CheckpointError: the checkpoint lacks a tensor, or has it in another shape.
    """
    state = model.state_dict(keep_vars=True)
    for name, entry in model.sharded_state_dict().items():
        target = state.get(name)
        if not isinstance(target, torch.Tensor) or not hasattr(entry, "key"):
            continue
        stored = names.stored_name(entry.key, reader)
        layer = int(name.split(".")[2]) + first_layer if name.startswith("decoder.layers.") else None
        if stored not in reader:
            raise CheckpointError(f"{reader.folder} holds no {entry.key}, which this model needs.")
        tensor = reader.tensor(stored, layer)
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"{stored} in {reader.folder} has shape {list(tensor.shape)}; the model asks for {list(target.shape)}."
            )
        target.copy_(tensor)
