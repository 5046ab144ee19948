"""What a built mixture holds against what was asked of it: counted while it was chosen, exact to the token.

The numbers are those of the samples as they are served: of a document that a border of a sample cuts, each side counts
what it has; padding counts for nothing; a source that ends inside an epoch counts with what was read of it.
"""

# J sources, P phases of the schedule, B slots of a global batch, K languages

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_xalign import _native
from megatron_xalign.data.mixture import PARALLEL, MixturePlan
from megatron_xalign.data.order import Order, batch_key
from megatron_xalign.data.source_stream import LeftOut, SourceStream
from megatron_xalign.data.tally import Tally, TextSums
from megatron_xalign.errors import ConfigError

PARALLEL_TOLERANCE_SAMPLES = 1.0
"""How far the parallel fraction of a built index may be from what was asked, where samples are windows of one source;
where documents are mixed it is the largest document."""
LANGUAGE_TOLERANCE = 2.0
"""The same for a language's share: one for its monolingual text, one for the uneven halves of parallel text."""

# Steps are compared rank by rank in runs of up to so many samples: some seconds.
_MOST_COMPARED_SAMPLES = 1 << 26
_SAMPLES_AT_A_TIME = 1 << 20


def audit_order(
    plan: MixturePlan, order: Order, streams: Sequence[SourceStream], data_parallel_sizes: Sequence[int] = ()
) -> dict[str, Any]:
    """Count what a built order holds against what was asked.

    Args:
        plan: what was asked.
        order: what was built.
        streams: the sources.
        data_parallel_sizes: numbers of data-parallel ranks for which every rank's part is counted; of runs of up to
            67 million samples also how far ranks are apart in a single step.

    Returns:
        The audit, JSON-able (docs/architecture.md, audit.json).

    Raises:
        ConfigError: a global batch cannot be divided over so many ranks.
    """
    tally, fraction_of = order.tally, plan.mixture.fraction_of
    sources = [_source(plan, order, streams, index) for index in range(len(streams))]
    totals = {name: sum(source[name] for source in sources) for name in ("tokens", "content_tokens", "loss_tokens")}
    parallel = [source for source in sources if source["origin"] == "parallel"]
    achieved = {
        f"parallel_fraction_{kind}": _ratio(sum(source[name] for source in parallel), totals[name])
        for kind, name in (("content", "content_tokens"), ("all", "tokens"), ("loss", "loss_tokens"))
    }
    phases, languages = _phases(plan, tally), _languages(plan, tally)
    counted, of_parallel = _counted(plan, tally.phases)
    asked = sum((_asked(plan, tally, index) for index in range(len(phases))), start=Fraction(0))
    difference = float(abs(asked - int(of_parallel.sum())) / plan.seq_length)
    padding = int(tally.padding_B.sum())
    tolerance = tolerance_samples(plan, tally)
    audit: dict[str, Any] = {
        "asked": {
            "parallel_fraction": plan.mixture.parallel_fraction
            if plan.schedule.is_constant and not plan.mixture.schedule
            else float(asked / max(int(counted.sum()), 1)),
            "fraction_of": fraction_of,
            "budget_rule": plan.mixture.budget_rule,
            "languages": plan.asked_languages,
            "packing": plan.mixture.packing,
            "keep_pairs_whole": plan.mixture.keep_pairs_whole,
            "pairing": plan.mixture.pairing,
        },
        "achieved": {"parallel_fraction": achieved[f"parallel_fraction_{fraction_of}"], **achieved},
        "difference_samples": difference,
        "worst_difference_samples": max(
            float(Fraction(tally.worst_parallel, plan.schedule.denominator * plan.seq_length)), difference
        ),
        "tolerance_samples": tolerance,
        "samples": plan.num_samples,
        "train_steps": plan.train_steps,
        "seq_length": plan.seq_length,
        "seed": plan.mixture.seed,
        **totals,
        "other_tokens": totals["tokens"] - totals["content_tokens"],
        "padding_tokens": padding,
        "padding_fraction": _ratio(padding, plan.num_samples * plan.seq_length),
        "pairs": sum(source["documents_begun"] for source in parallel),
        "pairs_cut": sum(source["documents_cut"] for source in parallel),
        "pairs_left_out": sum(source["documents_left_out"] for source in parallel),
        "sources": sources,
        "languages": languages,
        "phases": phases,
    }
    audit["holds"] = miss(audit) is None
    if data_parallel_sizes:
        audit["data_parallel"] = {str(size): _ranks(plan, order, size) for size in data_parallel_sizes}
    return audit


def tolerance_samples(plan: MixturePlan, tally: Tally) -> float:
    """How far the fraction may be off, in samples."""
    return tally.largest_row / plan.seq_length if plan.mixes_documents else PARALLEL_TOLERANCE_SAMPLES


def miss(audit: dict[str, Any]) -> str | None:
    """What of an audit is further off than it may be, and what to do; None if nothing is."""
    asked, achieved, tolerance = audit["asked"], audit["achieved"], audit["tolerance_samples"]
    suspicion = (
        "Token counts in a manifest and in its token file may disagree: run xalign verify on the sources."
    )
    if audit["difference_samples"] > tolerance:
        return (
            f"the built index has a parallel fraction of {achieved['parallel_fraction']:.6f} where "
            f"{asked['parallel_fraction']:g} was asked, {audit['difference_samples']:.2f} samples off; "
            f"{tolerance:.2f} are allowed. {suspicion}"
        )
    for number, phase in enumerate(audit["phases"]):
        # Off by as much at its beginning and at its end.
        if phase["difference_samples"] > max(2 * tolerance, PARALLEL_TOLERANCE_SAMPLES):
            return (
                f"phase {number} of data.mixture.schedule has a parallel fraction of {phase['achieved']:.6f} where "
                f"{phase['asked']:g} was asked, {phase['difference_samples']:.2f} samples off. {suspicion}"
            )
    allowed = LANGUAGE_TOLERANCE * max(tolerance, PARALLEL_TOLERANCE_SAMPLES)
    code, entry = max(audit["languages"].items(), key=lambda item: item[1]["difference_samples"])
    if entry["difference_samples"] > allowed:
        return (
            f"the built index has {entry['achieved']:.6f} of {code} where "
            f"data.mixture.languages.{code}={entry['asked']:g} was asked, {entry['difference_samples']:.1f} samples "
            f"off; {allowed:g} are allowed. {entry['parallel']:,} of its {entry['content_tokens']:,} tokens come from "
            "parallel text, whose languages are not evenly spread: a larger share for it, or a smaller parallel "
            "fraction, leaves monolingual text enough room to even that out."
        )
    return None


def _source(plan: MixturePlan, order: Order, streams: Sequence[SourceStream], index: int) -> dict[str, Any]:
    text, stream, tally = plan.sources[index].text, streams[index], order.tally
    tokens, content_K = int(tally.tokens_J[index]), tally.content_JK[index]
    drawn = int(order.drawn_J[index])
    left_out = LeftOut(0, 0) if plan.mixes_documents or not drawn else stream.left_out(0)
    whole_epochs = 0 if plan.mixes_documents or not drawn else drawn // max(stream.num_windows(0), 1)
    return {
        "name": text.name,
        "prefix": text.prefix,
        "origin": text.origin,
        "languages": list(text.languages),
        # Of mixed documents what they fill, in samples.
        "samples": tokens / plan.seq_length if plan.mixes_documents else drawn,
        "tokens": tokens,
        "content_tokens": int(content_K.sum()),
        "loss_tokens": int(tally.loss_J[index]),
        "other_tokens": tokens - int(content_K.sum()),
        "content_tokens_by_language": {
            code: int(count) for code, count in zip(plan.languages, content_K, strict=True) if count
        },
        "available_tokens": text.tokens,
        "available_documents": text.documents,
        "repeats": _ratio(tokens, text.tokens),
        "max_repeats": text.max_repeats,
        "documents_begun": int(tally.begun_J[index]),
        "documents_cut": int(tally.cut_J[index]),
        # Too long to be kept whole: of all epochs begun, or of the documents drawn.
        "documents_left_out": int(tally.left_out_J[index]) + (whole_epochs + 1) * left_out.documents,
        # The tail of the stream that fills no whole window; another one in each epoch.
        "left_out_tokens_per_epoch": left_out.tokens,
        "pairing": text.pairing if text.origin == "parallel" else None,
    }


def _counted(plan: MixturePlan, sums: TextSums) -> tuple[np.ndarray, np.ndarray]:
    """int64 [parts] each: tokens that the fraction counts, and those of parallel text among them."""
    counted = sums.tokens if plan.mixture.fraction_of == "all" else sums.content.sum(axis=2)
    return counted.sum(axis=1), counted[:, 1]


def _asked(plan: MixturePlan, tally: Tally, index: int) -> Fraction:
    """Parallel tokens that were asked of a phase, given the tokens it has."""
    phase = plan.schedule.phases[index]
    # On a slope every sample has a fraction of its own; so has a document that goes over from one phase to the next.
    if phase.begin != phase.end or (plan.mixes_documents and not plan.schedule.is_constant):
        return Fraction(tally.asked_P[index], plan.schedule.denominator)
    counted_P, _ = _counted(plan, tally.phases)
    return phase.begin * int(counted_P[index])


def _phases(plan: MixturePlan, tally: Tally) -> list[dict[str, Any]]:
    counted_P, parallel_P = (array.tolist() for array in _counted(plan, tally.phases))
    entries, begin = [], 0
    for index, phase in enumerate(plan.schedule.phases):
        is_last = index == len(plan.schedule.phases) - 1
        until = plan.num_samples
        if not is_last and phase.until_tokens is not None:
            until = min(-(-phase.until_tokens // plan.seq_length), plan.num_samples)
        asked = _asked(plan, tally, index)
        content_K = tally.phases.content[index].sum(axis=0)
        entries.append(
            {
                "begin_tokens": begin * plan.seq_length,
                "until_tokens": phase.until_tokens,
                "asked_begin": float(phase.begin),
                "asked_end": float(phase.end),
                "asked": float(asked / counted_P[index]) if counted_P[index] else float(phase.begin),
                "achieved": _ratio(parallel_P[index], counted_P[index]),
                "difference_samples": float(abs(asked - parallel_P[index]) / plan.seq_length),
                "samples": until - begin,
                "tokens": int(tally.phases.tokens[index].sum()),
                "content_tokens": int(content_K.sum()),
                "loss_tokens": int(tally.phases.loss[index].sum()),
                "languages": {
                    code: _ratio(int(count), int(content_K.sum()))
                    for code, count in zip(plan.languages, content_K, strict=True)
                },
            }
        )
        begin = until
    return entries


def _languages(plan: MixturePlan, tally: Tally) -> dict[str, dict[str, Any]]:
    is_parallel = np.array([item.group == PARALLEL for item in plan.sources])
    monolingual_K = tally.content_JK[~is_parallel].sum(axis=0)
    parallel_K = tally.content_JK[is_parallel].sum(axis=0)
    # With `add` shares are of monolingual text; with `replace` of all content.
    shared_K = monolingual_K if plan.mixture.budget_rule == "add" else monolingual_K + parallel_K
    steered_total = int(shared_K[np.array(plan.steered)].sum())
    scale = plan.share_scale
    entries = {}
    for index, code in enumerate(plan.languages):
        missed = worst = Fraction(0)
        if plan.steered[index]:
            missed = abs(plan.shares[index] * steered_total - int(shared_K[index]))
            worst = max(Fraction(tally.worst_languages_K[index], scale), missed)
        entries[code] = {
            "asked": plan.asked_languages[code],
            "achieved": _ratio(int(shared_K[index]), int(shared_K.sum())),
            "steered": plan.steered[index],
            "difference_samples": float(missed / plan.seq_length),
            "worst_difference_samples": float(worst / plan.seq_length),
            "content_tokens": int(monolingual_K[index] + parallel_K[index]),
            "monolingual": int(monolingual_K[index]),
            "parallel": int(parallel_K[index]),
        }
    return entries


def _ranks(plan: MixturePlan, order: Order, size: int) -> dict[str, Any]:
    """What each of so many data-parallel ranks reads of the run."""
    if size < 1 or plan.global_batch_size % size:
        raise ConfigError(
            f"training.global_batch_size={plan.global_batch_size} cannot be divided over {size} data-parallel ranks."
        )
    slots = order.tally.slots
    fractions: list[float] = []
    counted_B, parallel_B = _counted(plan, slots)
    ranks = []
    for part in np.split(np.arange(plan.global_batch_size), size):
        content_K = slots.content[part].sum(axis=(0, 1))
        fractions.append(_ratio(int(parallel_B[part].sum()), int(counted_B[part].sum())))
        ranks.append(
            {
                "tokens": int(slots.tokens[part].sum()),
                "content_tokens": int(content_K.sum()),
                "loss_tokens": int(slots.loss[part].sum()),
                "padding_tokens": int(order.tally.padding_B[part].sum()),
                "parallel_fraction": fractions[-1],
                "languages": {
                    code: _ratio(int(count), int(content_K.sum()))
                    for code, count in zip(plan.languages, content_K, strict=True)
                },
            }
        )
    entry: dict[str, Any] = {"ranks": ranks, "spread": max(fractions) - min(fractions)}
    if order.borders_N is None and plan.num_samples <= _MOST_COMPARED_SAMPLES:
        entry["most_uneven_step_samples"] = _most_uneven_step(plan, order, size)
    return entry


def _most_uneven_step(plan: MixturePlan, order: Order, size: int) -> int:
    """By how many parallel samples two ranks differ in the step where they differ most."""
    is_parallel_J = np.array([item.group == PARALLEL for item in plan.sources])
    batch, key, largest = plan.global_batch_size, batch_key(plan.mixture.seed), 0
    steps_at_a_time = max(_SAMPLES_AT_A_TIME // batch, 1)
    for first in range(0, plan.train_steps, steps_at_a_time):
        steps = min(steps_at_a_time, plan.train_steps - first)
        chosen = is_parallel_J[order.ids_R[first * batch : (first + steps) * batch]].reshape(steps, batch)
        served = np.take_along_axis(chosen, _native.batch_positions(key, first, steps, batch), axis=1)
        of_rank = served.reshape(steps, size, batch // size).sum(axis=2)
        largest = max(largest, int((of_rank.max(axis=1) - of_rank.min(axis=1)).max()))
    return largest


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


# --- for people ------------------------------------------------------------------------------------------------------


def describe_audit(audit: dict[str, Any]) -> str:
    """An audit as a plain-text table: asked against achieved, per source, language, phase and rank."""
    asked, achieved = audit["asked"], audit["achieved"]
    of = "monolingual content" if asked["budget_rule"] == "add" else "content"
    lines = [
        f"{audit['samples']:,} samples of {audit['seq_length']:,} tokens in {audit['train_steps']:,} steps: "
        f"{audit['tokens']:,} tokens, {audit['content_tokens']:,} of them content, {audit['loss_tokens']:,} with loss",
        f"parallel fraction of {asked['fraction_of']} tokens: asked {asked['parallel_fraction']:.4%}, achieved "
        f"{achieved['parallel_fraction']:.4%} ({audit['difference_samples']:.2f} samples off, "
        f"{audit['worst_difference_samples']:.2f} at worst on the way; {audit['tolerance_samples']:.2f} allowed)",
        f"  of content tokens {achieved['parallel_fraction_content']:.4%}, of all tokens "
        f"{achieved['parallel_fraction_all']:.4%}, of loss-bearing tokens {achieved['parallel_fraction_loss']:.4%}",
        f"packing {asked['packing']}, pairs {asked['pairing']}{', kept whole' if asked['keep_pairs_whole'] else ''}: "
        f"{audit['pairs']:,} pairs begun, {audit['pairs_cut']:,} cut, {audit['pairs_left_out']:,} too long and left "
        f"out; {audit['padding_tokens']:,} positions of padding ({audit['padding_fraction']:.3%})",
        f"holds: {'yes' if audit['holds'] else 'NO: ' + str(miss(audit))}",
        "",
        *_table(_source_rows(audit), left=2),
        "",
        f"languages, shares of {of} tokens",
        *_table(_language_rows(audit), left=1),
    ]
    if len(audit["phases"]) > 1:
        lines += ["", "phases of the schedule", *_table(_phase_rows(audit), left=0)]
    for size, entry in audit.get("data_parallel", {}).items():
        uneven = ""
        if "most_uneven_step_samples" in entry:
            uneven = f", at most {entry['most_uneven_step_samples']} parallel samples apart in a step"
        lines += [
            "",
            f"{size} data-parallel ranks: fractions {entry['spread']:.4%} apart over the run{uneven}",
            *_table(_rank_rows(entry), left=0),
        ]
    return "\n".join(lines)


def _source_rows(audit: dict[str, Any]) -> list[list[str]]:
    heading = [
        "source", "origin", "samples", "tokens", "content", "of content", "eod+template", "with loss", "repeats",
        "allowed", "documents", "cut",
    ]  # fmt: skip
    rows = [
        [
            source["name"],
            source["origin"],
            f"{source['samples']:,.1f}" if isinstance(source["samples"], float) else f"{source['samples']:,}",
            f"{source['tokens']:,}",
            f"{source['content_tokens']:,}",
            f"{_ratio(source['content_tokens'], audit['content_tokens']):.4%}",
            f"{source['other_tokens']:,}",
            f"{source['loss_tokens']:,}",
            f"{source['repeats']:.3f}",
            f"{source['max_repeats']:g}",
            f"{source['documents_begun']:,}",
            f"{source['documents_cut']:,}",
        ]
        for source in audit["sources"]
    ]
    return [heading, *rows]


def _language_rows(audit: dict[str, Any]) -> list[list[str]]:
    heading = ["language", "asked", "achieved", "samples off", "at worst", "content", "monolingual", "parallel"]
    rows = [
        [
            code,
            f"{entry['asked']:.4%}" if entry["steered"] else f"(about {entry['asked']:.2%})",
            f"{entry['achieved']:.4%}",
            f"{entry['difference_samples']:.2f}" if entry["steered"] else "-",
            f"{entry['worst_difference_samples']:.2f}" if entry["steered"] else "-",
            f"{entry['content_tokens']:,}",
            f"{entry['monolingual']:,}",
            f"{entry['parallel']:,}",
        ]
        for code, entry in audit["languages"].items()
    ]
    return [heading, *rows]


def _phase_rows(audit: dict[str, Any]) -> list[list[str]]:
    heading = ["from token", "samples", "asked", "on average", "achieved", "samples off", "content"]
    rows = []
    for phase in audit["phases"]:
        begin, end = phase["asked_begin"], phase["asked_end"]
        rows.append(
            [
                f"{phase['begin_tokens']:,}",
                f"{phase['samples']:,}",
                f"{begin:.4%}" if begin == end else f"{begin:.4%} to {end:.4%}",
                f"{phase['asked']:.4%}",
                f"{phase['achieved']:.4%}",
                f"{phase['difference_samples']:.2f}",
                f"{phase['content_tokens']:,}",
            ]
        )
    return [heading, *rows]


def _rank_rows(entry: dict[str, Any]) -> list[list[str]]:
    heading = ["rank", "tokens", "content", "with loss", "padding", "parallel"]
    rows = [
        [
            str(number),
            f"{rank['tokens']:,}",
            f"{rank['content_tokens']:,}",
            f"{rank['loss_tokens']:,}",
            f"{rank['padding_tokens']:,}",
            f"{rank['parallel_fraction']:.4%}",
        ]
        for number, rank in enumerate(entry["ranks"])
    ]
    return [heading, *rows]


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
