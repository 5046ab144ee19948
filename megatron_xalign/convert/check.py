"""Does a converted model compute what the checkpoint computes? Both on the same tokens, compared number by number."""

# S tokens, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_xalign.errors import CheckpointError, ConfigError
from megatron_xalign.formats.atomic import read_json

TOLERANCE = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 4e-1}
"""Largest difference of a logit, by the type the folder is stored in, in units of the logits' standard deviation where
that is above 1. Seen with random weights and logits of deviation 4: right conversions 5e-6 in float32, 0.09 in float16,
0.7 in bfloat16; gate and up swapped in one layer of four 8; a wrong rotary base 7."""

MegatronLogits = Callable[[torch.Tensor], torch.Tensor]


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
    """Largest ``max_logit_difference`` that passes, in units of ``logit_deviation`` where that is above 1."""

    @property
    def holds(self) -> bool:
        """Whether the two agree."""
        return self.max_logit_difference <= self.allowed

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
            raise CheckpointError(
                f"{self.hf_folder} does not compute what {self.checkpoint} computes: logits differ by up to "
                f"{self.max_logit_difference:.3g}, where {self.allowed:.3g} is allowed; mean KL {self.mean_kl:.3g} "
                f"nats, same top token for {self.top1_agreement:.2%}, perplexity {self.perplexity_hugging_face:.4f} "
                f"against {self.perplexity_megatron:.4f}. Do not use the folder."
            )

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {**asdict(self), "allowed_logit_difference": self.allowed, "holds": self.holds}


def check(
    checkpoint: str | Path,
    hf_folder: str | Path,
    texts_or_tokens: Sequence[str] | Sequence[Sequence[int]] | torch.Tensor,
    megatron_logits: MegatronLogits,
    tolerance: float | None = None,
) -> CheckReport:
    """Run Megatron's model and transformers' class on the same tokens and compare their logits, in float32.

    Args:
        checkpoint: named in the report.
        hf_folder: what ``to_hf`` wrote.
        texts_or_tokens: texts for the folder's tokenizer, or token ids of each sequence. Longer ones than the model's
            sequence length are cut.
        megatron_logits: token ids int64 [1, S] to logits [1, S, V] of the checkpoint's model.
        tolerance: see ``CheckReport.tolerance``; default: by the type the folder is stored in.

    Raises:
        CheckpointError: the folder's tensors are not the ones its class expects.
        ConfigError: transformers is not installed, or there is nothing to compare on.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise ConfigError(
            f"checking a conversion needs transformers ({error}): pip install 'transformers>=4.48'."
        ) from None

    transformers_logging.disable_progress_bar()
    hf_folder = Path(hf_folder)
    settings = read_json(hf_folder / "config.json")
    sequences = _token_sequences(hf_folder, texts_or_tokens, settings["max_position_embeddings"])
    model, loading = AutoModelForCausalLM.from_pretrained(
        str(hf_folder), local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    wrong = {kind: sorted(map(str, loading[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise CheckpointError(
            f"{hf_folder} does not hold the tensors of {settings['architectures'][0]}: "
            + "; ".join(f"{kind} {', '.join(found)}" for kind, found in wrong.items() if found) + "."
        )
    model = model.float().eval()
    sums = _Differences()
    with torch.no_grad():
        for tokens_S in sequences:
            megatron_SV = megatron_logits(tokens_S[None])[0].double().cpu()
            hugging_face_SV = model(tokens_S[None]).logits[0].double().cpu()
            if megatron_SV.shape != hugging_face_SV.shape:
                raise CheckpointError(
                    f"{hf_folder} gives logits of shape {list(hugging_face_SV.shape)}, {checkpoint} of "
                    f"{list(megatron_SV.shape)}: their vocabularies differ."
                )
            sums.add(megatron_SV, hugging_face_SV, tokens_S)
    return sums.report(
        str(checkpoint), str(hf_folder), settings["architectures"][0],
        TOLERANCE[settings.get("torch_dtype", "float32")] if tolerance is None else tolerance,
    )


class _Differences:
    def __init__(self) -> None:
        self.sequences = self.tokens = self.predicted = self.agreeing = 0
        self.largest = self.kl = self.nll_megatron = self.nll_hugging_face = 0.0
        self.count, self.sum, self.square_sum = 0, 0.0, 0.0

    def add(self, megatron_SV: torch.Tensor, hugging_face_SV: torch.Tensor, tokens_S: torch.Tensor) -> None:
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

    def report(self, checkpoint: str, hf_folder: str, architecture: str, tolerance: float) -> CheckReport:
        variance = self.square_sum / self.count - (self.sum / self.count) ** 2
        return CheckReport(
            checkpoint=checkpoint, hf_folder=hf_folder, architecture=architecture, num_sequences=self.sequences,
            num_tokens=self.tokens, max_logit_difference=self.largest,
            logit_deviation=math.sqrt(max(variance, 0.0)), mean_kl=self.kl / self.tokens,
            top1_agreement=self.agreeing / self.tokens,
            perplexity_megatron=_exp(self.nll_megatron / self.predicted),
            perplexity_hugging_face=_exp(self.nll_hugging_face / self.predicted), tolerance=tolerance,
        )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _token_sequences(
    hf_folder: Path, texts_or_tokens: Sequence[str] | Sequence[Sequence[int]] | torch.Tensor, longest: int
) -> list[torch.Tensor]:
    items: list[Any] = list(texts_or_tokens)
    if items and isinstance(items[0], str):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(hf_folder), local_files_only=True, trust_remote_code=False)
        items = [tokenizer(text)["input_ids"] for text in items]
    sequences = [torch.as_tensor(item, dtype=torch.int64)[:longest] for item in items]
    sequences = [tokens for tokens in sequences if len(tokens) >= 2]
    if not sequences:
        raise ConfigError("there is no text of two or more tokens to compare the models on.")
    return sequences
