"""The samples of a run, drawn from its sources so that the mixture holds at every step, and the audit of them.

Which source gives a sample is decided by counting the content tokens of the windows really drawn
(``_native.blend_windows``); then the samples of each global batch are shuffled among themselves, so that no
data-parallel rank sees another mixture than the others. Sample k of a run depends on seed, sources, mixture and global
batch size only.
"""

# N samples, W windows, S sequence, K languages

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_xalign import _native
from megatron_xalign.config import RunConfig
from megatron_xalign.data.mixture import PARALLEL, MixturePlan, SourceText, plan_mixture, too_little_text
from megatron_xalign.data.windows import SourceWindows, order_key
from megatron_xalign.errors import CorpusError, FormatError
from megatron_xalign.formats.token_file import TokenFile, companion, read_token_file

PARALLEL_TOLERANCE_SAMPLES = 1.0
"""How far the parallel fraction of a built index may be from what was asked."""
LANGUAGE_TOLERANCE_SAMPLES = 2.0
"""The same for a language's share: one sample of its monolingual text, one for the uneven halves of parallel text."""


def build_blend(config: RunConfig) -> Blend:
    """Build the index of a run's samples and check it against what was asked.

    Args:
        config: ``data`` and ``training`` of it are used.

    Returns:
        The samples; ``blend.train_steps`` steps of ``training.global_batch_size``.

    Raises:
        ConfigError: the sources cannot give what is asked.
        CorpusError: a source has less text than a sample, or the built index misses what was asked.
        FormatError: a token file is damaged, or two were made with different tokenizers.
    """
    files = [read_token_file(source.prefix) for source in config.data.sources]
    _check_one_tokenizer(files)
    texts = [
        SourceText.from_manifest(source.prefix, file.manifest, source.max_repeats)
        for source, file in zip(config.data.sources, files, strict=True)
    ]
    plan = plan_mixture(
        config.data.mixture,
        texts,
        seq_length=config.data.seq_length,
        train_steps=config.training.train_steps,
        global_batch_size=config.training.global_batch_size,
    )
    windows = [
        SourceWindows(text.name, file, plan.languages, seq_length=plan.seq_length, seed=config.data.mixture.seed)
        for text, file in zip(texts, files, strict=True)
    ]
    blend = Blend(plan, windows, _choose_sources(plan, windows))
    audit = blend.audit()
    if not audit["holds"]:
        raise CorpusError(_miss(audit))
    return blend


class Blend:
    """The samples of a run, by number."""

    def __init__(self, plan: MixturePlan, windows: Sequence[SourceWindows], source_of_sample: np.ndarray) -> None:
        """Made by :func:`build_blend`.

        Args:
            plan: what the blend holds to.
            windows: the sources.
            source_of_sample: int32 [N], before batches are shuffled.
        """
        self.plan = plan
        self.windows = list(windows)
        self.languages = list(plan.languages)
        """Codes; language ids of samples index them."""
        self.source_names = [item.text.name for item in plan.sources]
        """Source ids of samples index them."""
        self.train_steps = plan.train_steps
        """Steps of the run; more than ``training.train_steps`` with ``budget_rule: add``."""
        self.drawn = np.bincount(source_of_sample, minlength=len(windows))
        """int64: samples each source gives."""
        self._source_of_sample = source_of_sample
        self._draw_of_sample = np.empty(len(source_of_sample), dtype=np.int64)
        for index, count in enumerate(self.drawn):
            self._draw_of_sample[source_of_sample == index] = np.arange(count)
        self._shuffled: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._source_of_sample)

    def __getitem__(self, sample: int) -> dict[str, np.ndarray]:
        """Sample ``sample`` of the run as arrays [S], named as the fields of ``batch.Batch``."""
        source, draw = self.origin_of(sample)
        tokens, languages = self.windows[source].read(draw)
        seq_length = self.plan.seq_length
        return {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            # Every label bears loss, end-of-document tokens too, as in Megatron unless eod_mask_loss is set.
            "loss_mask": np.ones(seq_length, dtype=np.float32),
            "position_ids": np.arange(seq_length, dtype=np.int64),
            "language_ids": languages[:-1],
            "label_language_ids": languages[1:],
            "source_ids": np.full(seq_length, source, dtype=np.int16),
        }

    def origin_of(self, sample: int) -> tuple[int, int]:
        """Where a sample comes from: index of the source, and which of the source's samples it is."""
        if not -len(self) <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        step, slot = divmod(sample % len(self), self.plan.global_batch_size)
        if self._shuffled[0] != step:
            key = order_key(self.plan.mixture.seed, "batch", step)
            self._shuffled = (step, _native.permutation(key, self.plan.global_batch_size))
        position = step * self.plan.global_batch_size + int(self._shuffled[1][slot])
        return int(self._source_of_sample[position]), int(self._draw_of_sample[position])

    def unigram_entropy(self, most_tokens: int = 1 << 26) -> float:
        """Entropy of the token frequencies of the mixture, in nats per token: what a model that knows only them loses.

        Frequencies are those of each source's text (of its first ``most_tokens``), weighted by the samples it gives.
        """
        counts = [np.bincount(source.file.tokens[:most_tokens]).astype(np.float64) for source in self.windows]
        frequency_V = np.zeros(max(map(len, counts)))
        for drawn, count in zip(self.drawn, counts, strict=True):
            frequency_V[: len(count)] += drawn / len(self) * count / count.sum()
        seen = frequency_V[frequency_V > 0]
        return float(-(seen * np.log(seen)).sum())

    def audit(self) -> dict[str, Any]:
        """Count what the built index holds against what was asked (docs/architecture.md, audit.json)."""
        plan = self.plan
        content_jK = [
            source.content(int(count)).sum(axis=0, dtype=np.int64)
            for source, count in zip(self.windows, self.drawn, strict=True)
        ]
        sources = [self._audit_source(index, content_jK[index]) for index in range(len(self.windows))]
        content, tokens, loss = (
            sum(source[name] for source in sources) for name in ("content_tokens", "tokens", "loss_tokens")
        )
        achieved = {
            f"parallel_fraction_{kind}": _ratio(
                sum(source[name] for source in sources if source["origin"] == "parallel"), total
            )
            for kind, name, total in (
                ("content", "content_tokens", content), ("all", "tokens", tokens), ("loss", "loss_tokens", loss),
            )
        }
        fraction_of = plan.mixture.fraction_of
        languages = self._audit_languages(np.array(content_jK))
        difference, worst = self._parallel_difference()
        return {
            "asked": {
                "parallel_fraction": plan.mixture.parallel_fraction,
                "fraction_of": fraction_of,
                "budget_rule": plan.mixture.budget_rule,
                "languages": plan.asked_languages,
            },
            "achieved": {"parallel_fraction": achieved[f"parallel_fraction_{fraction_of}"], **achieved},
            "difference_samples": difference,
            "worst_difference_samples": worst,
            "holds": difference <= PARALLEL_TOLERANCE_SAMPLES
            and all(entry["difference_samples"] <= LANGUAGE_TOLERANCE_SAMPLES for entry in languages.values()),
            "samples": len(self),
            "train_steps": plan.train_steps,
            "seq_length": plan.seq_length,
            "seed": plan.mixture.seed,
            "tokens": tokens,
            "content_tokens": content,
            "loss_tokens": loss,
            "sources": sources,
            "languages": languages,
        }

    def _audit_source(self, index: int, content_K: np.ndarray) -> dict[str, Any]:
        source, text, samples = self.windows[index], self.plan.sources[index].text, int(self.drawn[index])
        begun, cut = source.documents_read(samples)
        tokens = samples * self.plan.seq_length
        return {
            "name": text.name,
            "prefix": text.prefix,
            "origin": text.origin,
            "languages": list(text.languages),
            "samples": samples,
            "tokens": tokens,
            "content_tokens": int(content_K.sum()),
            "loss_tokens": tokens,
            "content_tokens_by_language": {
                code: int(count) for code, count in zip(self.languages, content_K, strict=True) if count
            },
            "available_tokens": text.tokens,
            "repeats": _ratio(tokens, text.tokens),
            "max_repeats": text.max_repeats,
            "documents_begun": begun,
            "documents_cut": cut,
            # The tail of the stream that fills no whole window; another one in each epoch.
            "left_out_tokens_per_epoch": text.tokens - source.per_epoch * self.plan.seq_length,
        }

    def _audit_languages(self, content_jK: np.ndarray) -> dict[str, dict[str, Any]]:
        plan = self.plan
        is_parallel = np.array([item.group == PARALLEL for item in plan.sources])
        monolingual_K, parallel_K = content_jK[~is_parallel].sum(axis=0), content_jK[is_parallel].sum(axis=0)
        # With `add` shares are of monolingual text; with `replace` of all content.
        shared_K = monolingual_K if plan.mixture.budget_rule == "add" else monolingual_K + parallel_K
        steered_total = int(shared_K[np.array(plan.steered)].sum())
        entries = {}
        for index, code in enumerate(self.languages):
            missed = Fraction(0)
            if plan.steered[index]:
                missed = abs(plan.shares[index] * steered_total - int(shared_K[index]))
            entries[code] = {
                "asked": plan.asked_languages[code],
                "achieved": _ratio(int(shared_K[index]), int(shared_K.sum())),
                "steered": plan.steered[index],
                "difference_samples": float(missed / plan.seq_length),
                "content_tokens": int(monolingual_K[index] + parallel_K[index]),
                "monolingual": int(monolingual_K[index]),
                "parallel": int(parallel_K[index]),
            }
        return entries

    def _parallel_difference(self) -> tuple[float, float]:
        """Samples by which the parallel fraction misses: at the end of the run, and at its worst prefix."""
        plan = self.plan
        counted = np.full(len(self), plan.seq_length, dtype=np.int64)
        is_parallel = np.zeros(len(self), dtype=bool)
        for index, (source, count) in enumerate(zip(self.windows, self.drawn, strict=True)):
            here = self._source_of_sample == index
            if plan.mixture.fraction_of == "content":
                counted[here] = source.content(int(count)).sum(axis=1)
            is_parallel |= here & (plan.sources[index].group == PARALLEL)
        parallel = np.cumsum(np.where(is_parallel, counted, 0))
        total = np.cumsum(counted)
        fraction = plan.parallel_fraction
        # Exact at the end; the worst prefix is for information and may be a rounding error off.
        end = abs(fraction * int(total[-1]) - int(parallel[-1])) / plan.seq_length
        worst = np.abs(float(fraction) * total - parallel).max() / plan.seq_length
        return float(end), max(float(worst), float(end))


def readable_samples(blend: Blend, decode: Callable[[list[int]], str], count: int) -> list[str]:
    """The first samples of a run as text, languages marked.

    Args:
        blend: the run's samples.
        decode: token ids to text.
        count: how many samples.

    Returns:
        One text per sample: a heading, then a line for each stretch of one language.
    """
    shown = []
    for number in range(min(count, len(blend))):
        source, draw = blend.origin_of(number)
        sample = blend[number]
        lines = [f"sample {number}: {blend.source_names[source]} #{draw}"]
        pairs = zip(sample["language_ids"].tolist(), sample["tokens"].tolist(), strict=True)
        for language, stretch in itertools.groupby(pairs, key=lambda pair: pair[0]):
            mark = blend.languages[language] if language >= 0 else "-"
            text = decode([token for _, token in stretch]).replace("\n", "\\n")
            lines.append(f"  [{mark}] {text}")
        shown.append("\n".join(lines))
    return shown


def describe_audit(audit: dict[str, Any]) -> str:
    """An audit as a plain-text table: asked against achieved, per source and per language."""
    asked, achieved = audit["asked"], audit["achieved"]
    rows = [
        ["source", "origin", "samples", "tokens", "content", "of content", "repeats", "allowed", "documents", "cut"],
        *(
            [
                source["name"],
                source["origin"],
                f"{source['samples']:,}",
                f"{source['tokens']:,}",
                f"{source['content_tokens']:,}",
                f"{_ratio(source['content_tokens'], audit['content_tokens']):.4%}",
                f"{source['repeats']:.3f}",
                f"{source['max_repeats']:g}",
                f"{source['documents_begun']:,}",
                f"{source['documents_cut']:,}",
            ]
            for source in audit["sources"]
        ),
    ]
    of = "monolingual content" if asked["budget_rule"] == "add" else "content"
    language_rows = [
        ["language", "asked", "achieved", "samples off", "content", "monolingual", "parallel"],
        *(
            [
                code,
                f"{entry['asked']:.4%}" if entry["steered"] else f"(about {entry['asked']:.2%})",
                f"{entry['achieved']:.4%}",
                f"{entry['difference_samples']:.2f}" if entry["steered"] else "-",
                f"{entry['content_tokens']:,}",
                f"{entry['monolingual']:,}",
                f"{entry['parallel']:,}",
            ]
            for code, entry in audit["languages"].items()
        ),
    ]
    return "\n".join(
        [
            f"{audit['samples']:,} samples of {audit['seq_length']:,} tokens in {audit['train_steps']:,} steps: "
            f"{audit['tokens']:,} tokens, {audit['content_tokens']:,} of them content",
            f"parallel fraction of {asked['fraction_of']} tokens: asked {asked['parallel_fraction']:.4%}, achieved "
            f"{achieved['parallel_fraction']:.4%} ({audit['difference_samples']:.2f} samples off, "
            f"{audit['worst_difference_samples']:.2f} at worst on the way)",
            f"  of content tokens {achieved['parallel_fraction_content']:.4%}, of all tokens "
            f"{achieved['parallel_fraction_all']:.4%}, of loss-bearing tokens {achieved['parallel_fraction_loss']:.4%}",
            "",
            *_table(rows, left=2),
            "",
            f"languages, shares of {of} tokens",
            *_table(language_rows, left=1),
        ]
    )


def _table(rows: list[list[str]], left: int) -> list[str]:
    """Columns as wide as their widest cell; the first ``left`` flush left, numbers flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _check_one_tokenizer(files: Sequence[TokenFile]) -> None:
    for other in files[1:]:
        first, second = (file.manifest["tokenizer"]["sha256"] for file in (files[0], other))
        if first != second:
            raise FormatError(
                f"{companion(files[0].prefix, 'manifest.json')} and {companion(other.prefix, 'manifest.json')} were "
                f"made with different tokenizers ({first[:12]} and {second[:12]}); the same id would be another word "
                "in each. Preprocess both with one tokenizer."
            )


def _choose_sources(plan: MixturePlan, windows: Sequence[SourceWindows]) -> np.ndarray:
    """int32 [N]: the source of each sample, before batches are shuffled."""
    limits = [item.text.max_windows(plan.seq_length) if item.weight else 0 for item in plan.sources]
    # A choice looks one window ahead in every source, so one more than may be drawn is at hand.
    at_hand = [
        min(limit + 1, math.ceil(item.expected_samples * 1.02) + 16) if item.weight else 0
        for item, limit in zip(plan.sources, limits, strict=True)
    ]
    # Whole numbers of one scale for the C++ side.
    scale = math.lcm(*(share.denominator for share in plan.shares))
    most = max(*plan.monolingual_rates, Fraction(1, 1 << 30))
    while True:
        order, exhausted = _native.blend_windows(
            [source.content(count) for source, count in zip(windows, at_hand, strict=True)],
            plan.num_samples,
            seq_length=plan.seq_length,
            parallel_fraction=(plan.parallel_fraction.numerator, plan.parallel_fraction.denominator),
            count_all_tokens=plan.mixture.fraction_of == "all",
            parallel_fills_languages=plan.mixture.budget_rule == "replace",
            language_shares=[int(share * scale) for share in plan.shares],
            language_rates=[math.ceil(max(rate, Fraction(0)) / most * (1 << 30)) for rate in plan.monolingual_rates],
            language_of_source=[item.group for item in plan.sources],
            source_weights=[item.weight for item in plan.sources],
        )
        if exhausted is None:
            break
        if at_hand[exhausted] > limits[exhausted]:
            # All that is allowed was drawn and one more: how much the whole run asks for is known in proportion.
            wanted = at_hand[exhausted] * plan.num_samples / max(len(order), 1)
            raise too_little_text(plan, plan.sources[exhausted], wanted)
        at_hand[exhausted] = min(limits[exhausted] + 1, at_hand[exhausted] + windows[exhausted].per_epoch)
    for index, count in enumerate(np.bincount(order, minlength=len(windows))):
        if count > limits[index]:
            raise too_little_text(plan, plan.sources[index], float(count))
    return order


def _miss(audit: dict[str, Any]) -> str:
    asked, achieved = audit["asked"], audit["achieved"]
    if audit["difference_samples"] > PARALLEL_TOLERANCE_SAMPLES:
        return (
            f"the built index has a parallel fraction of {achieved['parallel_fraction']:.6f} where "
            f"data.mixture.parallel_fraction={asked['parallel_fraction']:g} was asked, "
            f"{audit['difference_samples']:.1f} samples off; one is allowed. Token counts in a manifest and in its "
            "token file may disagree: run xalign verify on the sources."
        )
    code, entry = max(audit["languages"].items(), key=lambda item: item[1]["difference_samples"])
    return (
        f"the built index has {entry['achieved']:.6f} of {code} where data.mixture.languages.{code}={entry['asked']:g} "
        f"was asked, {entry['difference_samples']:.1f} samples off; {LANGUAGE_TOLERANCE_SAMPLES:g} are allowed. "
        f"{entry['parallel']:,} of its {entry['content_tokens']:,} tokens come from parallel text, whose languages are "
        "not evenly spread: a larger share for it, or a smaller parallel fraction, leaves monolingual text enough room "
        "to even that out."
    )
