"""What jobs found, as lines for a terminal; the same numbers as JSON are one ``--json`` away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xalign.formats.results import Results

if TYPE_CHECKING:
    from megatron_xalign.data.preprocess import Outcome

_MOST_FILES, _MOST_FREQUENT = 20, 10
_SHOWN = ("retrieval_centred", "retrieval", "cosine_gap", "cka", "cka_permuted", "pwcca", "pwcca_permuted", "mexa")


def describe_tokenizer(manifest: Mapping[str, Any]) -> str:
    """A tokenizer's size and, per language, how many tokens it spends on a word."""
    padded = manifest["padded_vocab"]["size"]
    lines = [
        f"{manifest['model']} tokenizer of {manifest['vocab_size']:,} entries (padded to {padded:,} for training), "
        f"end of document {manifest['eod_token']} = {manifest['eod']}, sha256 {manifest['sha256'][:12]}"
    ]
    return "\n".join([*lines, *_fertility_lines(manifest)])


def describe_fertility(report: Mapping[str, Any]) -> str:
    """How many tokens a tokenizer spends on each language."""
    first = (
        f"{report['tokenizer']}: {report['kind']}, {report['vocab_size']:,} ids, end of document "
        f"{report['eod_token']} = {report['eod']}, sha256 {report['sha256'][:12]}"
    )
    return "\n".join([first, *_fertility_lines(report)])


def _fertility_lines(report: Mapping[str, Any]) -> list[str]:
    lines = [
        f"  {language:10s}{facts['tokens_per_word']:6.2f} tokens a word, "
        f"{facts['tokens_per_character']:.3f} a character, {facts['bytes_per_token']:.2f} bytes a token, "
        f"{facts['unknown_rate']:.3%} unknown, {facts['byte_rate']:.3%} parts of characters"
        for language, facts in report["languages"].items()
    ]
    lines += [f"{number:14,}  line skipped: {why}" for why, number in report.get("skipped_lines", {}).items()]
    return lines + [f"  skipped {example}" for example in report.get("examples_of_skipped", ())]


def describe_tokenizer_plan(files: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """What a tokenizer would be trained on, and what would be made."""
    lines = [
        f"would train a {facts['model']} tokenizer of up to {facts['vocab_size']:,} entries (padded to "
        f"{facts['padded_vocab_size']:,} for training) and write it to {facts['out']}; nothing is touched"
    ]
    for file in files:
        language = f", {file['language']}" if file["language"] else ""
        lines.append(f"  {file['path']}: {file['format']}{language}, {file['bytes']:,} bytes")
    return "\n".join(lines)


def describe_token_file(manifest: Mapping[str, Any], prefix: Path | str) -> str:
    """What a token file holds, and what was left out of it and why."""
    pairing = manifest.get("pairing")
    lines = [
        f"{prefix}: {manifest['origin']}{f' ({pairing})' if pairing else ''}, {manifest['documents']:,} documents, "
        f"{manifest['tokens']:,} tokens ({manifest['dtype']})"
    ]
    lines += [f"  {language:10s}{tokens:14,} tokens" for language, tokens in manifest["tokens_by_language"].items()]
    counts = manifest.get("counts")
    if counts:
        rows = [("read", counts["read"]), ("empty", counts["empty"])]
        rows += [(f"left out: {reason}", number) for reason, number in counts.get("filtered", {}).items()]
        rows += [(f"left out: {reason}", number) for reason, number in counts.get("duplicates", {}).items()]
        rows += [(f"line skipped: {reason}", number) for reason, number in counts["skipped_lines"].items()]
        rows += [(f"language not checked: {why}", number) for why, number in manifest.get("not_checked", {}).items()]
        lines += [f"{number:14,}  {what}" for what, number in rows if number or what == "read"]
    lines += [f"  skipped {example}" for example in manifest.get("examples_of_skipped", ())]
    if manifest.get("pairing_facts"):
        lines += [f"  {name.replace('_', ' ')}: {value}" for name, value in manifest["pairing_facts"].items()]
    return "\n".join(lines)


def describe_preprocessed(outcome: Outcome) -> str:
    """What a preprocessing job made and what it took."""
    lines = [describe_token_file(manifest, prefix) for prefix, manifest in outcome.manifests.items()]
    engine = next(iter(outcome.manifests.values()))["engine"]
    figures = outcome.figures
    if figures is None:
        return "\n".join([*lines, "  up to date with its input; kept"])
    proved = engine.get("proved")
    how = f"same ids as {proved['reference']} on {proved['documents']:,} documents" if proved else engine["reason"]
    lines.append(f"  tokenised by {engine['library']} ({how})")
    if "megabytes_per_second" in figures:
        kept = f", {figures['parts_kept']} of {figures['parts']} parts from before" if figures["parts_kept"] else ""
        lines.append(
            f"  {figures['megabytes_per_second']:.2f} MB/s of text, {figures['tokens_per_second']:,} tokens/s with "
            f"{figures['workers']} worker{'s' * (figures['workers'] != 1)}, peak memory "
            f"{figures['peak_memory_bytes'] / 1e6:,.0f} MB, {figures['seconds']:.1f} s in all{kept}"
        )
    return "\n".join(lines)


def describe_preprocessing_plan(plan: Mapping[str, Any]) -> str:
    """What a preprocessing job would do."""
    inputs, engine, estimate = plan["inputs"], plan["engine"], plan["estimate"]
    lines = [f"{plan['output_prefix']}: {len(inputs):,} input files, {sum(item['bytes'] for item in inputs):,} bytes"]
    lines += [
        f"  {item['path']}  {item['format']}{'.' + item['compression'] if item['compression'] else ''}, "
        f"{item['bytes']:,} bytes{', ' + item['language'] if item['language'] else ''}"
        for item in inputs[:_MOST_FILES]
    ]
    lines += [f"  ... and {len(inputs) - _MOST_FILES:,} more"] if len(inputs) > _MOST_FILES else []
    languages = ", ".join(plan["languages"]) if plan["languages"] is not None else "as the records say"
    tokenizer = plan["tokenizer"]
    lines += [
        f"  languages: {languages}",
        f"  tokenizer: {tokenizer['kind']}, {tokenizer['vocab_size']:,} ids, end of document {tokenizer['eod']}, "
        f"sha256 {tokenizer['sha256'][:12]}",
        f"  engine: {engine['library']}"
        + (f" ({engine['reason']})" if "reason" in engine else f", same ids as {engine['proved']['reference']}"),
    ]
    lines += [f"  sentences of {code}: {item['model']}" for code, item in (plan["sentences"] or {}).items()]
    if plan["is_finished"]:
        return "\n".join([*lines, "  is there already, up to date; nothing would be done"])
    lines += [
        f"  {plan['parts']:,} parts ({plan['parts_done']:,} done), "
        f"{plan['workers']} worker{'s' * (plan['workers'] != 1)}",
        f"  about {estimate['text_bytes'] / 1e6:,.1f} MB of text, {estimate['tokens'] / 1e6:,.2f} M tokens, "
        f"{estimate['output_bytes'] / 1e6:,.1f} MB of files (twice that while they are joined), "
        f"{estimate['seconds']:,.0f} s and up",
    ]
    return "\n".join(lines)


def describe_verified(report: Mapping[str, Any]) -> str:
    """What a token file was checked for, what is wrong with it, what is in it, and some of it."""
    prefix = report["prefix"]
    if not report["good"]:
        problems = [f"  {item['check']}: {item['message']}" for item in report["problems"]]
        return "\n".join([f"{prefix}: BAD", *problems])
    lines = [
        f"{prefix}: good ({', '.join(report['checked'])}); {report['documents']:,} documents, {report['tokens']:,} "
        f"tokens, largest id {report['largest_id']}"
    ]
    for document in report["sample"]:
        lines.append(f"  document {document['document']:,}, {document['tokens']:,} tokens")
        if "text" in document:
            lines += [f"    [{piece['language'] or '-'}] {piece['text']!r}" for piece in document["text"]]
        else:
            lines.append(f"    {' '.join(map(str, document['ids'][:24]))}")
    return "\n".join(lines)


def describe_statistics(counts: Mapping[str, Any]) -> str:
    """How many documents and tokens a token file has, how long documents are, which tokens are frequent."""
    lengths = counts["document_tokens"]
    lines = [
        f"{counts['prefix']}: {counts['origin']}, {counts['documents']:,} documents, {counts['tokens']:,} tokens "
        f"({counts['dtype']}), {counts['distinct_ids']:,} different ids"
    ]
    lines += [
        f"  {code:10s}{tokens:14,} tokens in {counts['documents_by_language'][code]:,} documents"
        for code, tokens in counts["tokens_by_language"].items()
    ]
    if lengths["mean"] is not None:
        quantiles = lengths["quantiles"]
        lines.append(
            f"  tokens a document: mean {lengths['mean']:.1f}, {lengths['shortest']:,} to {lengths['longest']:,}; "
            + ", ".join(f"{float(share):.0%} {value:,}" for share, value in quantiles.items())
        )
    for code, side in counts.get("sides", {}).items():
        if side["document_tokens"]["mean"] is not None:
            lines.append(f"  {code}: {side['document_tokens']['mean']:.1f} tokens a side")
    if counts.get("length_ratio", {}).get("mean") is not None:
        lines.append(f"  longer side by shorter: {counts['length_ratio']['mean']:.2f} on average")
    frequent = [
        f"{token.get('text', token['id'])!r} {token['share']:.1%}" for token in counts["frequent_ids"][:_MOST_FREQUENT]
    ]
    return "\n".join([*lines, f"  frequent: {', '.join(frequent)}"])


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


def describe_series(report: Mapping[str, Any]) -> str:
    """What was proved of a series of mixtures, and what differs between its runs."""
    lines = [f"a series of {len(report['fractions'])} runs: {', '.join(f'{item:g}' for item in report['fractions'])}"]
    for proof in report["proofs"]:
        lines.append(f"  {'proved' if proof['holds'] else 'FAILED'}: {proof['name']}")
        lines.append(f"          {proof['detail']}")
    rows = [[entry["what"], *(_number(value) for value in entry["by_run"])] for entry in report["differs"]]
    if not rows:
        return "\n".join(lines)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["", "what differs, run by run"]
    for what, *values in rows:
        cells = "  ".join(value.rjust(width) for value, width in zip(values, widths[1:], strict=True))
        lines.append(f"  {what.ljust(widths[0])}  {cells}")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def describe_steering(report: Mapping[str, Any], out: Path) -> str:
    """What steering did, beside the same prompts unsteered."""
    target = report["options"]["target"]
    lines = [
        f"strength {report['chosen_strength']:g}, chosen among {len(report['search'])} on "
        f"{report['chosen_on']['prompts']} prompts of its own; on the reported ones:",
        f"  {'':34s}{'unsteered':>12s}{'steered':>12s}",
    ]
    for name, what in (
        ("language_rate", f"identified as {target}"), ("source_language_rate", "identified as the prompts' language"),
        ("undetermined", "too short to tell"), ("script_share", f"letters of {target}'s scripts"),
        ("perplexity", "perplexity, unsteered model"), ("context_similarity", "cosine with its prompt"),
        ("context_similarity_others", "cosine with other prompts"),
        ("distinct_2", "different 2-grams"), ("repeated_4gram_rate", "repeated 4-grams"),
    ):  # fmt: skip
        values = (report[part][name] for part in ("unsteered", "steered"))
        cells = (f"{'-':>12s}" if value is None else f"{value:12.4g}" for value in values)
        lines.append(f"  {what:34s}" + "".join(cells))
    for name in ("coherence", "fluency") if "judge" in report else ():
        judged = report["judge"]
        lines.append(f"  {'judge: ' + name:34s}{judged['unsteered'][name]:12.3g}{judged['steered'][name]:12.3g}")
    return "\n".join([*lines, f"  {out / 'steering.json'}"])


def describe_ablation(report: Mapping[str, Any], out: Path) -> str:
    """Whose neurons were switched off against whose loss changed."""
    languages = report["languages"]
    lines = [
        f"change of the loss in nats per token, over {report['num_pairs']} pairs; in brackets: as many random neurons",
        f"  {'neurons of':18s}" + "".join(f"{'loss of ' + language:>26s}" for language in languages),
    ]
    for number, language in enumerate(languages):
        cells = [
            f"{own:+.4f} ({random:+.4f})"
            for own, random in zip(*(report["change"][kind][number] for kind in ("language", "random")), strict=True)
        ]
        lines.append(
            f"  {language + ' ' + format(report['num_neurons'][language], ','):18s}"
            + "".join(f"{cell:>26s}" for cell in cells)
        )
    return "\n".join([*lines, f"  {out}"])
