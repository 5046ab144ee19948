"""What a run reads: sources, their mixture, samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from megatron_xalign.config.checks import require


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One token file of the mixture."""

    prefix: str
    """Path without ``.bin``/``.idx``; origin and languages come from the manifest beside it."""
    max_repeats: float = 1.0
    """How often its text may be seen; more is asked for here, never silent."""
    language: str | None = None
    """Language of a file that Megatron wrote, which has no manifest; left out for files of ``xalign preprocess``."""

    def __post_init__(self) -> None:
        require(bool(self.prefix), "prefix is empty; it is the path of a token file without its ending.")
        require(
            math.isfinite(self.max_repeats) and self.max_repeats > 0,
            f"max_repeats={self.max_repeats} must be positive and finite.",
        )
        require(self.language is None or bool(self.language), "language is empty; leave it out or write fin_Latn.")


@dataclass(frozen=True, kw_only=True)
class SchedulePhase:
    """One stretch of a schedule of the parallel fraction; it begins where the one before ends."""

    until_tokens: int
    """Tokens of the run (samples x ``data.seq_length``) at which it ends."""
    parallel_fraction: float
    """The fraction in it, or at its beginning where ``to`` is given."""
    to: float | None = None
    """The fraction at its end; it changes in a straight line, in tokens."""

    def __post_init__(self) -> None:
        require(self.until_tokens > 0, f"until_tokens={self.until_tokens} must be positive.")
        for name, value in (("parallel_fraction", self.parallel_fraction), ("to", self.to)):
            require(
                value is None or (math.isfinite(value) and 0.0 <= value <= 1.0),
                f"{name}={value} is outside [0, 1]; five percent is written 0.05.",
            )


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """How the training budget is split between monolingual and parallel text (docs/mixture.md)."""

    parallel_fraction: float = 0.0
    """Share of the tokens trained on that come from parallel documents, in [0, 1]."""
    schedule: tuple[SchedulePhase, ...] = ()
    """The fraction as it changes over the run, instead of ``parallel_fraction``; the last value holds to the end."""
    fraction_of: Literal["content", "all"] = "content"
    """Which tokens the share counts: ``content`` leaves out end-of-document and template tokens, ``all`` counts all."""
    languages: dict[str, float] = field(default_factory=dict)
    """Share of the content tokens per language, parallel tokens included; empty means equal shares of the languages
    with monolingual text."""
    budget_rule: Literal["replace", "add"] = "replace"
    """``replace``: parallel tokens take the place of monolingual ones; ``add``: the monolingual budget stays."""
    pairing: Literal["aligned", "shuffled", "separated"] = "aligned"
    """How parallel token files were made (``xalign preprocess --pairing``): the translation next to its source, next to
    another one of similar length, or as a document of its own. A file made otherwise is an error."""
    packing: Literal["source_windows", "mixed_documents"] = "source_windows"
    """A sample is a window of one source, as in Megatron; or documents of all sources one behind the other."""
    keep_pairs_whole: bool = False
    """Whether every parallel document stays inside one sample; what that leaves empty is padding without loss."""
    seed: int = 1234
    """Order of documents, windows and batches; share it between runs that are to be compared."""

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.parallel_fraction) and 0.0 <= self.parallel_fraction <= 1.0,
            f"parallel_fraction={self.parallel_fraction} is outside [0, 1]; five percent is written 0.05.",
        )
        require(
            self.budget_rule == "replace" or self.parallel_fraction < 1.0,
            "parallel_fraction=1.0 with budget_rule=add has no monolingual budget to add to; use replace.",
        )
        if self.schedule:
            self._check_schedule()
        require(self.seed >= 0, f"seed={self.seed} is negative.")
        if self.languages:
            for language, share in self.languages.items():
                require(
                    math.isfinite(share) and 0.0 < share <= 1.0, f"languages.{language}={share} is outside (0, 1]."
                )
            total = math.fsum(self.languages.values())
            require(
                abs(total - 1.0) < 1e-6,
                f"languages shares {dict(self.languages)} add up to {total:g}; they must add up to 1.",
            )

    def mean_fraction(self, tokens: int) -> float:
        """The fraction that is asked for, on average over the first ``tokens`` of a run."""
        total, begin = Fraction(0), 0
        held = Fraction(self.parallel_fraction)
        for phase in self.schedule:
            first = Fraction(phase.parallel_fraction)
            held = first if phase.to is None else Fraction(phase.to)
            end = min(phase.until_tokens, tokens)
            if end <= begin:
                break
            at_end = first + (held - first) * Fraction(end - begin, phase.until_tokens - begin)
            total += (first + at_end) / 2 * (end - begin)
            begin = end
        return float((total + held * (tokens - begin)) / tokens)

    def _check_schedule(self) -> None:
        require(
            self.parallel_fraction == 0.0,
            f"parallel_fraction={self.parallel_fraction} and schedule both say what the fraction is; leave one out.",
        )
        before = 0
        for index, phase in enumerate(self.schedule):
            require(
                phase.until_tokens > before,
                f"schedule.{index}.until_tokens={phase.until_tokens:,} is not after {before:,}, where it begins.",
            )
            before = phase.until_tokens
        last = self.schedule[-1]
        held = last.parallel_fraction if last.to is None else last.to
        require(
            self.budget_rule == "replace" or held < 1.0,
            f"schedule ends at {held:g}, which holds to the end of the run, and budget_rule=add would never reach its "
            "monolingual budget; use replace, or end below 1.",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the model reads."""

    tokenizer: str = ""
    """Folder with ``tokenizer.json`` and ``manifest.json``, as ``xalign tokenizer train`` writes it."""
    sources: tuple[SourceConfig, ...] = ()
    """Token files of the mixture."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """How they are mixed."""
    seq_length: int = 256
    """Tokens of one sample."""
    split: str = "100,0,0"
    """Documents of every source for training, validation and test, as proportions in Megatron's notation."""
    reset_position_ids: bool = False
    """Whether positions start again at every document of a sample."""
    reset_attention_mask: bool = False
    """Whether tokens attend to tokens of their own document only."""
    eod_mask_loss: bool = False
    """Whether what follows an end-of-document token bears no loss."""
    index_cache_dir: str = ""
    """Folder for index files that runs share; empty: the user's cache folder; ``none``: nothing is kept."""
    num_workers: int = 0
    """Processes of each rank that read samples ahead; 0 reads when asked, fast enough from a local disk."""
    prefetch_factor: int = 2
    """Micro-batches each of them keeps ready."""
    probe: str | None = None
    """JSON lines of held-out translations (``{"id", "texts": {language: text}}``), for capture."""

    def __post_init__(self) -> None:
        require(self.num_workers >= 0, f"num_workers={self.num_workers} is negative; 0 reads in the process itself.")
        require(self.prefetch_factor > 0, f"prefetch_factor={self.prefetch_factor} must be positive.")
        require(0 < self.seq_length < 1 << 31, f"seq_length={self.seq_length} is outside 1..2147483647.")
        parts = self.split_parts
        require(
            len(parts) == 3 and min(parts) >= 0 and parts[0] > 0,
            f"split={self.split!r} should be three proportions, for training, validation and test, the first above 0: "
            "98,1,1.",
        )

    @property
    def split_parts(self) -> tuple[Fraction, ...]:
        """``split`` as exact numbers; empty where it is not a list of numbers."""
        try:
            return tuple(Fraction(part.strip()) for part in self.split.split(","))
        except (ValueError, ZeroDivisionError):
            return ()
