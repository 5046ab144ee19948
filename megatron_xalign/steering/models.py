"""Two ways to run a language model that can be steered: transformers' classes with a cache, and Megatron's.

Steering is a hook on every block's output, the residual stream before the final norm; it sees the prompt's tokens too.
"""

# B sequences, S tokens, V vocabulary, L layers, H features, D texts

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from megatron_xalign.errors import CheckpointError, ConfigError
from megatron_xalign.residual import change_output, pushed


@dataclass(frozen=True, kw_only=True)
class Steering:
    """What is added to the residual stream."""

    vectors_LH: np.ndarray
    """float [L, H]. One vector for each layer's output; a row of zeros leaves its layer alone."""
    strength: float
    """How far; a negative one pushes the other way."""
    norm_preserving: bool = True
    """Give every hidden state its old norm back, as in the study; otherwise only add."""
    layers: tuple[int, ...] | None = None
    """0-based layers to steer; all if left out, as in the study."""

    def __post_init__(self) -> None:
        vectors = np.asarray(self.vectors_LH)
        if vectors.ndim != 2 or not np.isfinite(vectors).all() or not np.isfinite(self.strength):
            raise ValueError(f"vectors_LH of shape {vectors.shape} and strength must be finite, [layers, features].")
        wrong = [layer for layer in self.layers or () if not 0 <= layer < len(vectors)]
        if wrong:
            raise ValueError(f"layers {wrong} are outside [0, {len(vectors)}).")


class Session(Protocol):
    """Sequences being continued."""

    def logits(self) -> torch.Tensor:
        """float32 [B, V]: of the next token of every sequence."""
        ...

    def append(self, tokens_B: torch.Tensor) -> None:
        """Add one token to every sequence."""
        ...


class CausalModel(Protocol):
    """A language model whose blocks can be listened to and steered."""

    vocab_size: int
    layers: Sequence[nn.Module]

    def begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Session:
        """Start to continue some prompts, each of at least one token."""
        ...

    def all_logits(self, tokens_BS: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """float32 [B, S, V] of sequences padded at their ends."""
        ...

    def batch_first(self, hidden: torch.Tensor) -> torch.Tensor:
        """A block's output as [B, S, H]."""
        ...


@contextmanager
def steered(model: CausalModel, steering: Steering | None) -> Iterator[None]:
    """Steer the model inside the block; the hooks are gone afterwards, whatever happens.

    Raises:
        ConfigError: the vectors are not of this model.
    """
    if steering is None:
        yield
        return
    vectors_LH = torch.from_numpy(np.ascontiguousarray(steering.vectors_LH, np.float32))
    if len(vectors_LH) != len(model.layers):
        raise ConfigError(
            f"the control vectors are of {len(vectors_LH)} layers and the model has {len(model.layers)}; make them "
            "from this model or from a run of its shape."
        )
    handles = []
    try:
        for number, layer in enumerate(model.layers):
            if steering.layers is None or number in steering.layers:
                change = _pushing(steering.strength * vectors_LH[number], steering.norm_preserving)
                handles.append(change_output(layer, change))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pushing(push_H: torch.Tensor, norm_preserving: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(hidden: torch.Tensor) -> torch.Tensor:
        nonlocal push_H
        if hidden.shape[-1] != len(push_H):
            raise ConfigError(
                f"the control vectors have {len(push_H)} features and the model's hidden states {hidden.shape[-1]}."
            )
        push_H = push_H.to(hidden.device)
        return pushed(hidden, push_H, norm_preserving)

    return change


@torch.no_grad()
def block_means(
    model: CausalModel, texts: Sequence[Sequence[int]], batch_size: int = 16
) -> np.ndarray:
    """Mean of every block's output over the tokens of each text: float64 [D, L, H]; what control vectors are made of.

    Raises:
        ValueError: a text has no token.
    """
    means: list[np.ndarray] = []
    taken: dict[int, torch.Tensor] = {}
    weight_BS = torch.zeros(0)

    def listener(number: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            hidden = model.batch_first(output[0] if isinstance(output, tuple) else output)
            taken[number] = torch.einsum("bsh,bs->bh", hidden.double(), weight_BS.to(hidden.device)).cpu()

        return hook

    handles = [layer.register_forward_hook(listener(number)) for number, layer in enumerate(model.layers)]
    try:
        for start in range(0, len(texts), batch_size):
            tokens_BS, lengths_B = _padded(texts[start : start + batch_size])
            weight_BS = (torch.arange(tokens_BS.shape[1]) < lengths_B[:, None]).double() / lengths_B[:, None]
            taken.clear()
            model.all_logits(tokens_BS, lengths_B)
            means.append(torch.stack([taken[number] for number in range(len(model.layers))], dim=1).numpy())
    finally:
        for handle in handles:
            handle.remove()
    return np.concatenate(means)


@dataclass(frozen=True)
class ContinuationLoss:
    """How likely a model finds continuations."""

    nats_D: np.ndarray
    """float64 [D]: sum over the continuation's tokens, given its prompt."""
    tokens_D: np.ndarray
    """int64 [D]."""


@torch.no_grad()
def continuation_loss(
    model: CausalModel, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]], batch_size: int = 16
) -> ContinuationLoss:
    """Loss of each continuation after its prompt, by the model as it is: call it outside ``steered``.

    Raises:
        ValueError: numbers differ, or a prompt is empty.
    """
    if len(prompts) != len(continuations) or not all(map(len, prompts)):
        raise ValueError(f"{len(prompts)} prompts (none may be empty) and {len(continuations)} continuations.")
    nats = np.zeros(len(prompts))
    for start in range(0, len(prompts), batch_size):
        pairs = list(zip(prompts, continuations, strict=True))[start : start + batch_size]
        tokens_BS, lengths_B = _padded([[*prompt, *more] for prompt, more in pairs])
        log_probability = model.all_logits(tokens_BS, lengths_B)[:, :-1].double().log_softmax(-1)
        loss_BS = -log_probability.gather(-1, tokens_BS[:, 1:, None]).squeeze(-1)
        for row, (prompt, more) in enumerate(pairs):
            nats[start + row] = float(loss_BS[row, len(prompt) - 1 : len(prompt) - 1 + len(more)].sum())
    return ContinuationLoss(nats, np.array([len(more) for more in continuations], np.int64))


def _padded(texts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts as int64 [B, S], zeros behind their ends, which no earlier token sees; and their lengths."""
    lengths_B = torch.tensor([len(text) for text in texts])
    if not len(texts) or int(lengths_B.min()) < 1:
        raise ValueError("a text has no token.")
    tokens_BS = torch.zeros((len(texts), int(lengths_B.max())), dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens_BS[row, : len(text)] = torch.as_tensor(np.array(text, np.int64))
    return tokens_BS, lengths_B


class HfModel:
    """A causal model of transformers, in evaluation mode, with cached attention and padding on the left."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.layers: Sequence[nn.Module] = list(_blocks(model))
        self.vocab_size = int(model.config.vocab_size)
        self.device = next(model.parameters()).device
        self.most_tokens: int | None = getattr(model.config, "max_position_embeddings", None)

    @classmethod
    def load(cls, folder: Path) -> HfModel:
        """Load a folder in float32, on the CUDA device if there is one; nothing is fetched and no code of it is run.

        Raises:
            ConfigError: transformers is not installed.
            CheckpointError: the folder holds no causal model it knows.
        """
        try:
            from transformers import AutoModelForCausalLM
        except ModuleNotFoundError:
            raise ConfigError(
                "models in Hugging Face's format need transformers, which is not installed: pip install "
                "'megatron-xalign[convert]'."
            ) from None
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} is not a causal model that transformers can load: {error}") from None
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"))

    def batch_first(self, hidden: torch.Tensor) -> torch.Tensor:
        """Already so."""
        return hidden

    @torch.no_grad()
    def all_logits(self, tokens_BS: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Causal: what stands behind a sequence's end cannot be seen from inside."""
        self._check_length(tokens_BS.shape[1])
        output = self.model(input_ids=tokens_BS.to(self.device), use_cache=False)
        return output.logits.float().cpu()

    def begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Session:
        """Run the prompts once; every further token then costs one column."""
        self._check_length(max(map(len, prompts)) + max_new_tokens)
        return _HfSession(self, prompts)

    def _check_length(self, length: int) -> None:
        if self.most_tokens is not None and length > self.most_tokens:
            raise ConfigError(
                f"{length} tokens are more than the model's {self.most_tokens} positions; use shorter prompts or fewer "
                "new tokens."
            )


class _HfSession:
    def __init__(self, owner: HfModel, prompts: Sequence[Sequence[int]]) -> None:
        self._owner = owner
        tokens_BS, lengths_B = _padded(prompts)
        width = tokens_BS.shape[1]
        left_BS = torch.zeros_like(tokens_BS)
        for row, length in enumerate(lengths_B.tolist()):
            left_BS[row, width - length :] = tokens_BS[row, :length]
        self._seen_BS = (torch.arange(width) >= width - lengths_B[:, None]).long().to(owner.device)
        self._cache: Any = None
        self._logits_BV = torch.zeros(0)
        self._run(left_BS.to(owner.device))

    @torch.no_grad()
    def _run(self, tokens_BS: torch.Tensor) -> None:
        positions_BS = (self._seen_BS.cumsum(-1) - 1).clamp_min(0)[:, -tokens_BS.shape[1] :]
        output = self._owner.model(
            input_ids=tokens_BS, attention_mask=self._seen_BS, position_ids=positions_BS, past_key_values=self._cache,
            use_cache=True,
        )
        self._cache = output.past_key_values
        self._logits_BV = output.logits[:, -1].float().cpu()

    def logits(self) -> torch.Tensor:
        return self._logits_BV

    def append(self, tokens_B: torch.Tensor) -> None:
        self._seen_BS = torch.cat([self._seen_BS, torch.ones_like(self._seen_BS[:, :1])], dim=1)
        self._run(tokens_B[:, None].to(self._owner.device))


def _blocks(model: Any) -> Any:
    """The list of blocks of a causal model of transformers."""
    for path in ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers"):
        place: Any = model
        for name in path.split("."):
            place = getattr(place, name, None)
        if place is not None:
            return place
    raise CheckpointError(
        f"where {type(model).__name__} keeps its blocks is not known; models like Llama, Mistral, Olmo, Qwen, GPT-2 "
        "and GPT-NeoX can be steered."
    )


@dataclass
class MegatronModel:
    """A checkpoint's model on this process, as Megatron runs it. Without a cache: every token runs the whole prefix.

    ``HfModel`` of the converted checkpoint writes the same text with one.
    """

    forward: Callable[[torch.Tensor], torch.Tensor]
    """Token ids int64 [B, S] to logits float32 [B, S, V]."""
    layers: Sequence[nn.Module]
    vocab_size: int

    def batch_first(self, hidden: torch.Tensor) -> torch.Tensor:
        """Megatron's own order is [S, B, H]."""
        return hidden.transpose(0, 1)

    def all_logits(self, tokens_BS: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """Causal: padding at the end is not seen."""
        return self.forward(tokens_BS)

    def begin(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Session:
        """Sequences grow at their ends, padded on the right."""
        return _MegatronSession(self, [list(prompt) for prompt in prompts])


@dataclass
class _MegatronSession:
    owner: MegatronModel
    sequences: list[list[int]]

    def logits(self) -> torch.Tensor:
        tokens_BS, lengths_B = _padded(self.sequences)
        return self.owner.forward(tokens_BS)[torch.arange(len(lengths_B)), lengths_B - 1]

    def append(self, tokens_B: torch.Tensor) -> None:
        for sequence, token in zip(self.sequences, tokens_B.tolist(), strict=True):
            sequence.append(token)
