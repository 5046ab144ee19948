"""The training loop: global batches through forward, backward and optimizer step; watched, logged and saved."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from megatron_xalign.batch import Batch, CurrentBatch
from megatron_xalign.batch_sizes import BatchSizes, batch_sizes
from megatron_xalign.config import TrainingConfig
from megatron_xalign.errors import ConfigError, StoppedEarly, XAlignError
from megatron_xalign.progress import progress_bar
from megatron_xalign.topology import ObserverState, Ranks
from megatron_xalign.training.forward import forward_backward
from megatron_xalign.training.guard import LossGuard, Verdict
from megatron_xalign.training.heartbeat import Heartbeat
from megatron_xalign.training.metrics import LossSums, append_metrics, readable, truncate_metrics
from megatron_xalign.training.observers import Observer, StatefulObserver, take_state
from megatron_xalign.training.optimizer import Optimizer
from megatron_xalign.training.speed import speed_of
from megatron_xalign.training.stopping import StopRequest

GetBatch = Callable[[list[int]], Batch]
"""Samples of the run, by number, as one micro-batch."""

LossState = list[list[float]]
"""Loss sums of a logging interval that a checkpoint cuts in two."""

log = logging.getLogger(__name__)


def fit(
    model_chunks: Sequence[Any],
    optimizer: Optimizer,
    get_batch: GetBatch,
    config: TrainingConfig,
    ranks: Ranks,
    *,
    metrics_path: Path,
    save: Callable[[int, LossState, dict[str, ObserverState]], Path],
    languages: Sequence[str],
    source_names: Sequence[str],
    parallel_sources: Collection[str] | None = None,
    flops_per_token: float | None = None,
    observers: Sequence[Observer] = (),
    current_batch: CurrentBatch | None = None,
    start_step: int = 0,
    loss_state: LossState | None = None,
    guard: LossGuard | None = None,
    rewind: Callable[[], tuple[int, LossState]] | None = None,
    heartbeat: Heartbeat | None = None,
    completed: Callable[[bool], Sequence[tuple[int, Path]]] | None = None,
) -> dict[str, Any]:
    """Train from ``start_step`` to the end of the budget, ``config.train_steps`` full batches.

    Sample k of the run is in step ``k // global_batch_size``, or where ``batch_sizes`` has it while batches grow,
    whatever the layout and micro-batch size are.

    Args:
        model_chunks: what ``build_model`` returned, with a checkpoint loaded into it if ``start_step`` is not 0.
        optimizer: what ``build_optimizer`` returned, likewise.
        get_batch: gives the samples with these numbers; every process of a model copy asks for the same ones.
        config: steps, batch sizes, intervals.
        ranks: this process's place.
        metrics_path: ``metrics.jsonl``; lines after ``start_step`` are removed from it first.
        save: writes the checkpoint of a step, called by every process; returns its path. It also gets the loss sums
            of the unfinished logging interval and the state of observers that have one.
        languages: what language ids in batches count.
        source_names: what source ids in batches count.
        parallel_sources: names of those that hold pairs; the share of parallel text so far is then logged.
        flops_per_token: floating-point operations of a token's forward and backward pass; speed is then logged in
            TFLOP/s too, for each device.
        observers: called in this order before steps and after saves, in the opposite one after steps and at the end.
        current_batch: tells hooks of observers which micro-batch is running.
        start_step: optimizer steps already done.
        loss_state: the loss sums that were saved with ``start_step``.
        guard: judges the loss and gradient of every step before the weights move; none: a loss or gradient that is not
            a finite number stops the run.
        rewind: puts weights, optimizer, schedule and observers back to the last checkpoint, for the guard; returns its
            step and loss sums.
        heartbeat: told where this process is.
        completed: for saves that go on while training does: steps and paths of those that were completed since the
            last call, the same on every process; with True it waits for all that are under way. ``save`` then returns
            when the state is copied. Left out, a save is complete when ``save`` returns.

    Returns:
        The last line of metrics; empty if there was nothing left to do.

    Raises:
        ConfigError: the global batch cannot be divided over data-parallel ranks and micro-batches.
        XAlignError: loss or gradient norm is not a finite number, or the guard stops the run.
        StoppedEarly: a signal or the time limit asked for it; the state after the last step is saved.
    """
    sizes = batch_sizes(config)
    check_batches(config, ranks)
    current_batch = current_batch or CurrentBatch()
    losses = LossSums(languages, source_names, ranks, parallel_sources, with_z_loss=config.z_loss_coefficient > 0)
    if loss_state is not None:
        losses.restore(loss_state)
    if ranks.rank == 0:
        truncate_metrics(metrics_path, start_step)
    line: dict[str, Any] = {}
    with ExitStack() as stack:
        at = stack.enter_context(heartbeat).at if heartbeat is not None else _nowhere
        for observer in observers:
            stack.callback(observer.close)
        stop = stack.enter_context(StopRequest(ranks, config.exit_duration_minutes))
        bar = stack.enter_context(progress_bar(sizes.num_steps, "training", " steps", initial=start_step))
        for chunk in model_chunks:
            chunk.train()
        interval = _Interval(optimizer, guard, sizes, ranks, flops_per_token)
        for step in range(start_step, sizes.num_steps):
            for observer in observers:
                with _named(observer, "before_step", step, at):
                    observer.before_step(step)
            interval.begin_step()
            at(step, "reading samples")
            batches = [
                get_batch(sample_numbers(step, microbatch, config, ranks)).to(ranks.device)
                for microbatch in range(_num_microbatches(step, config, ranks))
            ]
            seq_length = batches[0].tokens.shape[1]
            units = sizes.schedule_units(step + 1) - sizes.schedule_units(step)
            for chunk in model_chunks:
                chunk.zero_grad_buffer()
            optimizer.zero_grad()
            before = losses.copy() if guard is not None else None
            at(step, "in forward and backward passes")
            forward_backward(model_chunks, batches, current_batch, losses.add, ranks)
            done = step + 1
            at(step, "moving the weights")
            verdict: Verdict = "go"
            if guard is not None and before is not None:
                verdict = guard.judge(done, losses.mean_since(before), model_chunks)
            grad_norm: float | None = None
            if verdict == "go":
                with _at_step(done):
                    grad_norm, lr = optimizer.step(units)
            else:
                assert before is not None
                losses.put_back(before)
                lr = optimizer.pass_over(units)
            if verdict == "rewind":
                lr = _go_back(done, rewind, optimizer, losses, sizes, metrics_path, ranks)
            interval.end_step(sizes.size_of(step) * seq_length)
            metrics: dict[str, Any] = {
                "step": done, "consumed_tokens": sizes.samples_before(done) * seq_length, "grad_norm": grad_norm,
                "lr": lr,
            }
            if verdict != "go":
                metrics["passed_over"] = True
            logged = done % config.log_interval_steps == 0 or done == sizes.num_steps
            means = losses.take() if logged else {}
            # Where every step of the interval was passed over there is no loss to write down.
            if means.get("loss_by_source"):
                if not math.isfinite(means["loss"]):
                    raise XAlignError(
                        f"step {done}: the loss is {means['loss']}; use a lower optimizer.lr and go on from the last "
                        "checkpoint."
                    )
                line = metrics = {**metrics, **means, **interval.numbers(seq_length, metrics["consumed_tokens"])}
                if ranks.rank == 0:
                    append_metrics(metrics_path, line)
                # In a terminal the bar says it.
                log.log(
                    logging.DEBUG if sys.stderr.isatty() else logging.INFO, "%s", readable(line, sizes.num_steps)
                )
                speed = f"{line['tokens_per_second']:,.0f} tokens/s"
                bar.set_postfix_str(f"loss {means['loss']:.3f}, {speed}", refresh=False)
                interval.begin()
            for observer in reversed(observers):
                with _named(observer, "after_step", done, at):
                    observer.after_step(done, metrics)
            at(done, "ending the step")
            reason = stop.agreed() if done < sizes.num_steps else None
            # What went back must not go back again after a restart, over data that it has passed.
            if done % config.save_interval_steps == 0 or done == sizes.num_steps or reason or verdict == "rewind":
                path = _save(done, save, losses, observers if guard is None else [*observers, guard], at)
                if completed is None:
                    _saved(observers, done, path, at)
            if completed is not None:
                for saved, place in completed(bool(reason) or done == sizes.num_steps):
                    _saved(observers, saved, place, at)
            bar.update(1)
            if reason:
                raise StoppedEarly(f"stopped after step {done} of {sizes.num_steps} because {reason}; saved {path}.")
    return line


class _Interval:
    """Time and tokens since the last line of metrics."""

    def __init__(
        self, optimizer: Optimizer, guard: LossGuard | None, sizes: BatchSizes, ranks: Ranks,
        flops_per_token: float | None,
    ) -> None:
        self._optimizer, self._guard, self._sizes, self._ranks = optimizer, guard, sizes, ranks
        self._flops_per_token = flops_per_token
        self._start = self._step_start = 0.0
        self.begin()

    def begin(self) -> None:
        """Count from here."""
        self._start, self._compute_seconds, self._tokens = time.monotonic(), 0.0, 0

    def begin_step(self) -> None:
        """What training a step takes, beside what observers and saves do, begins here."""
        self._step_start = time.monotonic()

    def end_step(self, tokens: int) -> None:
        """And ends here; ``tokens`` of all ranks."""
        self._compute_seconds += time.monotonic() - self._step_start
        self._tokens += tokens

    def numbers(self, seq_length: int, consumed_tokens: int) -> dict[str, Any]:
        """Speed, time left, and what guard and loss scale stand at."""
        seconds = time.monotonic() - self._start
        return {
            **({} if self._guard is None else self._guard.counts()),
            **({} if self._optimizer.loss_scale is None else {"loss_scale": self._optimizer.loss_scale}),
            **speed_of(
                self._tokens / max(self._compute_seconds, 1e-9), self._flops_per_token, self._ranks.world_size,
                self._ranks.device,
            ),
            "seconds": seconds,
            "seconds_left": (self._sizes.num_samples * seq_length - consumed_tokens) * seconds / self._tokens,
        }


def _save(
    done: int, save: Callable[[int, LossState, dict[str, ObserverState]], Path], losses: LossSums,
    watching: Sequence[object], at: Callable[..., None],
) -> Path:
    """Save a step, and go on as a resumed run would: from the rounded sums of the checkpoint, to the same last bit."""
    loss_sums = losses.state()
    stateful = [observer for observer in watching if isinstance(observer, StatefulObserver)]
    states = {observer.name: take_state(observer) for observer in stateful}
    at(done, "saving", False)
    path = save(done, loss_sums, states)
    losses.restore(loss_sums)
    for observer in stateful:
        observer.restore(states[observer.name])
    return path


def _go_back(
    done: int, rewind: Callable[[], tuple[int, LossState]] | None, optimizer: Optimizer, losses: LossSums,
    sizes: BatchSizes, metrics_path: Path, ranks: Ranks,
) -> float:
    """Take the state of the last checkpoint and go on with the data after step ``done``; the learning rate there."""
    if rewind is None:
        raise XAlignError(f"step {done}: there is no way back; use the policy skip or stop.")
    with _at_step(done):
        saved, loss_sums = rewind()
    losses.restore(loss_sums)
    if ranks.rank == 0:
        truncate_metrics(metrics_path, saved)
    log.warning("step %d: back to the weights of step %d; the data of steps %d to %d is left out.",
                done, saved, saved + 1, done)
    return optimizer.pass_over(sizes.schedule_units(done) - sizes.schedule_units(saved))


def _saved(observers: Sequence[Observer], step: int, path: Path, at: Callable[..., None]) -> None:
    for observer in observers:
        with _named(observer, "after_save", step, at):
            observer.after_save(step, path)


def _nowhere(step: int, place: str, bounded: bool = True) -> None:
    """Nobody wants to know."""


def sample_numbers(step: int, microbatch: int, config: TrainingConfig, ranks: Ranks) -> list[int]:
    """Which samples of the run this rank reads in a micro-batch of a step.

    A data-parallel rank has a contiguous part of the global batch. The blend spreads every source evenly over the
    batch, so each part has the mixture of the whole, on any number of ranks.
    """
    sizes = batch_sizes(config)
    part = sizes.size_of(step) // ranks.data_size
    first = sizes.samples_before(step) + ranks.data_rank * part + microbatch * config.micro_batch_size
    return list(range(first, first + config.micro_batch_size))


def micro_batches(start_step: int, config: TrainingConfig, ranks: Ranks) -> Iterator[list[int]]:
    """The sample numbers of every micro-batch of this rank, from ``start_step`` to the end of the run."""
    for step in range(start_step, batch_sizes(config).num_steps):
        for microbatch in range(_num_microbatches(step, config, ranks)):
            yield sample_numbers(step, microbatch, config, ranks)


def _num_microbatches(step: int, config: TrainingConfig, ranks: Ranks) -> int:
    return batch_sizes(config).size_of(step) // (config.micro_batch_size * ranks.data_size)


def check_batches(config: TrainingConfig, ranks: Ranks) -> None:
    """Refuse batches that this layout cannot cut into micro-batches.

    Raises:
        ConfigError: a step cannot be divided over data-parallel ranks and micro-batches, or an interleaved pipeline has
            no multiple of its stages of them.
    """
    sizes = batch_sizes(config)
    sizes.check(config.micro_batch_size, ranks.data_size)
    for size in sizes.all_sizes():
        num_microbatches = size // (config.micro_batch_size * ranks.data_size)
        if ranks.virtual_size > 1 and num_microbatches % ranks.pipeline_size:
            raise ConfigError(
                f"an interleaved pipeline of {ranks.pipeline_size} stages takes a multiple of {ranks.pipeline_size} "
                f"micro-batches, not {num_microbatches} (training.global_batch_size={size} / "
                f"training.micro_batch_size={config.micro_batch_size} / {ranks.data_size} data-parallel ranks); change "
                "one of them, or leave out parallel.virtual_pipeline_model_parallel_size."
            )


@contextmanager
def _named(observer: Observer, moment: str, step: int, at: Callable[..., None]) -> Iterator[None]:
    """Say in an error which observer stopped the run, and when."""
    at(step, f"in {type(observer).__name__}.{moment}", False)
    try:
        yield
    except Exception as error:
        error.add_note(f"raised by {type(observer).__name__}.{moment} at step {step}, which stopped the run.")
        raise


@contextmanager
def _at_step(step: int) -> Iterator[None]:
    try:
        yield
    except XAlignError as error:
        raise type(error)(f"step {step}: {error}") from error
