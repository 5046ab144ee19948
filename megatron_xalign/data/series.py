"""Whether the runs of a series differ in the parallel fraction only: proved on the built indices of all of them."""

# J sources, N samples

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_xalign import _native
from megatron_xalign.config import RunConfig
from megatron_xalign.data.audit import LANGUAGE_TOLERANCE, PARALLEL_TOLERANCE_SAMPLES
from megatron_xalign.data.blend import Blend, build_blend
from megatron_xalign.errors import ConfigError

# Windows (or documents) of a source that are looked into one by one, spread over all that a run draws.
_LOOKED_INTO = 512
_ROWS_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class Proof:
    """One thing that must hold between the runs of a series."""

    name: str
    holds: bool
    detail: str
    """What was compared, with numbers; where it fails, where."""


def compare_series(config: RunConfig, fractions: Sequence[float]) -> dict[str, Any]:
    """Build a series and prove that its runs differ in the parallel fraction only.

    Args:
        config: one run of it; ``data.mixture.parallel_fraction`` is replaced.
        fractions: those of the runs, in any order.

    Returns:
        ``fractions``, ``proofs`` (``name, holds, detail``), ``holds`` (all of them), ``differs`` (what differs between
        the runs, a list of ``what, by_run``), and ``runs``, the audit of each; JSON-able.

    Raises:
        ConfigError: fewer than two fractions, a fraction is given twice, or the config has a schedule; and as
            ``build_blend`` for each run.
    """
    if len(set(fractions)) != len(fractions) or len(fractions) < 2:
        raise ConfigError(f"a series needs two or more different fractions, not {', '.join(map(str, fractions))}.")
    if config.data.mixture.schedule:
        raise ConfigError("data.mixture.schedule says what the fraction is; a series of fractions cannot replace it.")
    blends = []
    for fraction in sorted(fractions):
        mixture = replace(config.data.mixture, parallel_fraction=fraction)
        blends.append(build_blend(replace(config, data=replace(config.data, mixture=mixture))))
    return compare_blends(blends)


def compare_blends(blends: Sequence[Blend]) -> dict[str, Any]:
    """The same for built runs, in the order of their fractions."""
    audits = [blend.audit() for blend in blends]
    proofs = [
        _one_order_of_every_source(blends),
        _draws_without_gaps(blends),
        _parallel_text_grows(blends),
        _language_shares_are_equal(blends, audits),
        _fractions_are_reached(audits),
    ]
    return {
        "fractions": [blend.plan.mixture.parallel_fraction for blend in blends],
        "holds": all(proof.holds for proof in proofs),
        "proofs": [vars(proof) for proof in proofs],
        "differs": _differences(blends, audits),
        "runs": audits,
    }


def _one_order_of_every_source(blends: Sequence[Blend]) -> Proof:
    """Every run that draws from a source has its first draws in common with every other one."""
    looked_into = 0
    for index, name in enumerate(blends[0].source_names):
        used = [blend for blend in blends if blend.drawn[index]]
        if not used:
            continue
        if len({str(blend.windows[index].identity) for blend in used}) > 1:
            return Proof("one order of every source", False, f"{name} is not the same text in all runs.")
        shortest = min(int(blend.drawn[index]) for blend in used)
        draws = np.unique(np.linspace(0, shortest - 1, min(shortest, _LOOKED_INTO)).astype(np.int64))
        digests = {_digest(blend, index, draws) for blend in used}
        looked_into += len(draws)
        if len(digests) > 1:
            return Proof("one order of every source", False, f"the text of {name} comes in different orders.")
    return Proof(
        "one order of every source", True,
        f"the order is one formula of name, seed and epoch; {looked_into:,} draws, spread over what all runs read, are "
        "the same documents in every run.",
    )  # fmt: skip


def _digest(blend: Blend, source: int, draws: np.ndarray) -> str:
    """What a source gives at some draws: documents and stretches of them."""
    stream, digest = blend.windows[source], hashlib.sha256()
    if blend.plan.mixes_documents:
        for draw in draws.tolist():
            digest.update(stream.document_of(draw).to_bytes(8, "little"))
        return digest.hexdigest()
    if stream.whole_documents:
        stream.prepare(int(draws[-1]) + 1)
    for draw in draws.tolist():
        if not stream.whole_documents:
            stream.load_epoch(draw // stream.num_windows())
        digest.update(stream.native.window(draw).tobytes())
    return digest.hexdigest()


def _draws_without_gaps(blends: Sequence[Blend]) -> Proof:
    """A run reads the draws 0, 1, 2, .. of every source: a prefix of its order, nothing twice, nothing left out."""
    rows = 0
    for blend in blends:
        counter, at = _native.RowCounter(len(blend.source_names)), 0
        good = True
        for begin in range(0, len(blend.order.ids_R), _ROWS_AT_A_TIME):
            counter.append(np.ascontiguousarray(blend.order.ids_R[begin : begin + _ROWS_AT_A_TIME]))
            lines = counter.take_lines()
            good = good and np.array_equal(lines, blend.order.counts[at : at + len(lines)])
            at += len(lines)
        rows += len(counter)
        if not good or not np.array_equal(counter.now(), blend.order.counts[-1]):
            fraction = blend.plan.mixture.parallel_fraction
            return Proof("a prefix of every order", False, f"the built index of fraction {fraction:g} miscounts draws.")
    return Proof(
        "a prefix of every order", True,
        f"counted again over all {rows:,} rows of the indices: draw n of a source is its nth in every run, so a run "
        "with less text of a source reads a prefix of what a run with more reads.",
    )  # fmt: skip


def _parallel_text_grows(blends: Sequence[Blend]) -> Proof:
    """The parallel text of a smaller fraction is the beginning of that of a larger one, source by source."""
    parallel = [index for index, item in enumerate(blends[0].plan.sources) if item.text.origin == "parallel"]
    drawn = np.array([[blend.drawn[index] for index in parallel] for blend in blends], dtype=np.int64)
    fractions = ", ".join(f"{blend.plan.mixture.parallel_fraction:g}" for blend in blends)
    holds = bool((np.diff(drawn, axis=0) >= 0).all())
    unit = "documents" if blends[0].plan.mixes_documents else "samples"
    shown = "; ".join(
        f"{blends[0].source_names[index]} {' <= '.join(f'{count:,}' for count in drawn[:, at].tolist())}"
        for at, index in enumerate(parallel)
    )
    return Proof("parallel text of a smaller fraction begins that of a larger one", holds,
                 f"{unit} drawn at {fractions}: {shown or 'none'}.")  # fmt: skip


def _language_shares_are_equal(blends: Sequence[Blend], audits: Sequence[dict[str, Any]]) -> Proof:
    """Every steered language has the share that was asked, in every run."""
    tolerance = LANGUAGE_TOLERANCE * max(PARALLEL_TOLERANCE_SAMPLES, *(audit["tolerance_samples"] for audit in audits))
    languages = [audit["languages"] for audit in audits]
    steered = [code for code in languages[0] if all(entries[code]["steered"] for entries in languages)]
    asked_differ = [
        code for code in steered
        if any(abs(entries[code]["asked"] - languages[0][code]["asked"]) > 1e-9 for entries in languages)
    ]  # fmt: skip
    worst, where = 0.0, ""
    for audit, blend in zip(audits, blends, strict=True):
        for code in steered:
            if audit["languages"][code]["difference_samples"] >= worst:
                worst = audit["languages"][code]["difference_samples"]
                where = f"{code} at fraction {blend.plan.mixture.parallel_fraction:g}"
    of = "monolingual text" if audits[0]["asked"]["budget_rule"] == "add" else "all content tokens"
    detail = f"shares of {of} of {', '.join(steered) or 'no language'} are at most {worst:.2f} samples off"
    detail += f" ({where}); {tolerance:g} are allowed." if where else "."
    content = [audit["content_tokens"] for audit in audits]
    detail += (
        f" Content tokens of all languages together are {max(content) / max(min(content), 1) - 1:.3%} apart: short "
        "documents spend more tokens on their ends and templates."
    )
    if asked_differ:
        detail += f" The share asked of {', '.join(asked_differ)} is not the same in all runs: name it in languages."
    return Proof("language shares are equal", worst <= tolerance and not asked_differ, detail)


def _fractions_are_reached(audits: Sequence[dict[str, Any]]) -> Proof:
    worst = max(audits, key=lambda audit: audit["difference_samples"] / audit["tolerance_samples"])
    return Proof(
        "every fraction is reached", all(audit["holds"] for audit in audits),
        f"at most {worst['difference_samples']:.2f} samples off ({worst['tolerance_samples']:.2f} allowed).",
    )  # fmt: skip


def _differences(blends: Sequence[Blend], audits: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What differs between the runs, each with its value in every run; what is equal is left out."""
    rows: list[tuple[str, list[Any]]] = [
        ("parallel fraction asked", [audit["asked"]["parallel_fraction"] for audit in audits]),
        ("parallel fraction achieved", [audit["achieved"]["parallel_fraction"] for audit in audits]),
    ]
    for name, what in (
        ("train_steps", "steps"), ("tokens", "tokens"), ("content_tokens", "content tokens"),
        ("other_tokens", "end-of-document and template tokens"), ("loss_tokens", "tokens with loss"),
        ("padding_tokens", "padding"), ("pairs", "pairs begun"), ("pairs_cut", "pairs cut"),
    ):  # fmt: skip
        rows.append((what, [audit[name] for audit in audits]))
    for code in blends[0].languages:
        for name in ("content_tokens", "monolingual", "parallel"):
            rows.append((f"{code} {name.replace('_', ' ')}", [audit["languages"][code][name] for audit in audits]))
    for index, name in enumerate(blends[0].source_names):
        for what in ("samples", "tokens", "repeats"):
            rows.append((f"source {name}: {what}", [audit["sources"][index][what] for audit in audits]))
    return [{"what": what, "by_run": values} for what, values in rows if any(value != values[0] for value in values)]
