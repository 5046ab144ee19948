"""A checkpoint's model on one process: tokens to logits and hidden states."""

# B sequences, S tokens, V vocabulary, H hidden

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_xalign import names, topology
from megatron_xalign.config import ParallelConfig, RunConfig, from_tree
from megatron_xalign.errors import CheckpointError
from megatron_xalign.formats.checkpoint import CheckpointReader
from megatron_xalign.formats.checkpoint_folder import MANIFEST, read_manifest
from megatron_xalign.training.checkpoint import load_weights, unwrap
from megatron_xalign.training.model import build_model, padded_vocab_size

Logits = Callable[[torch.Tensor], torch.Tensor]
"""Token ids int64 [B, S] to logits float32 [B, S, V], V without padding."""


class LoadedModel:
    """Megatron's model with the weights of a checkpoint, in float32."""

    def __init__(self, model: Any, vocab_size: int, device: torch.device) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._device = device

    @torch.no_grad()
    def __call__(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Logits float32 [B, S, V], V without padding."""
        tokens = tokens_BS.to(self._device)
        positions = torch.arange(tokens.shape[1], device=self._device).expand_as(tokens)
        logits_BSV: torch.Tensor = self._model(tokens, positions, None)
        return logits_BSV[..., : self._vocab_size].float().cpu()

    def states(self, tokens_S: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Hidden states [S, H] of one sequence by Hugging Face's name of the place, and its logits [S, V]."""
        found: dict[str, torch.Tensor] = {}
        with listening(self._model, lambda point: point.megatron, found):
            logits_SV = self(tokens_S[None])[0]
        return {name: state_SBH[:, 0] for name, state_SBH in found.items()}, logits_SV


@contextmanager
def listening(
    model: Any, path_of: Callable[[names.HookPoint], str], found: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Put what leaves the places of ``names.COMPARED`` into ``found`` while the block runs.

    Args:
        model: Megatron's or transformers' model; modules it lacks (another pipeline stage's) are passed over.
        path_of: a place's module path in it.
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
    places = [(path_of(names.EMBEDDING), names.EMBEDDING.hugging_face)]
    layers = modules.get(path_of(names.LAYERS))
    for layer in range(0 if layers is None else len(layers)):
        for point in names.COMPARED:
            inside = f".{path_of(point)}" if path_of(point) else ""
            places.append((f"{path_of(names.LAYERS)}.{layer}{inside}", names.place_in_layer(point, layer)))
    try:
        for path, name in places:
            if path in modules:
                handles.append(modules[path].register_forward_hook(hook_as(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def load_for_inference(
    checkpoint: str | Path, config: RunConfig | None = None, vocab_size: int | None = None
) -> Iterator[LoadedModel]:
    """Rebuild the model of a checkpoint, whatever layout wrote it, on this process alone; leave it after the block.

    It is Megatron's model in float32 whatever the run computed in, so that it can be compared with another program's
    reading of the same weights. Weights of our own checkpoints are read by Megatron.

    Args:
        checkpoint: the folder.
        config: of the run, where the checkpoint is not one of ours; its weights are then read without Megatron, whose
            loader would unpickle whatever the folder holds.
        vocab_size: ids before padding, likewise.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not say what model it holds.
        ValueError: this process already belongs to a job.
    """
    if dist.is_initialized():
        raise ValueError("this process already belongs to a job; call it in a process of its own.")
    checkpoint = Path(checkpoint)
    own = config is None or vocab_size is None
    if config is None or vocab_size is None:
        extra = read_manifest(checkpoint)["extra"]
        if not isinstance(extra.get("vocab_size"), int) or not extra.get("config"):
            raise CheckpointError(f"{checkpoint / MANIFEST} lacks the run's config or its vocabulary size.")
        config, vocab_size = from_tree(RunConfig, extra["config"]), int(extra["vocab_size"])
    reader = None if own else CheckpointReader(checkpoint)
    rows = padded_vocab_size(vocab_size, config.model.make_vocab_size_divisible_by, 1)
    if reader is not None:
        rows = reader.shape("embedding.word_embeddings.weight")[0]
    parallel = ParallelConfig()
    with topology.start(parallel, config.seed) as ranks:
        chunks = build_model(
            config.model, padded_vocab_size=rows, seq_length=config.data.seq_length, parallel=parallel,
            params_dtype="fp32", recompute="none", ranks=ranks, seed=config.seed, vocab_size=vocab_size,
        )
        model = unwrap(chunks[0]).eval()
        if reader is None:
            load_weights(checkpoint, chunks, ranks)
        else:
            fill(model, reader)
        yield LoadedModel(model, vocab_size, ranks.device)


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
