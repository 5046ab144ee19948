"""What jobs found, as lines for a terminal; the same numbers as JSON are one ``--json`` away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_xalign.formats.results import Results

_SHOWN = ("retrieval_centred", "retrieval", "cosine_gap", "cka", "cka_permuted", "pwcca", "pwcca_permuted", "mexa")


def describe_tokenizer(manifest: Mapping[str, Any]) -> str:
    """A tokenizer's size and, per language, how many tokens it spends on a word."""
    lines = [f"{manifest['model']} tokenizer of {manifest['vocab_size']:,} entries, sha256 {manifest['sha256'][:12]}"]
    for language, facts in manifest["languages"].items():
        lines.append(
            f"  {language:10s}{facts['tokens_per_word']:6.2f} tokens a word, "
            f"{facts['tokens_per_character']:.3f} a character"
        )
    return "\n".join(lines)


def describe_token_file(manifest: Mapping[str, Any], prefix: Path) -> str:
    """What a token file holds and what was left out of it."""
    counts = manifest["counts"]
    lines = [
        f"{prefix}: {manifest['origin']}, {manifest['documents']:,} documents, {manifest['tokens']:,} tokens "
        f"({manifest['dtype']}), {counts['empty']} empty texts left out"
    ]
    lines += [f"  {language:10s}{tokens:12,} tokens" for language, tokens in manifest["tokens_by_language"].items()]
    lines += [f"  skipped {number:,} lines: {reason}" for reason, number in counts["skipped_lines"].items()]
    return "\n".join(lines)


def describe_verified(prefix: Path, report: Mapping[str, Any]) -> str:
    """What a token file was checked for, and what is in it."""
    return (
        f"{prefix}: good ({', '.join(report['checked'])}); {report['documents']:,} documents, {report['tokens']:,} "
        f"tokens, largest id {report['largest_id']}"
    )


def describe_results(run: Path, results: Results) -> str:
    """Each measure of alignment at its best layer, first and last step."""
    first, last = results.steps[0], results.steps[-1]
    lines = [f"{run}: measured at steps {first} to {last}; each measure at its best layer (-1: embedding output)"]
    for measure in _SHOWN:
        rows = results.select(measure=measure, step=last)
        for subject in sorted({row.subject for row in rows}):
            best = max((row for row in rows if row.subject == subject), key=lambda row: row.value)
            before = results.select(measure=measure, step=first, layer=best.layer, subject=subject)
            lines.append(
                f"  {measure:18s}{subject:20s}{before[0].value:8.4f} -> {best.value:7.4f}  layer {best.layer}"
                if before else f"  {measure:18s}{subject:20s}{best.value:8.4f}  layer {best.layer}"
            )
    return "\n".join(lines)


def results_tree(results: Results) -> dict[str, Any]:
    """Results as plain values, for JSON."""
    return {"context": results.context, "rows": [vars(row) for row in results.rows]}


def describe_check(report: Mapping[str, Any]) -> str:
    """How far a Hugging Face folder lies from the checkpoint it was made from."""
    return (
        f"{report['hf_folder']}: {report['architecture']} equals {report['checkpoint']} on {report['num_tokens']} "
        f"tokens of {report['num_sequences']} texts: logits differ by at most {report['max_logit_difference']:.2g} "
        f"({report['tolerance']:g} allowed), same top token for {report['top1_agreement']:.2%}"
    )


def describe_memory(stages: Sequence[Any]) -> str:
    """Memory of a process of each pipeline stage by part (``training.sizes.MemoryOfRank``), as a table."""
    parts = ("weights", "gradients", "optimizer", "activations", "total")
    lines = [
        "memory of one process in GiB (activations estimated; libraries and fragmentation come on top)",
        "  stage    parameters" + "".join(f"{part:>13s}" for part in parts),
    ]
    lines += [
        f"  {stage.stage:5d}{stage.parameters:14,}" + "".join(f"{getattr(stage, part) / 2**30:13.3f}" for part in parts)
        for stage in stages
    ]
    return "\n".join(lines)
