"""Mixtures and training."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xalign.config import DataConfig, RunConfig, TrainingConfig
from megatron_xalign.config.tree import to_tree, to_yaml
from megatron_xalign.errors import ConfigError, CorpusError, XAlignError
from megatron_xalign.formats.atomic import write_json
from megatron_xalign.formats.run_folder import RunFolder, check_same_run, command_line, start_run
from megatron_xalign.formats.run_lock import RunLock
from megatron_xalign.job_script import check_processes
from megatron_xalign.workflows.branching import check_same_data, plan_branch

if TYPE_CHECKING:
    from megatron_xalign.topology import Ranks
    from megatron_xalign.training.observers import ObserverFactory, StatefulObserver

log = logging.getLogger(__name__)


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


def train(config: RunConfig, observers: Sequence[ObserverFactory] = ()) -> Path:
    """Train one model, or continue its training. Every process of the job calls it.

    Args:
        config: of the run.
        observers: factories of the caller's own observers, besides those that ``config.observers`` names; they are
            called with a ``RunContext`` when the model is there.

    Returns:
        The run folder.
    """
    from megatron_xalign import launch, topology
    from megatron_xalign.batch import CurrentBatch
    from megatron_xalign.batch_sizes import batch_sizes
    from megatron_xalign.capture.observer import NeuronObserver
    from megatron_xalign.data.blend import build_blend
    from megatron_xalign.data.evaluation import build_evaluation
    from megatron_xalign.data.tokenizer import Tokenizer
    from megatron_xalign.formats.checkpoint_folder import checkpoint_folders, remove_leftovers
    from megatron_xalign.formats.token_file import check_same_tokenizer
    from megatron_xalign.training import backends, checkpoint, loop
    from megatron_xalign.training.export import HfExporter
    from megatron_xalign.training.forward import build_forward_only
    from megatron_xalign.training.guard import build_guard
    from megatron_xalign.training.heartbeat import Heartbeat
    from megatron_xalign.training.loading import batches_of
    from megatron_xalign.training.metrics import with_columns_of
    from megatron_xalign.training.model import build_model, padded_vocab_size
    from megatron_xalign.training.observers import (
        Observer,
        RunContext,
        StatefulObserver,
        build_observers,
        find_factories,
        listens,
    )
    from megatron_xalign.training.optimizer import build_optimizer
    from megatron_xalign.training.saver import Saver
    from megatron_xalign.training.sizes import flops_per_token
    from megatron_xalign.training.trackers import build_trackers
    from megatron_xalign.training.validation import ValidationObserver

    factories = [*find_factories(config.observers), *observers]
    tokenizer = Tokenizer.load(_required(config.data.tokenizer, "data.tokenizer"))
    blend = build_blend(config)
    for windows in blend.windows:
        check_same_tokenizer(windows.file.manifest, tokenizer)
    fingerprint = blend.fingerprint()
    # With budget_rule=add the parallel text makes the run longer than asked.
    training = dataclasses.replace(config.training, train_steps=blend.train_steps)
    sizes = batch_sizes(training)
    probe = _tokenized_probe(config.data, tokenizer) if config.capture else []
    held_out = build_evaluation(config) if training.eval_interval_steps else None
    run, num_ids = RunFolder(Path(config.output_dir)), _num_ids(config, tokenizer)
    branch = None
    if training.load_state is not None and not checkpoint_folders(run.checkpoints):
        branch = plan_branch(config, blend, num_ids, tokenizer.sha256)
    # Before anything is built: what cannot run here is said now.
    choice = backends.choose(config, backends.look(int(os.environ.get("LOCAL_RANK", "0"))))
    with topology.start(config.parallel, config.seed) as ranks, _only_job(run, ranks):
        loop.check_batches(training, ranks)
        vocab_size = padded_vocab_size(num_ids, config.model.make_vocab_size_divisible_by, ranks.tensor_size)
        if ranks.rank == 0:
            # What a killed save left may be all the room there is.
            remove_leftovers(run.checkpoints)
            layout = {
                "world_size": ranks.world_size, "tensor_size": ranks.tensor_size,
                "pipeline_size": ranks.pipeline_size, "data_size": ranks.data_size,
                "context_size": ranks.context_size, "virtual_size": ranks.virtual_size,
            }
            facts = {
                "padded_vocab_size": vocab_size, "train_steps": sizes.num_steps,
                "unigram_entropy": blend.unigram_entropy(), **(branch.facts() if branch is not None else {}),
            }
            start_run(config, command_line(), layout, facts)
            write_json(run.audit_path, blend.audit([ranks.data_size]))
            log.info("%s: %s.", config.precision_name, choice.describe())
        ranks.barrier()
        model_chunks = build_model(
            config.model, padded_vocab_size=vocab_size, seq_length=config.data.seq_length, parallel=config.parallel,
            params_dtype=config.params_dtype, recompute=config.training.recompute, ranks=ranks,
            seed=config.seed, vocab_size=num_ids, reset_position_ids=config.data.reset_position_ids,
            reset_attention_mask=config.data.reset_attention_mask, training=training, choice=choice,
        )
        newest = checkpoint.latest_checkpoint(run.checkpoints, ranks)
        if newest is None and config.training.load_weights is not None:
            # Before the optimizer is built, which copies them to its main weights.
            checkpoint.load_weights(config.training.load_weights, model_chunks, ranks)
            log.info("weights of %s.", config.training.load_weights)
        optimizer = build_optimizer(
            model_chunks, config.optimizer, parallel=config.parallel, params_dtype=config.params_dtype,
            train_steps=blend.train_steps, schedule_unit=sizes.schedule_unit, fp16=config.fp16, choice=choice,
        )
        start_step, loss_state = 0, None
        origin = newest if newest is not None else branch.checkpoint if branch is not None else None
        if origin is not None:
            loaded = checkpoint.load_checkpoint(
                origin, model_chunks, optimizer.megatron, optimizer.scheduler, ranks, new_schedule=newest is None
            )
            start_step, loss_state = loaded["step"], loaded["extra"]["loss_sums"]
        if newest is not None:
            check_same_data(newest, loaded["extra"].get("data"), fingerprint, training.allow_changed_data)
            log.info("continuing from %s.", newest)
            if ranks.rank == 0:
                _warn_of_lost_metrics(run, start_step, training)
        elif branch is not None:
            log.info("this run %s.", branch.describe())
            if branch.counted is None or loss_state is None:
                if ranks.rank == 0:
                    log.warning("tokens of languages and sources are counted from here on.")
                loss_state = None
            else:
                loss_state = with_columns_of(loss_state, branch.counted, (blend.languages, blend.source_names))
        current_batch = CurrentBatch()
        forward_only = build_forward_only(model_chunks, ranks, current_batch)
        own = build_observers(factories, RunContext(
            config=dataclasses.replace(config, training=training), run_folder=run.path, ranks=ranks,
            model_chunks=model_chunks, forward_only=forward_only, current_batch=current_batch,
            languages=blend.languages, source_names=blend.source_names, train_steps=sizes.num_steps,
            start_step=start_step,
        ))
        for observer in own:
            if origin is not None and isinstance(observer, StatefulObserver):
                _restore(observer, origin, ranks)
        # What runs the model comes before what listens to it.
        watching: list[Observer] = [observer for observer in own if not listens(observer)]
        if held_out is not None:
            watching.append(
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
                eod_id=tokenizer.eod, score=_score_functions(),
            )
            if origin is not None and (newest is not None or (branch is not None and branch.keeps_neurons)):
                _restore(neurons, origin, ranks)
            watching.append(neurons)
        watching += [observer for observer in own if listens(observer)]

        saver = Saver(run.checkpoints, training, ranks, model_chunks, optimizer.megatron, optimizer.scheduler)
        guard = build_guard(training, ranks, check_gradients=config.fp16 is None)
        if guard is not None and origin is not None:
            _restore(guard, origin, ranks)

        def rewind() -> tuple[int, loop.LossState]:
            saver.wait()
            last = checkpoint.latest_checkpoint(run.checkpoints, ranks)
            if last is None:
                raise ConfigError(
                    "there is no checkpoint to go back to yet; use the policy skip, or a smaller "
                    "training.save_interval_steps."
                )
            found = checkpoint.load_checkpoint(last, model_chunks, optimizer.megatron, optimizer.scheduler, ranks)
            for observer in watching:
                if isinstance(observer, StatefulObserver):
                    _restore(observer, last, ranks)
            return found["step"], found["extra"]["loss_sums"]

        def save(step: int, loss_sums: loop.LossState, states: dict[str, topology.ObserverState]) -> Path:
            extra = {
                "config": to_tree(config), "vocab_size": num_ids, "tokenizer_sha256": tokenizer.sha256,
                "consumed_samples": sizes.samples_before(step), "loss_sums": loss_sums,
                "data": fingerprint,
            }
            return saver.save(step, extra, states)

        if ranks.rank == 0:
            # First in the list, so the last to hear of a step: capture has added its scores by then.
            watching[:0] = build_trackers(config, run.path, start_step)
            if training.hf_export_interval_steps:
                watching.append(HfExporter(run, training.hf_export_interval_steps, blend.train_steps))
        heartbeat = Heartbeat(
            ranks, 0.8 * config.parallel.distributed_timeout_seconds, config.parallel.heartbeat_interval_seconds,
            launch.end_stuck_job,
        )
        with batches_of(
            blend, loop.micro_batches(start_step, training, ranks), num_workers=config.data.num_workers,
            prefetch_factor=config.data.prefetch_factor, pin_memory=ranks.device.type == "cuda",
        ) as get_batch:
            loop.fit(
                model_chunks, optimizer, get_batch, training, ranks, metrics_path=run.metrics_path, save=save,
                languages=blend.languages, source_names=blend.source_names,
                parallel_sources=[item.text.name for item in blend.plan.sources if item.text.origin == "parallel"],
                flops_per_token=flops_per_token(config.model, vocab_size, config.data.seq_length),
                observers=watching, current_batch=current_batch, start_step=start_step, loss_state=loss_state,
                guard=guard, rewind=rewind, heartbeat=heartbeat,
                completed=saver.completed if training.async_save else None,
            )
            saver.wait()
    return run.path


def _restore(observer: StatefulObserver, folder: Path, ranks: Ranks) -> None:
    """Let an observer go on from what a checkpoint holds of it; one that it does not hold stays as it is."""
    from megatron_xalign.training.checkpoint import load_observer_state
    from megatron_xalign.training.observers import parts_of

    state = load_observer_state(folder, observer.name, parts_of(observer), ranks)
    if state is not None:
        observer.restore(state)


@contextmanager
def _only_job(run: RunFolder, ranks: Ranks) -> Iterator[None]:
    """Keep other jobs out of a run's folder; all processes raise if there is one."""
    lock, problem = RunLock(run.path), None
    if ranks.rank == 0:
        try:
            lock.take()
        except XAlignError as error:
            problem = error
    problem = ranks.broadcast_object(problem)
    if problem is not None:
        raise problem
    try:
        yield
    finally:
        lock.release()


def _warn_of_lost_metrics(run: RunFolder, step: int, training: TrainingConfig) -> None:
    logged = run.metrics_path.is_file() and run.metrics_path.stat().st_size > 0
    if not logged and step - run.first_step() >= training.log_interval_steps:
        log.warning("%s has no line of the %d steps done before; curves begin there.", run.metrics_path, step)


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
    from megatron_xalign.batch_sizes import batch_sizes
    from megatron_xalign.data.blend import build_blend, describe_audit
    from megatron_xalign.data.tokenizer import Tokenizer
    from megatron_xalign.training.model import padded_vocab_size
    from megatron_xalign.training.observers import find_factories
    from megatron_xalign.training.sizes import flops_per_token, memory_by_stage, num_parameters

    if processes is not None:
        check_processes(config, processes)
    find_factories(config.observers)
    blend = build_blend(config)
    table = describe_audit(blend.audit())
    layout, training = config.parallel, config.training
    tokenizer = Tokenizer.load(_required(config.data.tokenizer, "data.tokenizer"))
    num_ids = _num_ids(config, tokenizer)
    branch = ""
    if training.load_state is not None:
        branch = f"{plan_branch(config, blend, num_ids, tokenizer.sha256).describe()}\n\n"
    rows = padded_vocab_size(
        num_ids, config.model.make_vocab_size_divisible_by, layout.tensor_model_parallel_size
    )
    data_size = max((processes or layout.model_parallel_size) // layout.model_parallel_size, 1)
    memory = memory_by_stage(
        config.model, layout, padded_vocab_size=rows, seq_length=config.data.seq_length,
        micro_batch_size=training.micro_batch_size,
        num_microbatches=max(training.global_batch_size // (training.micro_batch_size * data_size), 1),
        params_dtype=config.params_dtype, recompute=training.recompute, data_size=data_size,
    )
    flops = flops_per_token(config.model, rows, config.data.seq_length)
    return (
        f"{to_yaml(config)}\n"
        f"{num_parameters(config.model, rows):,} parameters ({rows:,} rows of vocabulary, {num_ids:,} "
        f"used); {flops / 1e9:.3g} GFLOP for each token, {flops * config.train_tokens / 1e15:.3g} PFLOP in all\n"
        f"{config.train_tokens:,} tokens in {batch_sizes(training).num_steps:,} steps; "
        f"TP{layout.tensor_model_parallel_size} PP{layout.pipeline_model_parallel_size}"
        + (f" in {layout.virtual_size} blocks each" if layout.virtual_size > 1 else "")
        + f" CP{layout.context_parallel_size} on "
        f"{processes or 'as many as torchrun starts'} process(es), DP{data_size} assumed\n\n"
        f"{terminal.describe_memory(memory)}\n\n{branch}{table}"
    )


def _score_functions() -> Any:
    """The measures that capture logs at every probe."""
    from megatron_xalign.analysis import neurons, retrieval, similarity
    from megatron_xalign.capture.scores import ScoreFunctions

    return ScoreFunctions(
        average_precision=neurons.average_precision,
        lape_languages=lambda positive_KLF, tokens_K: neurons.lape(positive_KLF, tokens_K).languages_of,
        cosine_gap=lambda one_PH, other_PH: similarity.cosine(one_PH, other_PH).gap,
        retrieval=lambda one_PH, other_PH: retrieval.bitext_accuracy(one_PH, other_PH).mean,
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
