"""Neuron statistics of models that are not in training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_xalign.config import ParallelConfig, ParamsDtype
from megatron_xalign.errors import CheckpointError, ConfigError, CorpusError, FormatError
from megatron_xalign.formats.atomic import read_json, sha256_of, write_json
from megatron_xalign.formats.run_folder import RunFolder, command_line
from megatron_xalign.workflows.conversion import checkpoint_of

log = logging.getLogger(__name__)

"""In a folder of captured statistics: what was captured, from what, and by which command."""


def capture(
    source: Path,
    probe: Path,
    out: Path,
    *,
    layers: Sequence[int] | None = None,
    batch_tokens: int = 4096,
    dtype: str = "float32",
    prefix: str = "auto",
    step: int | None = None,
    consumed_tokens: int | None = None,
    tokenizer: Path | None = None,
    parallel: ParallelConfig | None = None,
) -> Path:
    """Put held-out translations through a checkpoint's or a Hugging Face folder's model; return the statistics folder.

    ``OUT`` then is a folder that ``analyze`` takes. Every process of the job calls it; Hugging Face models run in one.
    """
    if (out / "config.yaml").is_file():
        raise ConfigError(f"{out} holds a training run, whose own statistics would be replaced; name another folder.")
    if (source / "config.json").is_file():
        if parallel is not None and parallel.model_parallel_size > 1:
            raise ConfigError(
                f"{source} is a Hugging Face folder, which runs in one process; tensor and pipeline sizes are for "
                "checkpoints of this program."
            )
        if tokenizer is not None:
            raise ConfigError(f"{source} is a Hugging Face folder, whose own tokenizer is used; leave out --tokenizer.")
        folder, facts = _capture_hugging_face(
            source, probe, out, layers, batch_tokens, dtype, prefix, step or 0, consumed_tokens or 0
        )
    else:
        if prefix not in ("auto", "none"):
            raise ConfigError(
                f"a prefix of {prefix!r} is for Hugging Face folders; a run of this program has its end-of-document "
                "token in front of every document."
            )
        folder, facts = _capture_checkpoint(
            checkpoint_of(source), probe, out, layers, batch_tokens, dtype, prefix, step, consumed_tokens,
            tokenizer, parallel or ParallelConfig(),
        )
    if facts is not None:
        from megatron_xalign import __version__

        own = {
            "source": str(source), "probe": str(probe), "probe_file_sha256": sha256_of(probe), "version": __version__,
            "command": command_line(), **facts,
        }
        run = RunFolder(out)
        write_json(run.captures_path, {"captures": run.captures() | {folder.name: own}})
    return folder


def describe_capture(source: Path, probe: Path, out: Path) -> str:
    """What ``capture`` would do."""
    pairs, languages = _read_pairs(probe)
    sentences = sum(len(texts) for _, texts in pairs)
    if (source / "config.json").is_file():
        from megatron_xalign import names

        kind = read_json(source / "config.json").get("model_type")
        known = "known" if kind in names.HOOK_MODULES else "not known to capture"
        what = f"Hugging Face model of type {kind} ({known})"
    else:
        what = f"checkpoint {checkpoint_of(source)}"
    return f"{what}\n{len(pairs)} pairs, {sentences} sentences in {', '.join(languages)}\nwould be written to {out}"


def look_at_neurons(
    run: Path, neurons: Sequence[tuple[int, int]] = (), step: int | None = None, most: int = 8,
    tokenizer: Path | None = None,
) -> list[dict[str, Any]]:
    """What a run's sampled neurons fire on, as text: for each neuron its top tokens and some drawn at random.

    Args:
        run: a run with ``capture.sample``.
        neurons: (layer, neuron) of each; all that were sampled if empty.
        step: of the file; the newest if left out.
        most: examples of each kind.
        tokenizer: folder; default: the run's.

    Raises:
        FormatError: the run has no samples of that step.
        ConfigError: a neuron was not sampled.
    """
    from megatron_xalign.data.tokenizer import Tokenizer
    from megatron_xalign.formats.neuron_samples import Example, list_samples, read_samples

    found = dict(list_samples(run))
    if not found or (step is not None and step not in found):
        raise FormatError(
            f"{run} holds no samples{'' if step is None else f' of step {step}'}; "
            + (f"there are those of steps {', '.join(map(str, found))}." if found else "capture.sample takes them.")
        )
    samples = read_samples(found[max(found) if step is None else step])
    folder = tokenizer if tokenizer is not None else Path(RunFolder(run).config().data.tokenizer)
    engine = Tokenizer.load(folder)

    def as_text(example: Example) -> dict[str, Any]:
        return {
            "activation": example.activation, "language": example.language, "before": engine.decode(example.before),
            "token": engine.decode([example.token]), "after": engine.decode(example.after),
        }

    missing = sorted(set(neurons) - set(samples.neurons))
    if missing:
        raise ConfigError(
            f"neuron {missing[0][0]}:{missing[0][1]} was not sampled; sampled were "
            f"{', '.join(f'{layer}:{neuron}' for layer, neuron in samples.neurons)}."
        )
    return [
        {
            "layer": layer, "neuron": neuron, "step": samples.step, "first_step": samples.first_step,
            "top": [as_text(example) for example in samples.top(layer, neuron)[:most]],
            "sample": [as_text(example) for example in _spread(samples.sample(layer, neuron), most)],
        }
        for layer, neuron in neurons or samples.neurons
    ]


def _spread(items: list[Any], most: int) -> list[Any]:
    count = min(most, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _capture_hugging_face(
    source: Path, probe: Path, out: Path, layers: Sequence[int] | None, batch_tokens: int, dtype: str, prefix: str,
    step: int, consumed_tokens: int,
) -> tuple[Path, dict[str, Any] | None]:
    import torch

    from megatron_xalign import topology
    from megatron_xalign.batch import CurrentBatch
    from megatron_xalign.capture import hugging_face
    from megatron_xalign.capture.hook_points import hugging_face_points
    from megatron_xalign.capture.offline import Subject, capture_probe

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = hugging_face.load_model(source, device, dtype)
    tokenizer = hugging_face.load_tokenizer(source)
    in_front = hugging_face.prefix_token(tokenizer, prefix)
    sentences, languages = probe_sentences(probe, lambda texts: hugging_face.encode(tokenizer, texts))
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(int(sentence.tokens.max(initial=0)) for sentence in sentences)
    if largest >= rows:
        raise CheckpointError(f"the tokenizer of {source} gives token {largest}; its model has {rows} embeddings.")
    current_batch = CurrentBatch()
    subject = Subject(
        name=source.resolve().name, points=hugging_face_points(model), current_batch=current_batch,
        forward_only=hugging_face.build_forward_only(model, current_batch, device), prefix_token=in_front,
        prefix_is_end_of_document=False, longest=hugging_face.longest_sequence(model),
        longest_by="max_position_embeddings", step=step, consumed_tokens=consumed_tokens,
    )
    folder = capture_probe(
        subject, sentences, languages, out, topology.alone(device), layers=layers, batch_tokens=batch_tokens
    )
    return folder, {"kind": type(model).__name__, "dtype": dtype, "prefix_token": in_front, "device": str(device)}


def _capture_checkpoint(
    checkpoint: Path, probe: Path, out: Path, layers: Sequence[int] | None, batch_tokens: int, dtype: str,
    prefix: str, step: int | None, consumed_tokens: int | None, tokenizer_folder: Path | None,
    parallel: ParallelConfig,
) -> tuple[Path, dict[str, Any] | None]:
    from megatron_xalign.batch import CurrentBatch
    from megatron_xalign.capture.hook_points import megatron_points
    from megatron_xalign.capture.offline import Subject, capture_probe
    from megatron_xalign.data.tokenizer import Tokenizer
    from megatron_xalign.formats.checkpoint_folder import read_manifest
    from megatron_xalign.training.forward import build_forward_only
    from megatron_xalign.training.inference import load_model, read_checkpoint

    if dtype == "float16":
        raise ConfigError("checkpoints of this program are captured in float32 or bfloat16, not float16.")
    config, _, _ = read_checkpoint(checkpoint)
    path = tokenizer_folder or config.data.tokenizer
    if not path:
        raise ConfigError(f"{checkpoint} names no tokenizer in its config; give --tokenizer.")
    tokenizer = Tokenizer.load(path)
    manifest = read_manifest(checkpoint)
    trained_with = manifest["extra"].get("tokenizer_sha256")
    if trained_with and trained_with != tokenizer.sha256:
        raise FormatError(
            f"{path} is not the tokenizer {checkpoint} was trained with (SHA-256 {tokenizer.sha256[:12]}... against "
            f"{trained_with[:12]}...); its tokens would mean something else to the model."
        )
    sentences, languages = probe_sentences(probe, tokenizer.encode)
    params_dtype: ParamsDtype = "fp32" if dtype == "float32" else "bf16"
    with load_model(checkpoint, parallel, params_dtype, documents_apart=True) as loaded:
        current_batch, ranks = CurrentBatch(), loaded.ranks
        samples = manifest["extra"].get("consumed_samples")
        if samples is None:
            samples = loaded.step * config.training.global_batch_size
        trained = samples * config.data.seq_length
        subject = Subject(
            name=config.name, points=megatron_points(loaded.model_chunks, ranks), current_batch=current_batch,
            forward_only=build_forward_only(loaded.model_chunks, ranks, current_batch),
            prefix_token=None if prefix == "none" else tokenizer.eod, prefix_is_end_of_document=True,
            longest=config.data.seq_length, longest_by="data.seq_length",
            step=loaded.step if step is None else step,
            consumed_tokens=trained if consumed_tokens is None else consumed_tokens,
        )
        folder = capture_probe(subject, sentences, languages, out, ranks, layers=layers, batch_tokens=batch_tokens)
        facts = {
            "kind": "checkpoint", "checkpoint": str(checkpoint), "dtype": dtype, "prefix_token": subject.prefix_token,
            "tokenizer": str(path), "device": str(ranks.device), "tensor_size": ranks.tensor_size,
            "pipeline_size": ranks.pipeline_size,
        }
        return folder, facts if ranks.rank == 0 else None


def _read_pairs(probe: Path) -> tuple[list[tuple[str, dict[str, str]]], list[str]]:
    """Pairs by id, and their languages in the order in which they appear."""
    from megatron_xalign.data.documents import read_probe

    pairs = [(pair.id, dict(pair.texts)) for pair in read_probe(probe)]
    if not pairs:
        raise CorpusError(f"{probe} holds no pair.")
    return pairs, list(dict.fromkeys(language for _, texts in pairs for language in texts))


def probe_sentences(probe: Path, encode: Callable[[Sequence[str]], Sequence[Any]]) -> tuple[list[Any], list[str]]:
    """Every sentence of a probe file, encoded, and the languages in the order in which they appear."""
    from megatron_xalign.capture.probe import ProbeSentence

    pairs, languages = _read_pairs(probe)
    texts = [(pair, language, text) for pair, texts in pairs for language, text in texts.items()]
    encoded = encode([text for _, _, text in texts])
    return [
        ProbeSentence(pair_id=pair, language=language, tokens=tokens, num_bytes=len(text.encode("utf-8")))
        for (pair, language, text), tokens in zip(texts, encoded, strict=True)
    ], languages
