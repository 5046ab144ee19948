"""One function per job, readable as a paragraph; the only place where rooms meet."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from megatron_xalign.config import DataConfig, RunConfig, from_tree, to_tree, to_yaml
from megatron_xalign.errors import CheckpointError, ConfigError, CorpusError
from megatron_xalign.formats.atomic import read_json, sha256_of, write_json
from megatron_xalign.formats.run_folder import RunFolder, check_same_run, command_line, start_run

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from megatron_xalign.data.inputs import Fields, InputFormat
    from megatron_xalign.data.job_settings import JobSettings
    from megatron_xalign.data.preprocess import Outcome

CHECK_FILE = "xalign-check.json"
"""In a Hugging Face folder: the comparison with the checkpoint it was made from."""


# --- text to token files ---------------------------------------------------------------------------------------------


def registry_packages() -> list[str]:
    """Names and versions of the packages the quickstart's text comes from."""
    from megatron_xalign.data.archives import ARCHIVES

    return [f"{archive.package}=={archive.version}" for archive in ARCHIVES]


def make_corpus(
    out: Path,
    *,
    languages: Sequence[str] = ("eng_Latn", "fin_Latn"),
    cache: Path | None = None,
    num_probe: int = 300,
    seed: int = 1234,
    monolingual: Mapping[str, Path] | None = None,
    pairs: Path | None = None,
    own_folder: Path | None = None,
) -> Path:
    """Write a corpus folder: documents per language, pairs, held-out probe pairs, counts and licences.

    The text comes from registry packages, or from files of one's own: ``monolingual`` and ``pairs``, or a folder that
    holds ``LANGUAGE.jsonl`` files and ``pairs.jsonl``.
    """
    from megatron_xalign.data import corpora

    if own_folder is not None:
        monolingual, pairs = _files_of(own_folder)
    if monolingual and pairs is not None:
        return corpora.corpus_from_files(out, monolingual=monolingual, pairs=pairs, num_probe=num_probe, seed=seed)
    return corpora.fetch_corpus(out, languages=tuple(languages), cache=cache, seed=seed, num_probe=num_probe)


def _files_of(folder: Path) -> tuple[dict[str, Path], Path]:
    pairs = folder / "pairs.jsonl"
    if not pairs.is_file():
        raise CorpusError(
            f'{pairs} does not exist; a corpus folder holds pairs.jsonl ({{"id", "texts": {{language: text}}}} a line) '
            'and one LANGUAGE.jsonl ({"id", "text"} a line) per language, e.g. eng_Latn.jsonl.'
        )
    monolingual = {
        path.stem: path for path in sorted(folder.glob("*.jsonl")) if path.stem not in ("pairs", "probe")
    }
    if len(monolingual) != 2:
        raise CorpusError(
            f"{folder} holds documents in {len(monolingual)} language(s) ({', '.join(monolingual) or 'none'}); "
            "the quickstart compares two: eng_Latn.jsonl and fin_Latn.jsonl, for example."
        )
    return monolingual, pairs


def corpus_languages(corpus: Path) -> tuple[str, str]:
    """The two languages of a corpus folder."""
    from megatron_xalign.data.corpus_folder import read_corpus_folder

    return read_corpus_folder(corpus).languages


def train_tokenizer(
    corpus: Path, out: Path, vocab_size: int, model: Literal["bpe", "unigram"], **options: Any
) -> dict[str, Any]:
    """Train a tokenizer on a corpus folder, languages balanced; return its manifest with the fertility report.

    One already there that was trained on the same text with the same settings is kept.
    """
    from megatron_xalign.data.corpus_folder import read_corpus_folder

    text = read_corpus_folder(corpus)
    return _train_tokenizer(text.texts_by_language(), {"corpus": text.sha256}, out, vocab_size, model, options)


def train_tokenizer_on_files(
    inputs: Sequence[str | Path],
    fields: Sequence[Fields],
    out: Path,
    vocab_size: int,
    model: Literal["bpe", "unigram"],
    *,
    input_format: InputFormat | Literal["auto"] = "auto",
    **options: Any,
) -> dict[str, Any]:
    """The same on any files that preprocessing reads; malformed lines are passed over."""
    from megatron_xalign.data.corpus_sample import texts_of
    from megatron_xalign.data.inputs import find_inputs, plan_parts
    from megatron_xalign.data.layouts import with_layout_found

    texts: Iterator[tuple[str, str]] = iter(())
    identity: list[Any] = []
    for one in fields:
        found = find_inputs(inputs, format=input_format, fields=one)
        one = with_layout_found(found, one)
        pieces = [piece for part in plan_parts(found, one) for piece in part.pieces]
        texts = itertools.chain(texts, texts_of(pieces, one))
        identity.append([one.to_tree(), [[str(file.path), file.num_bytes, file.mtime_ns] for file in found]])
    return _train_tokenizer(texts, {"files": identity}, out, vocab_size, model, options)


def _train_tokenizer(
    texts: Any, source: dict[str, Any], out: Path, vocab_size: int, model: Literal["bpe", "unigram"],
    options: dict[str, Any],
) -> dict[str, Any]:
    from megatron_xalign.data import tokenizer

    # As it comes back from a file; infinity is no JSON.
    plain = {name: str(value) if isinstance(value, float) else value for name, value in options.items()}
    recipe = json.loads(json.dumps({**source, "vocab_size": vocab_size, "model": model, **plain}))
    recipe_path = out / "recipe.json"
    if not recipe_path.is_file() or read_json(recipe_path) != recipe:
        tokenizer.train_tokenizer(texts, out, vocab_size, model=model, **options)
        write_json(recipe_path, recipe)
    return read_json(out / "manifest.json")


def preprocess(
    inputs: Sequence[Path],
    prefix: Path,
    tokenizer: Path,
    *,
    language: str | None = None,
    pair: tuple[str, str] | None = None,
    direction: Literal["forward", "backward", "random"] = "random",
    seed: int = 1234,
    on_error: Literal["raise", "skip"] = "raise",
) -> dict[str, Any]:
    """Turn documents of one language, or pairs of two, into a token file; return its manifest."""
    from megatron_xalign.data import preprocess as job
    from megatron_xalign.data.inputs import Fields
    from megatron_xalign.data.job_settings import JobSettings

    if pair is not None:
        fields = Fields(kind="pairs", languages=pair)
    elif language is not None:
        fields = Fields(kind="monolingual", language=language)
    else:
        raise ValueError("either a language or a pair of languages is needed.")
    return job.preprocess(
        JobSettings(
            inputs=tuple(map(str, inputs)), output_prefix=str(prefix), tokenizer=str(tokenizer), fields=fields,
            direction=direction, seed=seed, on_error=on_error,
        )
    )


def preprocess_all(jobs: Sequence[JobSettings]) -> list[Outcome]:
    """Do preprocessing jobs one after the other; return what each made and took."""
    from megatron_xalign.data.preprocess import run_job

    return [run_job(_with_layout(job)) for job in jobs]


def _with_layout(job: JobSettings) -> JobSettings:
    """The job with the layout that its pairs have, where none was asked for."""
    from megatron_xalign.data.inputs import find_inputs
    from megatron_xalign.data.layouts import with_layout_found

    inputs = find_inputs(job.inputs, format=job.input_format, fields=job.fields)
    return dataclasses.replace(job, fields=with_layout_found(inputs, job.fields))


def preprocess_task(jobs: Sequence[JobSettings], task: str) -> list[dict[str, Any]]:
    """Do the parts of one task (``3/16``) of each job; return what it did."""
    from megatron_xalign.data.cluster import Task, run_task

    return [run_task(_with_layout(job), Task.parse(task)) for job in jobs]


def join_tasks(jobs: Sequence[JobSettings]) -> list[Outcome]:
    """Join the parts that the tasks of each job did."""
    from megatron_xalign.data import cluster

    return [cluster.join_tasks(_with_layout(job)) for job in jobs]


def preprocess_with_datatrove(
    jobs: Sequence[JobSettings], kind: Literal["local", "slurm", "ray"], num_tasks: int, options: Mapping[str, Any]
) -> list[Outcome] | None:
    """Do each job with an executor of datatrove; None if the jobs are in a queue now."""
    from megatron_xalign.data.cluster import run_datatrove

    outcomes = [run_datatrove(_with_layout(job), kind, num_tasks, options=options) for job in jobs]
    done = [outcome for outcome in outcomes if outcome is not None]
    return done if len(done) == len(outcomes) else None


def plan_preprocessing(jobs: Sequence[JobSettings]) -> list[dict[str, Any]]:
    """What preprocessing jobs would do, and about what that would take; touches nothing."""
    from megatron_xalign.data.preprocess import describe_plan

    return [describe_plan(_with_layout(job)) for job in jobs]


def verify(prefix: Path, tokenizer: Path | None = None, num_samples: int = 3) -> dict[str, Any]:
    """Check a token file; return what it holds, what is wrong with it, and some documents, as text if it can be."""
    from megatron_xalign.data.tokenizer import Tokenizer
    from megatron_xalign.formats.token_file import check_token_file

    loaded = Tokenizer.load(tokenizer) if tokenizer else None
    report = check_token_file(prefix, loaded, samples=num_samples)
    if loaded is not None:
        for document in report.sample:
            pieces = itertools.groupby(zip(document["languages"], document["ids"], strict=True), lambda item: item[0])
            document["text"] = [
                {"language": language, "text": loaded.decode([token for _, token in tokens])}
                for language, tokens in pieces
            ]
    return {"prefix": str(prefix), **report.to_tree()}


def merge(
    out: Path,
    prefixes: Sequence[Path],
    *,
    tokenizer: Path | None = None,
    language: str | None = None,
    origin: Literal["monolingual", "parallel"] = "monolingual",
    replace: bool = False,
) -> dict[str, Any]:
    """Join token files in order; return the manifest of the result."""
    from megatron_xalign.data.tokenizer import Tokenizer
    from megatron_xalign.formats.token_file_merge import merge_token_files

    return merge_token_files(
        prefixes, out, replace=replace, language=language, origin=origin,
        tokenizer=Tokenizer.load(tokenizer) if tokenizer else None,
    )


def token_statistics(prefix: Path, *, tokenizer: Path | None = None, language: str | None = None) -> dict[str, Any]:
    """Count what a token file holds."""
    from megatron_xalign.data.tokenizer import Tokenizer
    from megatron_xalign.formats.token_file_statistics import token_file_statistics

    loaded = Tokenizer.load(tokenizer) if tokenizer else None
    counted = token_file_statistics(prefix, language=language, tokenizer=loaded)
    if loaded is not None:
        for token in counted["frequent_ids"]:
            token["text"] = loaded.decode([token["id"]])
    return counted


def make_pairing(
    aligned: Path, out: Path, pairing: Literal["shuffled", "separated"], seed: int = 1234
) -> dict[str, Any]:
    """Make a control of a token file of aligned pairs; return its manifest."""
    from megatron_xalign.data.pairing import write_pairing

    return write_pairing(aligned, out, pairing, seed=seed)


# --- mixture and training ---------------------------------------------------------------------------------------------


def audit_blend(
    config: RunConfig, num_samples: int = 0, *, data_parallel_sizes: Sequence[int] = (),
    most_characters: int | None = None,
) -> tuple[dict[str, Any], str, list[str]]:
    """Build a run's mixture; return its audit, the audit as a table, and its first samples as text.

    The audit counts also what each of so many data-parallel ranks reads. Stretches of text are cut to
    ``most_characters``.
    """
    from megatron_xalign.data import blend as job
    from megatron_xalign.data.tokenizer import Tokenizer

    blend = job.build_blend(config)
    audit = blend.audit(data_parallel_sizes)
    samples = []
    if num_samples:
        tokenizer = Tokenizer.load(_required(config.data.tokenizer, "data.tokenizer"))
        samples = job.readable_samples(blend, tokenizer.decode, num_samples, most_characters)
    return audit, job.describe_audit(audit), samples


def compare_series(config: RunConfig, fractions: Sequence[float]) -> dict[str, Any]:
    """Build the mixtures of a series and prove that they differ in the parallel fraction only; return the report."""
    from megatron_xalign.data import series

    return series.compare_series(config, fractions)


def train(config: RunConfig) -> Path:
    """Train one model, or continue its training; return its run folder. Every process of the job calls it."""
    from megatron_xalign import topology
    from megatron_xalign.batch import CurrentBatch
    from megatron_xalign.capture.observer import NeuronObserver
    from megatron_xalign.data.blend import build_blend
    from megatron_xalign.data.evaluation import build_evaluation
    from megatron_xalign.data.tokenizer import Tokenizer
    from megatron_xalign.formats.token_file import check_same_tokenizer
    from megatron_xalign.training import checkpoint, loop
    from megatron_xalign.training.forward import build_forward_only
    from megatron_xalign.training.loading import batches_of
    from megatron_xalign.training.model import build_model, padded_vocab_size
    from megatron_xalign.training.optimizer import build_optimizer
    from megatron_xalign.training.sizes import flops_per_token
    from megatron_xalign.training.validation import ValidationObserver

    tokenizer = Tokenizer.load(_required(config.data.tokenizer, "data.tokenizer"))
    blend = build_blend(config)
    for windows in blend.windows:
        check_same_tokenizer(windows.file.manifest, tokenizer)
    # With budget_rule=add the parallel text makes the run longer than asked.
    training = dataclasses.replace(config.training, train_steps=blend.train_steps)
    probe = _tokenized_probe(config.data, tokenizer) if config.capture else []
    held_out = build_evaluation(config) if training.eval_interval_steps else None
    with topology.start(config.parallel, config.seed) as ranks:
        num_ids = _num_ids(config, tokenizer)
        vocab_size = padded_vocab_size(num_ids, config.model.make_vocab_size_divisible_by, ranks.tensor_size)
        run = RunFolder(Path(config.output_dir))
        if ranks.rank == 0:
            layout = {
                "world_size": ranks.world_size, "tensor_size": ranks.tensor_size,
                "pipeline_size": ranks.pipeline_size, "data_size": ranks.data_size,
            }
            facts = {
                "padded_vocab_size": vocab_size, "train_steps": blend.train_steps,
                "unigram_entropy": blend.unigram_entropy(),
            }
            start_run(config, command_line(), layout, facts)
            write_json(run.audit_path, blend.audit())
        ranks.barrier()
        model_chunks = build_model(
            config.model, padded_vocab_size=vocab_size, seq_length=config.data.seq_length, parallel=config.parallel,
            params_dtype=config.training.params_dtype, recompute=config.training.recompute, ranks=ranks,
            seed=config.seed, vocab_size=num_ids,
        )
        newest = checkpoint.latest_checkpoint(run.checkpoints, ranks)
        if newest is None and config.training.load_weights is not None:
            # Before the optimizer is built, which copies them to its main weights.
            checkpoint.load_weights(config.training.load_weights, model_chunks, ranks)
            log.info("weights of %s.", config.training.load_weights)
        optimizer = build_optimizer(
            model_chunks, config.optimizer, parallel=config.parallel, params_dtype=config.training.params_dtype,
            train_steps=blend.train_steps,
        )
        start_step, loss_state = 0, None
        if newest is not None:
            loaded = checkpoint.load_checkpoint(
                newest, model_chunks, optimizer.megatron, optimizer.scheduler, ranks
            )
            start_step, loss_state = loaded["step"], loaded["extra"]["loss_sums"]
            log.info("continuing from %s.", newest)
        current_batch = CurrentBatch()
        forward_only = build_forward_only(model_chunks, ranks, current_batch)
        observers: list[loop.Observer] = []
        if held_out is not None:
            # Before capture, which must not listen to it.
            observers.append(
                ValidationObserver(
                    held_out, training, seq_length=config.data.seq_length, ranks=ranks, forward_only=forward_only,
                    languages=held_out.languages, source_names=held_out.source_names, path=run.validation_path,
                    start_step=start_step,
                )
            )
        if config.capture:
            neurons = NeuronObserver(
                dataclasses.replace(config, training=training), model_chunks=model_chunks, ranks=ranks,
                current_batch=current_batch, forward_only=forward_only, probe=probe, languages=blend.languages,
                eod_id=tokenizer.eod,
            )
            if newest is not None:
                state = checkpoint.load_observer_state(newest, neurons.name, neurons.parts_of, ranks)
                if state is not None:
                    neurons.restore(state)
            observers.append(neurons)

        def save(step: int, loss_sums: loop.LossState, states: dict[str, topology.ObserverState]) -> Path:
            path = checkpoint.save_checkpoint(
                run.checkpoints, step, model_chunks, optimizer.megatron, optimizer.scheduler, ranks,
                {
                    "config": to_tree(config), "vocab_size": num_ids,
                    "tokenizer_sha256": tokenizer.sha256, "consumed_samples": step * config.training.global_batch_size,
                    "loss_sums": loss_sums,
                },
                states,
            )
            if config.training.keep_checkpoints and ranks.rank == 0:
                checkpoint.prune(run.checkpoints, config.training.keep_checkpoints)
            return path

        with batches_of(
            blend, loop.micro_batches(start_step, training, ranks), num_workers=config.data.num_workers,
            prefetch_factor=config.data.prefetch_factor, pin_memory=ranks.device.type == "cuda",
        ) as get_batch:
            loop.fit(
                model_chunks, optimizer, get_batch, training, ranks, metrics_path=run.metrics_path, save=save,
                languages=blend.languages, source_names=blend.source_names,
                parallel_sources=[item.text.name for item in blend.plan.sources if item.text.origin == "parallel"],
                flops_per_token=flops_per_token(config.model, vocab_size, config.data.seq_length),
                observers=observers, current_batch=current_batch, start_step=start_step, loss_state=loss_state,
            )
    return run.path


def is_trained(config: RunConfig) -> bool:
    """Whether a run's folder holds a whole checkpoint of its last step; the folder must not hold another run.

    Raises:
        ConfigError: the folder holds a run with other settings.
    """
    from megatron_xalign.formats import checkpoint_folder

    run = RunFolder(Path(config.output_dir))
    if not run.config_path.is_file():
        return False
    check_same_run(run, config)
    newest = checkpoint_folder.latest_checkpoint(run.checkpoints)
    return newest == checkpoint_folder.step_folder(run.checkpoints, run.train_steps())


def describe_run(config: RunConfig, processes: int | None) -> str:
    """What a training run would be: the resolved config, the model's size, memory by stage and the mixture table."""
    from megatron_xalign import terminal
    from megatron_xalign.data.tokenizer import Tokenizer
    from megatron_xalign.training.model import padded_vocab_size
    from megatron_xalign.training.sizes import flops_per_token, memory_by_stage, num_parameters

    _, table, _ = audit_blend(config)
    layout, training = config.parallel, config.training
    tokenizer = Tokenizer.load(_required(config.data.tokenizer, "data.tokenizer"))
    num_ids = _num_ids(config, tokenizer)
    rows = padded_vocab_size(
        num_ids, config.model.make_vocab_size_divisible_by, layout.tensor_model_parallel_size
    )
    data_size = max((processes or layout.model_parallel_size) // layout.model_parallel_size, 1)
    memory = memory_by_stage(
        config.model, layout, padded_vocab_size=rows, seq_length=config.data.seq_length,
        micro_batch_size=training.micro_batch_size,
        num_microbatches=max(training.global_batch_size // (training.micro_batch_size * data_size), 1),
        params_dtype=training.params_dtype, recompute=training.recompute, data_size=data_size,
    )
    flops = flops_per_token(config.model, rows, config.data.seq_length)
    return (
        f"{to_yaml(config)}\n"
        f"{num_parameters(config.model, rows):,} parameters ({rows:,} rows of vocabulary, {num_ids:,} "
        f"used); {flops / 1e9:.3g} GFLOP for each token, {flops * config.train_tokens / 1e15:.3g} PFLOP in all\n"
        f"{config.train_tokens:,} tokens in {training.train_steps:,} steps; "
        f"TP{layout.tensor_model_parallel_size} PP{layout.pipeline_model_parallel_size} on "
        f"{processes or 'as many as torchrun starts'} process(es), DP{data_size} assumed\n\n"
        f"{terminal.describe_memory(memory)}\n\n{table}"
    )


def _num_ids(config: RunConfig, tokenizer: Any) -> int:
    """Ids of the model; an imported one may have more than its tokenizer."""
    stated = config.model.vocab_size
    if stated is not None and stated < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={stated} is less than the {tokenizer.vocab_size} ids of {config.data.tokenizer}; leave "
            "it out, or use the model's own tokenizer."
        )
    return int(tokenizer.vocab_size if stated is None else stated)


def _required(path: str, setting: str) -> Path:
    if not path:
        raise ConfigError(f"{setting} is not set.")
    return Path(path)


def _tokenized_probe(data: DataConfig, tokenizer: Any) -> list[Any]:
    """Both sides of every probe pair as token ids; empty if the run has no probe."""
    from megatron_xalign.capture.probe import ProbeSentence
    from megatron_xalign.data.documents import read_probe

    if data.probe is None:
        return []
    sentences = [(pair.id, language, text) for pair in read_probe(data.probe) for language, text in pair.texts.items()]
    if not sentences:
        raise CorpusError(f"data.probe={data.probe} holds no pair; leave it out, or give held-out translations.")
    encoded = tokenizer.encode([text for _, _, text in sentences])
    return [
        ProbeSentence(pair_id=pair, language=language, tokens=tokens, num_bytes=len(text.encode("utf-8")))
        for (pair, language, text), tokens in zip(sentences, encoded, strict=True)
    ]


# --- numbers and pages ------------------------------------------------------------------------------------------------


def analyze(run: Path) -> Any:
    """Compute every measure from a run's neuron statistics and write them into the run; return them."""
    from megatron_xalign.analysis.series import analyze_run

    return analyze_run(run)


def outcome(run: Path) -> dict[str, float]:
    """Where a run ended: training loss beside the unigram entropy, retrieval at its best layer beside chance.

    Retrieval is the report's: languages centred, on the last step that was analysed.
    """
    from megatron_xalign.formats.results import read_results
    from megatron_xalign.report.series import RETRIEVAL

    results = read_results(RunFolder(run).analysis)
    last = max(row.step for row in results.rows)
    return {
        "loss": list(RunFolder(run).metrics())[-1]["loss"],
        "unigram_entropy": RunFolder(run).facts()["unigram_entropy"],
        "chance": results.context["chance"]["retrieval"],
        "retrieval": max(row.value for row in results.select(measure=RETRIEVAL, step=last)),
    }


def report(
    runs: Sequence[Path],
    out: Path,
    *,
    title: str = "Parallel data and cross-lingual alignment",
    corpus: Path | None = None,
    commands: Sequence[str] | None = None,
    hf: Mapping[str, Path] | None = None,
) -> Path:
    """Draw a series of runs on one self-contained page; return the page."""
    from megatron_xalign.report.page import write_report

    if commands is None:
        commands = [" ".join(start["command"]) for run in runs for start in RunFolder(run).facts()["starts"]]
    return write_report(list(runs), out, title=title, commands=list(commands), corpus=corpus, hf=dict(hf or {}))


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def convert_to_hf(source: Path, out: Path, *, dtype: str = "float32", tokenizer: Path | None = None) -> Path:
    """Write a checkpoint (or a run's newest) as a Hugging Face folder; return it."""
    from megatron_xalign.convert.to_hf import to_hf

    checkpoint = _checkpoint_of(source)
    return to_hf(checkpoint, out, tokenizer=tokenizer, dtype=dtype)


def convert_from_hf(folder: Path, out: Path, *, dtype: str | None = None) -> Path:
    """Write a checkpoint with the weights of a Hugging Face folder, to start training from; return it."""
    from megatron_xalign.convert.from_hf import from_hf

    return from_hf(folder, out, dtype=dtype)


def check_hf(source: Path, hf: Path, *, record: bool = True) -> dict[str, Any]:
    """Compare a Hugging Face folder's logits with Megatron's on text of the run; return the comparison.

    With ``record`` it is written into the Hugging Face folder.

    Raises:
        CheckpointError: they differ by more than the tolerance.
    """
    from megatron_xalign.convert.check import check
    from megatron_xalign.formats.checkpoint_folder import read_manifest
    from megatron_xalign.training.inference import load_for_inference

    checkpoint = _checkpoint_of(source)
    config = from_tree(RunConfig, read_manifest(checkpoint)["extra"]["config"])
    with load_for_inference(checkpoint) as megatron_logits:
        report = check(checkpoint, hf, _check_texts(config, hf), megatron_logits)
    report.require()
    if record:
        write_json(hf / CHECK_FILE, {"checkpoint_manifest_sha256": _manifest_hash(checkpoint), **report.to_json()})
    return report.to_json()


def is_converted(source: Path, hf: Path) -> bool:
    """Whether a Hugging Face folder was made from this checkpoint and passed its check."""
    path = hf / CHECK_FILE
    return path.is_file() and read_json(path)["checkpoint_manifest_sha256"] == _manifest_hash(_checkpoint_of(source))


def _check_texts(config: RunConfig, hf: Path, most: int = 32) -> list[Any]:
    """What to compare logits on: real text of every language, the run's probe; or, of a model without, token ids."""
    from megatron_xalign.data.documents import read_probe

    if config.data.probe is not None:
        pairs = list(itertools.islice(read_probe(config.data.probe), most // 2))
        return [text for pair in pairs for text in pair.texts.values()]
    import numpy as np

    # Every id as likely as any other: more of the embedding is looked at than by text.
    settings = read_json(hf / "config.json")
    length = min(settings["max_position_embeddings"], 256)
    return list(np.random.default_rng(0).integers(0, settings["vocab_size"], (most // 4, length)).tolist())


def _manifest_hash(checkpoint: Path) -> str:
    from megatron_xalign.formats.checkpoint_folder import MANIFEST

    return sha256_of(checkpoint / MANIFEST)


def _checkpoint_of(source: Path) -> Path:
    """A checkpoint folder itself, or the newest whole one of a run folder."""
    from megatron_xalign.formats import checkpoint_folder

    if not source.is_dir():
        raise CheckpointError(f"{source} does not exist; give a checkpoint folder or a run folder.")
    if (source / checkpoint_folder.MANIFEST).is_file():
        return source
    newest = checkpoint_folder.latest_checkpoint(RunFolder(source).checkpoints)
    if newest is None:
        raise CheckpointError(f"{source} holds no whole checkpoint; `xalign train` writes them into checkpoints/.")
    return newest
