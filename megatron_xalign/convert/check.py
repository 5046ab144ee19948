"""Does a converted model compute what the checkpoint computes? Both on the same tokens, compared number by number.

Logits say whether; the states inside say where: the first place (``model.layers.3.mlp``) at which they part is named.
"""

# S tokens, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from megatron_xalign.convert.hf_model import StatesListener, load_whole, run_layerwise
from megatron_xalign.errors import CheckpointError, ConfigError
from megatron_xalign.formats.atomic import read_json

TOLERANCE = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 4e-1}
"""Largest difference of a logit, by the type the folder is stored in, in units of the logits' standard deviation where
that is above 1. Seen with random weights and logits of deviation 4: right conversions 5e-6 in float32, 0.09 in float16,
0.7 in bfloat16; gate and up swapped in one layer of four 8; a wrong rotary base 7."""

MegatronLogits = Callable[[torch.Tensor], torch.Tensor]
"""Token ids int64 [1, S] to logits [1, S, V]."""

Stages = Iterator[tuple[str, list[torch.Tensor]]]
"""Name of a place and what leaves it, for each sequence; at last ``logits``."""


@runtime_checkable
class WithStates(Protocol):
    """A model that tells what is inside it."""

    def states(self, tokens_S: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Hidden states [S, H] by Hugging Face's name of the place, and logits [S, V]."""


@dataclass(frozen=True)
class CheckReport:
    """What was compared and how far it lies apart."""

    checkpoint: str
    hf_folder: str
    architecture: str
    num_sequences: int
    num_tokens: int
    max_logit_difference: float
    """Largest absolute difference of two logits."""
    logit_deviation: float
    """Standard deviation of Megatron's logits, the scale of that difference."""
    mean_kl: float
    """Mean over tokens of the Kullback-Leibler divergence from Megatron's next-token distribution, in nats."""
    top1_agreement: float
    """Share of tokens for which both find the same next token most likely."""
    perplexity_megatron: float
    perplexity_hugging_face: float
    tolerance: float
    """Largest ``max_logit_difference`` that passes, in units of ``logit_deviation`` where that is above 1; and largest
    difference of a hidden state, in units of the root mean square of its place."""
    state_differences: dict[str, float] = field(default_factory=dict)
    """Largest difference of a hidden state by place, in the order of a forward pass and in units of its root mean
    square there; empty where only logits were compared."""

    @property
    def holds(self) -> bool:
        """Whether the two agree."""
        return self.max_logit_difference <= self.allowed and self.first_difference is None

    @property
    def first_difference(self) -> str | None:
        """The first place whose states differ by more than the tolerance."""
        return next((place for place, value in self.state_differences.items() if not value <= self.tolerance), None)

    @property
    def allowed(self) -> float:
        """Largest ``max_logit_difference`` that passes."""
        return self.tolerance * max(1.0, self.logit_deviation)

    def require(self) -> None:
        """Raise if the two do not agree.

        Raises:
            CheckpointError: with the figures.
        """
        if not self.holds:
            place = self.first_difference
            where = "" if place is None else (
                f"; the first hidden states to differ leave {place}, by {self.state_differences[place]:.3g} of their "
                f"root mean square, where {self.tolerance:g} is allowed"
            )
            raise CheckpointError(
                f"{self.hf_folder} does not compute what {self.checkpoint} computes: logits differ by up to "
                f"{self.max_logit_difference:.3g}, where {self.allowed:.3g} is allowed; mean KL {self.mean_kl:.3g} "
                f"nats, same top token for {self.top1_agreement:.2%}, perplexity {self.perplexity_hugging_face:.4f} "
                f"against {self.perplexity_megatron:.4f}{where}. Do not use the folder."
            )

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            **asdict(self), "allowed_logit_difference": self.allowed, "first_difference": self.first_difference,
            "holds": self.holds,
        }


def check(
    checkpoint: str | Path,
    hf_folder: str | Path,
    texts_or_tokens: Sequence[str] | Sequence[Sequence[int]] | torch.Tensor,
    megatron: MegatronLogits | WithStates,
    tolerance: float | None = None,
) -> CheckReport:
    """Run Megatron's model and transformers' class on the same tokens and compare them, in float32.

    Args:
        checkpoint: named in the report.
        hf_folder: what ``to_hf`` wrote.
        texts_or_tokens: texts for the folder's tokenizer, or token ids of each sequence. Longer ones than the model's
            sequence length are cut.
        megatron: the checkpoint's model; of one without ``states`` only logits are compared.
        tolerance: see ``CheckReport.tolerance``; default: by the type the folder is stored in.

    Raises:
        CheckpointError: the folder's tensors are not the ones its class expects.
        ConfigError: transformers is not installed, or there is nothing to compare on.
    """
    hf_folder = Path(hf_folder)
    settings = _settings(hf_folder)
    sequences = _token_sequences(hf_folder, texts_or_tokens, settings)
    listener = StatesListener(load_whole(hf_folder))
    sums = _Differences(str(checkpoint), str(hf_folder))
    for tokens_S in sequences:
        theirs, hugging_face_SV = listener.states(tokens_S)
        if isinstance(megatron, WithStates):
            ours, megatron_SV = megatron.states(tokens_S)
            for place, state_SH in theirs.items():
                sums.add_state(place, ours[place], state_SH)
        else:
            with torch.no_grad():
                megatron_SV = megatron(tokens_S[None])[0]
        sums.add(megatron_SV, hugging_face_SV, tokens_S)
    return sums.report(settings["architectures"][0], _tolerance(settings, tolerance))


def check_layerwise(
    checkpoint: str | Path,
    hf_folder: str | Path,
    texts_or_tokens: Sequence[str] | Sequence[Sequence[int]] | torch.Tensor,
    megatron: Callable[[Sequence[torch.Tensor]], Stages],
    tolerance: float | None = None,
) -> CheckReport:
    """The same, with no more than one layer of each model in memory.

    Args:
        checkpoint: named in the report.
        hf_folder: what ``to_hf`` wrote.
        texts_or_tokens: as for ``check``.
        megatron: token sequences [S] to the states of the checkpoint's model, place by place.
        tolerance: as for ``check``.

    Raises:
        CheckpointError: as ``check``.
        ConfigError: as ``check``.
    """
    hf_folder = Path(hf_folder)
    settings = _settings(hf_folder)
    sequences = _token_sequences(hf_folder, texts_or_tokens, settings)
    sums = _Differences(str(checkpoint), str(hf_folder))
    for (place, ours), (other, theirs) in zip(megatron(sequences), run_layerwise(hf_folder, sequences), strict=True):
        if place != other:
            raise CheckpointError(f"{hf_folder} has {other} where {checkpoint} has {place}; they are other models.")
        for ours_S, theirs_S, tokens_S in zip(ours, theirs, sequences, strict=True):
            if place == "logits":
                sums.add(ours_S, theirs_S, tokens_S)
            else:
                sums.add_state(place, ours_S, theirs_S)
    return sums.report(settings["architectures"][0], _tolerance(settings, tolerance))


def _settings(hf_folder: Path) -> dict[str, Any]:
    settings = read_json(hf_folder / "config.json")
    missing = [name for name in ("architectures", "max_position_embeddings", "vocab_size") if not settings.get(name)]
    if missing:
        raise CheckpointError(f"{hf_folder / 'config.json'} does not say its {', '.join(missing)}.")
    return dict(settings)


def _tolerance(settings: dict[str, Any], stated: float | None) -> float:
    dtype = settings.get("torch_dtype") or settings.get("dtype") or "float32"
    return TOLERANCE.get(dtype, TOLERANCE["float32"]) if stated is None else stated


class _Differences:
    def __init__(self, checkpoint: str, hf_folder: str) -> None:
        self.checkpoint, self.hf_folder = checkpoint, hf_folder
        self.states: dict[str, tuple[float, float, int]] = {}
        self.sequences = self.tokens = self.predicted = self.agreeing = 0
        self.largest = self.kl = self.nll_megatron = self.nll_hugging_face = 0.0
        self.count, self.sum, self.square_sum = 0, 0.0, 0.0

    def add_state(self, place: str, ours_SH: torch.Tensor, theirs_SH: torch.Tensor) -> None:
        if ours_SH.shape != theirs_SH.shape:
            raise CheckpointError(
                f"{place} of {self.hf_folder} has states of shape {list(theirs_SH.shape)}, that of {self.checkpoint} "
                f"{list(ours_SH.shape)}."
            )
        largest, squares, count = self.states.get(place, (0.0, 0.0, 0))
        difference = float((ours_SH.double() - theirs_SH.double()).abs().max())
        largest = max(largest, difference if math.isfinite(difference) else math.inf)
        self.states[place] = (largest, squares + float(ours_SH.double().square().sum()), count + ours_SH.numel())

    def add(self, megatron_SV: torch.Tensor, hugging_face_SV: torch.Tensor, tokens_S: torch.Tensor) -> None:
        if megatron_SV.shape != hugging_face_SV.shape:
            raise CheckpointError(
                f"{self.hf_folder} gives logits of shape {list(hugging_face_SV.shape)}, {self.checkpoint} of "
                f"{list(megatron_SV.shape)}: their vocabularies differ."
            )
        megatron_SV, hugging_face_SV = megatron_SV.double().cpu(), hugging_face_SV.double().cpu()
        difference = float((megatron_SV - hugging_face_SV).abs().max())
        # NaN compares as small with everything; a difference that is no number is infinite.
        self.largest = max(self.largest, difference if math.isfinite(difference) else math.inf)
        log_p_SV, log_q_SV = megatron_SV.log_softmax(-1), hugging_face_SV.log_softmax(-1)
        self.kl += float((log_p_SV.exp() * (log_p_SV - log_q_SV)).sum())
        self.agreeing += int((megatron_SV.argmax(-1) == hugging_face_SV.argmax(-1)).sum())
        next_S = tokens_S[1:, None].cpu()
        self.nll_megatron -= float(log_p_SV[:-1].gather(1, next_S).sum())
        self.nll_hugging_face -= float(log_q_SV[:-1].gather(1, next_S).sum())
        self.count += megatron_SV.numel()
        self.sum += float(megatron_SV.sum())
        self.square_sum += float(megatron_SV.square().sum())
        self.sequences += 1
        self.tokens += len(tokens_S)
        self.predicted += len(tokens_S) - 1

    def report(self, architecture: str, tolerance: float) -> CheckReport:
        variance = self.square_sum / self.count - (self.sum / self.count) ** 2
        return CheckReport(
            checkpoint=self.checkpoint, hf_folder=self.hf_folder, architecture=architecture,
            num_sequences=self.sequences, num_tokens=self.tokens, max_logit_difference=self.largest,
            logit_deviation=math.sqrt(max(variance, 0.0)), mean_kl=self.kl / self.tokens,
            top1_agreement=self.agreeing / self.tokens,
            perplexity_megatron=_exp(self.nll_megatron / self.predicted),
            perplexity_hugging_face=_exp(self.nll_hugging_face / self.predicted), tolerance=tolerance,
            state_differences={
                place: largest / max(math.sqrt(squares / count), 1e-30)
                for place, (largest, squares, count) in self.states.items()
            },
        )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _token_sequences(
    hf_folder: Path, texts_or_tokens: Sequence[str] | Sequence[Sequence[int]] | torch.Tensor, settings: dict[str, Any]
) -> list[torch.Tensor]:
    longest, vocab_size = settings["max_position_embeddings"], settings["vocab_size"]
    items: list[Any] = list(texts_or_tokens)
    if items and isinstance(items[0], str):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(hf_folder), local_files_only=True, trust_remote_code=False)
        items = [tokenizer(text)["input_ids"] for text in items]
    sequences = [torch.as_tensor(item, dtype=torch.int64)[:longest] for item in items]
    sequences = [tokens for tokens in sequences if len(tokens) >= 2]
    largest = max((int(tokens.max()) for tokens in sequences), default=0)
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokens to compare on reach id {largest}, and {hf_folder} has {vocab_size} ids: its tokenizer is "
            "another model's."
        )
    if not sequences:
        raise ConfigError("there is no text of two or more tokens to compare the models on.")
    return sequences
