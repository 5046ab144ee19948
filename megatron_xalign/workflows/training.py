"""Mixtures and training."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xalign.config import RunConfig, TrainingConfig
from megatron_xalign.config.tree import to_tree, to_yaml
from megatron_xalign.errors import ConfigError, XAlignError
from megatron_xalign.formats.atomic import write_json
from megatron_xalign.formats.checkpoint_folder import remove_leftovers
from megatron_xalign.formats.run_folder import RunFolder, check_same_run, command_line, start_run
from megatron_xalign.formats.run_lock import RunLock
from megatron_xalign.job_script import check_processes
from megatron_xalign.workflows.branching import Branch, check_same_data
from megatron_xalign.workflows.inputs import RunInputs, read_inputs, read_tokenizer

if TYPE_CHECKING:
    from megatron_xalign.batch import CurrentBatch
    from megatron_xalign.topology import ObserverState, Ranks
    from megatron_xalign.training.loop import LossState
    from megatron_xalign.training.observers import Observer, ObserverFactory
    from megatron_xalign.training.optimizer import Optimizer

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

    blend = job.build_blend(config)
    audit = blend.audit(data_parallel_sizes)
    samples = []
    if num_samples:
        samples = job.readable_samples(blend, read_tokenizer(config).decode, num_samples, most_characters)
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
    from megatron_xalign.training import backends, loop
    from megatron_xalign.training.checkpoint import latest_checkpoint, load_weights
    from megatron_xalign.training.export import HfExporter
    from megatron_xalign.training.guard import build_guard
    from megatron_xalign.training.heartbeat import Heartbeat
    from megatron_xalign.training.loading import batches_of
    from megatron_xalign.training.model import build_model, padded_vocab_size
    from megatron_xalign.training.observers import find_factories
    from megatron_xalign.training.optimizer import build_optimizer
    from megatron_xalign.training.sizes import flops_per_token
    from megatron_xalign.training.trackers import build_trackers

    factories = [*find_factories(config.observers), *observers]
    run = RunFolder(Path(config.output_dir))
    inputs = read_inputs(config)
    blend, training, sizes = inputs.blend, inputs.training, inputs.sizes
    # Before anything is built: what cannot run here is said now.
    choice = backends.choose(config, backends.look(int(os.environ.get("LOCAL_RANK", "0"))))
    with topology.start(config.parallel, config.seed) as ranks, _only_job(run, ranks):
        loop.check_batches(training, ranks)
        vocab_size = padded_vocab_size(inputs.num_ids, config.model.make_vocab_size_divisible_by, ranks.tensor_size)
        if ranks.rank == 0:
            _open_folder(run, inputs, vocab_size, ranks)
            log.info("%s: %s.", config.precision_name, choice.describe())
        ranks.barrier()
        model_chunks = build_model(
            config.model, padded_vocab_size=vocab_size, seq_length=config.data.seq_length, parallel=config.parallel,
            params_dtype=config.params_dtype, recompute=config.training.recompute, ranks=ranks,
            seed=config.seed, vocab_size=inputs.num_ids, reset_position_ids=config.data.reset_position_ids,
            reset_attention_mask=config.data.reset_attention_mask, training=training, choice=choice,
        )
        newest = latest_checkpoint(run.checkpoints, ranks)
        if newest is None and config.training.load_weights is not None:
            # Before the optimizer is built, which copies them to its main weights.
            load_weights(config.training.load_weights, model_chunks, ranks)
            log.info("weights of %s.", config.training.load_weights)
        optimizer = build_optimizer(
            model_chunks, config.optimizer, parallel=config.parallel, params_dtype=config.params_dtype,
            train_steps=blend.train_steps, schedule_unit=sizes.schedule_unit, fp16=config.fp16, choice=choice,
        )
        state = _State(run, inputs, ranks, model_chunks, optimizer)
        start_step, loss_state = state.begin(newest)
        current_batch = CurrentBatch()
        watching = _build_observers(state, factories, current_batch, start_step)
        state.observers = [*watching]
        guard = build_guard(training, ranks, check_gradients=config.fp16 is None)
        if guard is not None:
            state.go_on(guard)
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
                model_chunks, optimizer, get_batch, training, ranks, metrics_path=run.metrics_path, save=state.save,
                languages=blend.languages, source_names=blend.source_names,
                parallel_sources=[item.text.name for item in blend.plan.sources if item.text.origin == "parallel"],
                flops_per_token=flops_per_token(config.model, vocab_size, config.data.seq_length),
                observers=watching, current_batch=current_batch, start_step=start_step, loss_state=loss_state,
                guard=guard, rewind=state.rewind, heartbeat=heartbeat,
                completed=state.saver.completed if training.async_save else None,
            )
            state.saver.wait()
    return run.path


def _open_folder(run: RunFolder, inputs: RunInputs, vocab_size: int, ranks: Ranks) -> None:
    """Write down what this start of the run is; the first process does it."""
    # What a killed save left may be all the room there is.
    remove_leftovers(run.checkpoints)
    layout = {
        "world_size": ranks.world_size, "tensor_size": ranks.tensor_size,
        "pipeline_size": ranks.pipeline_size, "data_size": ranks.data_size,
        "context_size": ranks.context_size, "virtual_size": ranks.virtual_size,
    }
    facts = {
        "padded_vocab_size": vocab_size, "train_steps": inputs.sizes.num_steps,
        "unigram_entropy": inputs.blend.unigram_entropy(),
        **(inputs.branch.facts() if inputs.branch is not None else {}),
    }
    start_run(inputs.config, command_line(), layout, facts)
    write_json(run.audit_path, inputs.blend.audit([ranks.data_size]))


class _State:
    """What a checkpoint is of: a model, its optimizer and its observers, loaded, saved and put back."""

    def __init__(
        self, run: RunFolder, inputs: RunInputs, ranks: Ranks, model_chunks: Sequence[Any], optimizer: Optimizer
    ) -> None:
        from megatron_xalign.training.saver import Saver

        self.run, self.inputs, self.ranks = run, inputs, ranks
        self.model_chunks, self.optimizer = model_chunks, optimizer
        self.observers: list[Observer] = []
        """Those that go back with it."""
        self.saver = Saver(
            run.checkpoints, inputs.training, ranks, model_chunks, optimizer.megatron, optimizer.scheduler
        )
        self._fingerprint = inputs.blend.fingerprint()
        self._origin: Path | None = None
        self.keeps_neurons = True
        """Whether capture goes on from what it had."""

    def begin(self, newest: Path | None) -> tuple[int, LossState | None]:
        """Go on from the run's newest checkpoint, or from another run's; the steps done and the loss sums there."""
        training, branch = self.inputs.training, self.inputs.branch
        if newest is not None:
            self._origin = newest
            step, extra = self._load(newest)
            check_same_data(newest, extra.get("data"), self._fingerprint, training.allow_changed_data)
            log.info("continuing from %s.", newest)
            if self.ranks.rank == 0:
                _warn_of_lost_metrics(self.run, step, training)
            return step, extra["loss_sums"]
        if branch is not None:
            self._origin, self.keeps_neurons = branch.checkpoint, branch.keeps_neurons
            step, extra = self._load(branch.checkpoint, new_schedule=True, new_scales=not branch.keeps_scales)
            log.info("this run %s.", branch.describe())
            if self.inputs.config.fp8 is not None and not branch.keeps_scales:
                log.info("FP8 scales are found afresh.")
            return step, self._counted_so_far(extra["loss_sums"], branch)
        return 0, None

    def go_on(self, observer: object) -> None:
        """Let an observer that has a state go on from where this start of the run began."""
        if self._origin is not None:
            _restore(observer, self._origin, self.ranks)

    def _load(
        self, checkpoint: Path, *, new_schedule: bool = False, new_scales: bool = False
    ) -> tuple[int, dict[str, Any]]:
        from megatron_xalign.training.checkpoint import load_checkpoint

        found = load_checkpoint(
            checkpoint, self.model_chunks, self.optimizer.megatron, self.optimizer.scheduler, self.ranks,
            new_schedule=new_schedule, new_scales=new_scales,
        )
        return found["step"], found["extra"]

    def _counted_so_far(self, loss_state: LossState | None, branch: Branch) -> LossState | None:
        """The other run's sums of loss and tokens, as far as this one has the same languages and sources."""
        from megatron_xalign.training.metrics import with_columns_of

        if branch.counted is None or loss_state is None:
            if self.ranks.rank == 0:
                log.warning("tokens of languages and sources are counted from here on.")
            return None
        blend = self.inputs.blend
        return with_columns_of(loss_state, branch.counted, (blend.languages, blend.source_names))

    def save(self, step: int, loss_sums: LossState, states: dict[str, ObserverState]) -> Path:
        """Write the checkpoint of a step."""
        extra = {
            "config": to_tree(self.inputs.config), "vocab_size": self.inputs.num_ids,
            "tokenizer_sha256": self.inputs.tokenizer.sha256,
            "consumed_samples": self.inputs.sizes.samples_before(step), "loss_sums": loss_sums,
            "data": self._fingerprint,
        }
        return self.saver.save(step, extra, states)

    def rewind(self) -> tuple[int, LossState]:
        """Put everything back to the last checkpoint; its step and loss sums."""
        from megatron_xalign.training.checkpoint import latest_checkpoint

        self.saver.wait()
        last = latest_checkpoint(self.run.checkpoints, self.ranks)
        if last is None:
            raise ConfigError(
                "there is no checkpoint to go back to yet; use the policy skip, or a smaller "
                "training.save_interval_steps."
            )
        step, extra = self._load(last)
        for observer in self.observers:
            _restore(observer, last, self.ranks)
        return step, extra["loss_sums"]


def _build_observers(
    state: _State, factories: Sequence[ObserverFactory], current_batch: CurrentBatch, start_step: int
) -> list[Observer]:
    """The user's observers, validation and capture, as they were where the run goes on from.

    What runs the model comes before what listens to it.
    """
    from megatron_xalign.capture.observer import NeuronObserver
    from megatron_xalign.training.forward import build_forward_only
    from megatron_xalign.training.observers import RunContext, build_observers, listens
    from megatron_xalign.training.validation import ValidationObserver

    inputs, ranks, model_chunks = state.inputs, state.ranks, state.model_chunks
    blend, training = inputs.blend, inputs.training
    config = dataclasses.replace(inputs.config, training=training)
    forward_only = build_forward_only(model_chunks, ranks, current_batch)
    own = build_observers(factories, RunContext(
        config=config, run_folder=state.run.path, ranks=ranks, model_chunks=model_chunks, forward_only=forward_only,
        current_batch=current_batch, languages=blend.languages, source_names=blend.source_names,
        train_steps=inputs.sizes.num_steps, start_step=start_step,
    ))
    for observer in own:
        state.go_on(observer)
    watching = [observer for observer in own if not listens(observer)]
    if inputs.held_out is not None:
        held_out = inputs.held_out
        watching.append(
            ValidationObserver(
                held_out, training, seq_length=config.data.seq_length, ranks=ranks, forward_only=forward_only,
                languages=held_out.languages, source_names=held_out.source_names, path=state.run.validation_path,
                start_step=start_step,
            )
        )
    if config.capture:
        neurons = NeuronObserver(
            config, model_chunks=model_chunks, ranks=ranks, current_batch=current_batch, forward_only=forward_only,
            probe=inputs.probe, languages=blend.languages, eod_id=inputs.tokenizer.eod, score=_score_functions(),
        )
        if state.keeps_neurons:
            state.go_on(neurons)
        watching.append(neurons)
    return watching + [observer for observer in own if listens(observer)]


def _restore(observer: object, folder: Path, ranks: Ranks) -> None:
    """Let an observer go on from what a checkpoint holds of it; one that it does not hold stays as it is."""
    from megatron_xalign.training.checkpoint import load_observer_state
    from megatron_xalign.training.observers import StatefulObserver, parts_of

    if isinstance(observer, StatefulObserver):
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
    from megatron_xalign.data.blend import describe_audit
    from megatron_xalign.training.model import padded_vocab_size
    from megatron_xalign.training.observers import find_factories
    from megatron_xalign.training.sizes import flops_per_token, memory_by_stage, num_parameters

    if processes is not None:
        check_processes(config, processes)
    find_factories(config.observers)
    # All that the start reads and checks.
    inputs = read_inputs(config)
    table = describe_audit(inputs.blend.audit())
    layout, training, num_ids = config.parallel, inputs.training, inputs.num_ids
    branch = f"{inputs.branch.describe()}\n\n" if inputs.branch is not None else ""
    tokens = inputs.sizes.num_samples * config.data.seq_length
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
        f"used); {flops / 1e9:.3g} GFLOP for each token, {flops * tokens / 1e15:.3g} PFLOP in all\n"
        f"{tokens:,} tokens in {inputs.sizes.num_steps:,} steps; "
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
