"""Save and load a training run in Megatron's torch_dist format, whatever layout of processes it continues on.

A checkpoint holds weights, the optimizer's main weights and moments, the scheduler, random states, and
``xalign.json`` (docs/checkpoints.md). It is written into a hidden folder beside the others and takes its name
when everything is on disk, so a job killed at any moment leaves a loadable state.

Optimizer tensors are stored in the shape of the weight they belong to, under ``optimizer.state.{param,exp_avg,
exp_avg_sq}.WEIGHT``, with and without the distributed optimizer; ``param`` exists for bf16 runs only, since the main
weights of an fp32 run are its weights. So tensor, pipeline and data size and the kind of optimizer may all change
between save and load.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import platform as python_platform
import queue
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from megatron_xalign import __version__
from megatron_xalign.errors import CheckpointError
from megatron_xalign.formats import checkpoint_folder
from megatron_xalign.formats.atomic import replace_folder, sync_folder, write_json
from megatron_xalign.formats.checkpoint import COMMON, CheckpointReader
from megatron_xalign.formats.checkpoint_folder import (
    FORMAT,
    MANIFEST,
    VERSION,
    damaged,
    describe_file,
    find_damage,
    partial_folder,
    prune,
    read_manifest,
    remove_leftovers,
    step_folder,
)
from megatron_xalign.names import FP8_STATE
from megatron_xalign.topology import LocalPart, ObserverState, Ranks
from megatron_xalign.training.optimizer_state import (
    initialize_state,
    is_torch_adam,
    only_optimizer,
    optimizer_state,
    set_step,
    sharding,
    steps_in_place,
    uses_distributed,
)
from megatron_xalign.training.random_state import random_state_file, read_random_state, write_random_state
from megatron_xalign.training.te_state import check_extra_state

__all__ = [
    "UnfinishedSave", "begin_save", "latest_checkpoint", "load_checkpoint", "load_observer_state", "load_weights",
    "prune", "save_checkpoint", "unwrap",
]

EXTRA_KEYS = ("config", "consumed_samples", "tokenizer_sha256", "vocab_size")
"""What ``extra`` must hold, for resuming and for conversion."""

_ONE_OF_EACH = {"context_parallel_size": 1, "virtual_pipeline_model_parallel_size": 1}
"""Layout of checkpoints that do not say."""
_OBSERVER = "observers."
# What layers keep beside their weights: Transformer Engine's FP8 state (None elsewhere), and that of our FP8 layers.
_LAYER_STATE = ("_extra_state", *FP8_STATE)

log = logging.getLogger(__name__)


def save_checkpoint(
    folder: str | Path, step: int, model_chunks: Sequence[Any], optimizer: Any, scheduler: Any, ranks: Ranks,
    extra: dict[str, Any], observers: Mapping[str, ObserverState] | None = None, *, with_hashes: bool = True,
) -> Path:
    """Write the state after ``step`` optimizer steps. Every process of the job calls it.

    Args:
        folder: ``checkpoints/`` of a run, seen by every process.
        step: finished optimizer steps.
        model_chunks: as ``build_model`` gives them.
        optimizer: Megatron's optimizer over them.
        scheduler: has ``state_dict()``; None if there is none.
        ranks: this process's place.
        extra: what else describes the run, JSON-able and the same on every process. ``config`` (the run's config as a
            tree), ``vocab_size`` (before padding), ``tokenizer_sha256`` and ``consumed_samples`` must be there.
        observers: state of observers by name; arrays must be the same on all data-parallel ranks.
        with_hashes: keep SHA-256 of every file, not only its size.

    Returns:
        The checkpoint, ``folder/step-000100``.

    Raises:
        CheckpointError: a process could not write its part. What was there before is untouched.
        ValueError: ``extra`` lacks something.
    """
    return begin_save(
        folder, step, model_chunks, optimizer, scheduler, ranks, extra, observers, with_hashes=with_hashes,
        in_background=False,
    ).finish()


def begin_save(
    folder: str | Path, step: int, model_chunks: Sequence[Any], optimizer: Any, scheduler: Any, ranks: Ranks,
    extra: dict[str, Any], observers: Mapping[str, ObserverState] | None = None, *, with_hashes: bool = True,
    in_background: bool = True,
) -> UnfinishedSave:
    """Copy the state after ``step`` steps and begin to write it, in a thread if ``in_background``.

    Training may go on at once: what is written is the state as it was, the same bytes as ``save_checkpoint`` writes.
    The checkpoint does not exist before ``finish``. Arguments and errors are those of ``save_checkpoint``.
    """
    missing = [key for key in EXTRA_KEYS if key not in extra]
    if missing:
        raise ValueError(f"extra lacks {', '.join(missing)}.")
    folder = Path(folder)
    final, partial = step_folder(folder, step), partial_folder(folder, step)
    with _together(ranks, f"cannot prepare {partial}"):
        if ranks.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            partial.mkdir()
    with _removed_on_failure(partial, ranks):
        parts = {
            f"{_OBSERVER}{name}.{array}": part
            for name, (_, parts) in (observers or {}).items()
            for array, part in parts.items()
        }
        request = _prepare_tensors(partial, model_chunks, optimizer, scheduler, ranks, _sharded(parts, ranks))
        with _together(ranks, f"cannot write random states to {partial}"):
            write_random_state(random_state_file(partial, ranks.rank), ranks)
        values = {name: state[0] for name, state in (observers or {}).items()}
        manifest = _manifest(step, ranks, uses_distributed(optimizer), extra) | {"observers": values}
        return UnfinishedSave(final, partial, request, manifest, ranks, with_hashes, in_background)


class UnfinishedSave:
    """A checkpoint that is being written; made by ``begin_save``."""

    def __init__(
        self, final: Path, partial: Path, request: Any, manifest: dict[str, Any], ranks: Ranks, with_hashes: bool,
        in_background: bool,
    ) -> None:
        """Begin to write."""
        self.step: int = manifest["step"]
        """Finished optimizer steps of the state."""
        self._final, self._partial, self._ranks, self._manifest = final, partial, ranks, manifest
        self._with_hashes = with_hashes
        self._finalize = request.finalize_fns
        self._described: dict[str, dict[str, Any]] = {}
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        if in_background:
            # Daemon: a job that fails meanwhile ends, and what is half written is never used.
            buckets = _copied(request)
            self._thread = threading.Thread(target=self._write, args=(request, buckets), daemon=True)
            self._thread.start()
        else:
            self._write(request, None)

    def is_written(self) -> bool:
        """Whether this process has written its part."""
        return self._thread is None or not self._thread.is_alive()

    def finish(self) -> Path:
        """Wait until all is written and give the checkpoint its name. Every process calls it at the same moment.

        Raises:
            CheckpointError: a process could not write its part.
        """
        if self._thread is not None:
            self._thread.join()
        partial, ranks = self._partial, self._ranks
        with _removed_on_failure(partial, ranks):
            if self._error is not None and not isinstance(self._error, OSError):
                raise self._error
            with _together(ranks, f"cannot write {partial}"):
                if self._error is not None:
                    raise self._error
            with _errors_of_core(f"cannot write {partial}"):
                for finalize in self._finalize:
                    finalize()
            with _together(ranks, f"cannot write {partial}"):
                if ranks.rank == 0:
                    # Core syncs the others; 0.19 has no common.pt.
                    for name in (".metadata", "metadata.json", "common.pt"):
                        if (partial / name).exists():
                            with (partial / name).open("rb") as file:
                                os.fsync(file.fileno())
            ranks.barrier()
            files = _describe_files(partial, ranks, self._described, self._with_hashes)
            with _together(ranks, f"cannot complete {self._final}"):
                if ranks.rank == 0:
                    write_json(partial / MANIFEST, self._manifest | {"files": files})
                    sync_folder(partial)
                    replace_folder(partial, self._final)
        log.debug("saved %s.", self._final)
        return self._final

    def _write(self, request: Any, buckets: list[Any] | None) -> None:
        """Write this process's chunks and describe their files; an error is kept for ``finish``."""
        if request.async_fn is None:
            return
        arguments = list(request.async_fn_args)
        arguments[1] = buckets if buckets is not None else request.preload_fn()
        names = [Path(name).name for name, *_ in arguments[1]]
        try:
            request.async_fn(*arguments, **request.async_fn_kwargs)
            self._described = {
                name: describe_file(self._partial / name, self._with_hashes)
                for name in names
                if (self._partial / name).exists()
            }
        except Exception as error:
            self._error = error


def _copied(request: Any) -> list[Any]:
    """A save's tensors in main memory, apart from those that training goes on to change."""
    if request.async_fn is None:
        return []
    return [
        (path, name, (texts, [(item, tensor.clone() if tensor is given else tensor) for (item, tensor), (_, given) in
                              zip(tensors, given_tensors, strict=True)]))
        for (path, name, (texts, tensors)), (_, _, (_, given_tensors)) in
        zip(request.preload_fn(), request.async_fn_args[1], strict=True)
    ]


@contextmanager
def _removed_on_failure(partial: Path, ranks: Ranks) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        # A disk that is full looks like anything in what the libraries say. Before its part is removed again:
        free = shutil.disk_usage(partial.parent).free / 1e6
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        what = str(error).rstrip(".")
        raise CheckpointError(f"{what}. On that disk {free:,.1f} MB were free. Earlier checkpoints stay.") from error


def load_checkpoint(
    folder: str | Path, model_chunks: Sequence[Any], optimizer: Any, scheduler: Any, ranks: Ranks, *,
    new_schedule: bool = False, new_scales: bool = False,
) -> dict[str, Any]:
    """Put the state of a checkpoint into a freshly built model, optimizer and scheduler, on any layout.

    Sizes and hashes of all files are compared with ``xalign.json`` first, each process a share of them, and nothing
    is unpickled that has not been seen to hold tensors and plain values only.

    Args:
        folder: one checkpoint, ``checkpoints/step-000100``.
        model_chunks: as ``build_model`` gives them.
        optimizer: Megatron's optimizer over them; None leaves its state unread.
        scheduler: has ``state_dict()`` and ``load_state_dict()``; None leaves it unread.
        ranks: this process's place.
        new_schedule: whether the schedule may be another one than that of the checkpoint, of which only the place is
            then taken.
        new_scales: whether FP8 scales are found afresh; those of another recipe, or of none, would not fit.

    Returns:
        ``step`` and ``extra`` as they were saved.

    Raises:
        CheckpointError: it is damaged, malicious, or of another model or schedule.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_files(folder, manifest, ranks)
    if manifest.get("weights_only"):
        raise CheckpointError(
            f"{folder} holds weights and no optimizer; a run starts from it with training.load_weights={folder}."
        )
    if ranks.rank == 0:
        _tell_other_versions(folder, manifest)
    _load_model(folder, model_chunks, without_scales=new_scales)
    if optimizer is not None:
        _load_optimizer(folder, model_chunks, optimizer, manifest)
    if scheduler is not None:
        _load_scheduler(folder, scheduler, new_schedule)
    if _ONE_OF_EACH | manifest["layout"] == _layout(ranks):
        read_random_state(random_state_file(folder, ranks.rank), ranks)
    else:
        # With no dropout nothing is drawn while training, so nothing changes.
        log.info(
            "%s was written on layout %s; random states start afresh on %s.", folder, manifest["layout"], _layout(ranks)
        )
    ranks.barrier()
    log.debug("loaded %s.", folder)
    return {"step": manifest["step"], "extra": manifest["extra"]}


def load_weights(folder: str | Path, model_chunks: Sequence[Any], ranks: Ranks) -> dict[str, Any]:
    """Put a checkpoint's weights into a model; optimizer, scheduler and random states stay as they are.

    Raises:
        CheckpointError: as ``load_checkpoint``.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _check_files(folder, manifest, ranks)
    # Scales belong to the run that found them, and what a converter writes has none.
    _load_model(folder, model_chunks, without_scales=True)
    return {"step": manifest["step"], "extra": manifest["extra"]}


def load_observer_state(
    folder: str | Path, name: str, parts: Callable[[dict[str, Any]], Mapping[str, LocalPart]], ranks: Ranks
) -> ObserverState | None:
    """Read what an observer left in a checkpoint, cut for this process's place, whatever layout wrote it.

    Args:
        folder: one checkpoint.
        name: the observer's.
        parts: from the stored values to the arrays that go with them; their tensors are filled.
        ranks: this process's place.

    Returns:
        The state; None if the checkpoint has none of this observer.

    Raises:
        CheckpointError: the arrays are missing or of another shape.
    """
    folder = Path(folder)
    values = read_manifest(folder).get("observers", {}).get(name)
    if values is None:
        return None
    wanted = dict(parts(values))
    if not wanted:
        return values, {}
    loaded = _load_with_core(_sharded({f"{_OBSERVER}{name}.{array}": p for array, p in wanted.items()}, ranks), folder)

    def whole(array: str, part: LocalPart) -> torch.Tensor:
        blocks: list[torch.Tensor] = loaded[f"{_OBSERVER}{name}.{array}"]
        return blocks[0] if part.pipeline_axis is None else torch.cat(blocks, part.pipeline_axis)

    return values, {
        array: dataclasses.replace(part, tensor=whole(array, part))
        for array, part in wanted.items()
    }


def latest_checkpoint(folder: str | Path, ranks: Ranks | None = None) -> Path | None:
    """The newest checkpoint of a run whose files are all there and unchanged; None if there is no checkpoint.

    Damaged ones are passed over with a warning. With ``ranks``, the first process looks and all get its answer; every
    process must then call it.

    Raises:
        CheckpointError: there are checkpoints, and none can be used.
    """
    if ranks is None:
        return checkpoint_folder.latest_checkpoint(folder)
    found: Any = None
    if ranks.rank == 0:
        try:
            found = checkpoint_folder.latest_checkpoint(folder)
        except CheckpointError as error:
            found = error
    found = ranks.broadcast_object(found)
    if isinstance(found, CheckpointError):
        raise found
    newest: Path | None = found
    return newest


def unwrap(chunk: Any) -> Any:
    """Megatron's ``GPTModel`` inside its data-parallel and precision wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


@contextmanager
def _together(ranks: Ranks, what: str) -> Iterator[None]:
    """Run a block that may fail on one process's disk; if it does, every process raises, and none waits for it."""
    problem = None
    try:
        yield
    except (OSError, SafetensorError) as error:
        problem = f"process {ranks.rank}: {error}"
    problems: list[str | None] = [problem]
    if ranks.world_size > 1:
        problems = [None] * ranks.world_size
        dist.all_gather_object(problems, problem)
    found = [text for text in problems if text is not None]
    if found:
        raise CheckpointError(f"{what}: {'; '.join(found)}.")


# What is written ------------------------------------------------------------------------------------------------------


def _prepare_tensors(
    partial: Path, model_chunks: Sequence[Any], optimizer: Any, scheduler: Any, ranks: Ranks, observed: dict[str, Any]
) -> Any:
    """Let core plan the save and write the small parts; return its request, whose function writes the tensors."""
    from megatron.core import dist_checkpointing

    model_state = _model_state(model_chunks)
    state: dict[str, Any] = {**model_state, **observed}
    step = initialize_state(optimizer)
    state["optimizer"] = optimizer_state(optimizer, model_state, is_loading=False)
    state["optimizer_step"] = step
    state["scheduler"] = {} if scheduler is None else scheduler.state_dict()
    strategy = dist_checkpointing.serialization.get_default_save_sharded_strategy()
    strategy.thread_count = 1
    options: dict[str, Any] = {"sharded_strategy": strategy, "async_sharded_save": True}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
        # From 0.19 on; the default needs another package, for processes of its own.
        options["async_strategy"] = "mcore"
    with _errors_of_core(f"cannot write {partial}"), _writing_in_this_process():
        return dist_checkpointing.save(state, str(partial), **options)


def _sharded(parts: Mapping[str, LocalPart], ranks: Ranks) -> dict[str, Any]:
    """Megatron's description of arrays that lie over tensor and pipeline ranks."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    described: dict[str, Any] = {}
    for name, part in parts.items():
        # Every block of layers is a shard of its own: those of one stage of an interleaved pipeline are not neighbours.
        num_blocks = 1 if part.pipeline_axis is None else ranks.virtual_size
        blocks = part.tensor.chunk(num_blocks, part.pipeline_axis or 0)
        described[name] = []
        for virtual, block in enumerate(blocks):
            places = [(part.tensor_axis, ranks.tensor_rank, ranks.tensor_size)]
            if not part.of_stage:
                number = virtual * ranks.pipeline_size + ranks.pipeline_rank
                places.append((part.pipeline_axis, number, ranks.virtual_size * ranks.pipeline_size))
            # Ranks that hold the same numbers are replicas, of which the first writes.
            copies = [ranks.data_context_rank, *(rank for axis, rank, _ in places if axis is None)]
            described[name].append(
                ShardedTensor.from_rank_offsets(
                    name, block, *((axis, rank, size) for axis, rank, size in places if axis is not None),
                    replica_id=tuple(copies),
                )
            )
    return described


@contextmanager
def _writing_in_this_process() -> Iterator[None]:
    """Keep Megatron from starting processes to write files.

    0.16.1 forks one process for each file and waits for them without bound; forking a process that has communication
    threads is a gamble, and a child that dies is never noticed. Both versions start another process to hold a queue.
    Here the files are written by the caller with Megatron's own function, and there is nothing to wait for.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    writer: Any = filesystem_async.FileSystemWriterAsync

    def write_buckets(
        transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], results_queue: Any
    ) -> None:
        results: queue.Queue[Any] = queue.Queue()
        for number, bucket in enumerate(buckets):
            started: queue.Queue[int] = queue.Queue()
            started.put(number)
            writer.write_preloaded_data(
                transforms, local_proc_idx=number, write_bucket=bucket, results_queue=results, count_queue=started,
                use_fsync=True,
            )
        written = dict(results.get_nowait() for _ in buckets)
        failed = [result for result in written.values() if isinstance(result, Exception)]
        results_queue.put(failed[0] if failed else written)

    name = "write_preloaded_data_multiproc"  # from 0.19 on it writes with threads, and one file without any
    queue_before, forking = filesystem_async._results_queue, writer.__dict__.get(name)
    filesystem_async._results_queue = queue.SimpleQueue()
    if forking is not None:
        setattr(writer, name, staticmethod(write_buckets))
    try:
        yield
    finally:
        filesystem_async._results_queue = queue_before
        if forking is not None:
            setattr(writer, name, forking)


def _describe_files(
    partial: Path, ranks: Ranks, own: dict[str, dict[str, Any]], with_hashes: bool
) -> dict[str, dict[str, Any]]:
    """Size and hash of every file; each process has described its own, and the first the small ones nobody has."""
    shares: list[Any] = [own]
    if ranks.world_size > 1:
        shares = [None] * ranks.world_size
        dist.all_gather_object(shares, own)
    described: dict[str, dict[str, Any]] = {name: facts for share in shares for name, facts in share.items()}
    with _together(ranks, f"cannot read back {partial}"):
        if ranks.rank == 0:
            for path in partial.iterdir():
                if path.name not in described:
                    described[path.name] = describe_file(path, with_hashes)
    return dict(sorted(described.items()))


def _layout(ranks: Ranks) -> dict[str, int]:
    return {
        "tensor_model_parallel_size": ranks.tensor_size,
        "pipeline_model_parallel_size": ranks.pipeline_size,
        "data_parallel_size": ranks.data_size,
        "context_parallel_size": ranks.context_size,
        "virtual_pipeline_model_parallel_size": ranks.virtual_size,
    }


def _versions() -> dict[str, str]:
    import megatron.core

    return {
        "megatron_xalign": __version__,
        "megatron_core": megatron.core.__version__,
        "torch": torch.__version__,
        "python": python_platform.python_version(),
    }


def _tell_other_versions(folder: Path, manifest: dict[str, Any]) -> None:
    """Sums in another order give other last digits: who compares two starts of a run must know."""
    before, now = manifest.get("versions"), _versions()
    if not isinstance(before, dict):
        return
    differing = [
        f"{name.replace('_', '-')} {before[name]} (now {now[name]})"
        for name in ("megatron_xalign", "megatron_core", "torch") if before.get(name, now[name]) != now[name]
    ]
    if differing:
        log.warning("%s was written with %s; what follows may differ in its last digits.", folder, ", ".join(differing))


def _manifest(step: int, ranks: Ranks, use_distributed_optimizer: bool, extra: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
        "layout": _layout(ranks),
        "use_distributed_optimizer": use_distributed_optimizer,
        "extra": extra,
    }


# Model and optimizer --------------------------------------------------------------------------------------------------


def _model_state(model_chunks: Sequence[Any]) -> dict[str, Any]:
    return {
        f"model{number}": unwrap(chunk).sharded_state_dict(metadata=sharding())
        for number, chunk in enumerate(model_chunks)
    }


def _load_model(folder: Path, model_chunks: Sequence[Any], without_scales: bool = False) -> None:
    state = _model_state(model_chunks)
    if without_scales:
        state = {
            chunk: {name: value for name, value in parts.items() if not name.endswith(_LAYER_STATE)}
            for chunk, parts in state.items()
        }
    loaded = _load_with_core(state, folder)
    for number in range(len(model_chunks)):
        check_extra_state(loaded[f"model{number}"], f"checkpoint {folder}")
    for number, chunk in enumerate(model_chunks):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[f"model{number}"], strict=not without_scales)
        absent = [name for name in missing if not name.endswith(_LAYER_STATE)]
        if absent or unexpected:
            raise CheckpointError(
                f"checkpoint {folder} does not fit this model: {', '.join([*absent, *unexpected])} in one and not in "
                "the other."
            )


def _load_optimizer(folder: Path, model_chunks: Sequence[Any], optimizer: Any, manifest: dict[str, Any]) -> None:
    initialize_state(optimizer)
    state = optimizer_state(optimizer, _model_state(model_chunks), is_loading=True)
    # Apart from the model's: the main weights of an fp32 run are read from the same stored tensors as its weights.
    loaded = _load_with_core({"optimizer": state}, folder)["optimizer"]
    step = int(_load_common(folder)["optimizer_step"])
    inner = loaded.get("optimizer", loaded)
    for group in inner["param_groups"]:
        group["step"] = step
    if "state" in inner and is_torch_adam(only_optimizer(optimizer).optimizer):
        inner["state"]["common_step"] = torch.tensor(float(step))
    with steps_in_place(only_optimizer(optimizer)):
        optimizer.load_state_dict(loaded)
    set_step(optimizer, step)
    if step != manifest["step"]:
        log.info("%s: step %d after %d updates (some were skipped).", folder, manifest["step"], step)


def _load_scheduler(folder: Path, scheduler: Any, new_schedule: bool) -> None:
    stored = _load_common(folder)["scheduler"]
    if new_schedule:
        scheduler.num_steps = 0
        scheduler.step(increment=stored["num_steps"])
        return
    current = scheduler.state_dict()
    differing = [
        f"{key} {stored.get(key)} (now {current[key]})"
        for key in sorted(current)
        if key != "num_steps" and key in stored and stored[key] != current[key]
    ]
    if differing and not getattr(scheduler, "override_opt_param_scheduler", False):
        raise CheckpointError(
            f"{folder} was trained on another schedule: {', '.join(differing)}. Resume with the settings of its "
            "config.yaml, or start a new run."
        )
    # Megatron adds the steps it loads to those it has.
    scheduler.num_steps = 0
    scheduler.load_state_dict(stored)


def _load_with_core(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    with _errors_of_core(f"checkpoint {folder} does not fit this model"):
        return dist_checkpointing.load(state, str(folder), **_common_strategy(folder))


def _common_strategy(folder: Path) -> dict[str, Any]:
    """Lets core 0.16 find among the tensors what it looks for in ``common.pt``, in checkpoints of core 0.19."""
    from megatron.core import dist_checkpointing

    if (folder / COMMON).is_file() or "common_strategy" not in inspect.signature(dist_checkpointing.load).parameters:
        return {}
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    class AmongTensors(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
            return CheckpointReader(Path(checkpoint_dir)).read_settings() or {}

    return {"common_strategy": AmongTensors()}


def _load_common(folder: Path) -> dict[str, Any]:
    """What is no tensor: the optimizer's step and the schedule.

    Raises:
        CheckpointError: it is not there, damaged, or asks for more than plain values.
    """
    common = CheckpointReader(folder).read_settings()
    if common is None or not {"optimizer_step", "scheduler"} <= common.keys():
        raise CheckpointError(f"checkpoint {folder} cannot be read: it lacks the optimizer's step or the schedule.")
    return common


@contextmanager
def _errors_of_core(what: str) -> Iterator[None]:
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            # Core's calls of functions that torch is about to rename are no business of who trains.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except CheckpointException as error:
        reasons = sorted({f"{type(cause).__name__}: {cause}" for cause, _ in error.failures.values()})
        raise CheckpointError(f"{what}: {'; '.join(reasons)}") from error
    except (CheckpointingException, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{what}: {reason}") from error


def _check_files(folder: Path, manifest: dict[str, Any], ranks: Ranks) -> None:
    """Compare all files with the manifest, each process a share; the first one looks at what would be unpickled."""
    damage = find_damage(folder, manifest, (ranks.rank, ranks.world_size))
    shares: list[Any] = [damage]
    if ranks.world_size > 1:
        shares = [None] * ranks.world_size
        dist.all_gather_object(shares, damage)
    found = [line for share in shares for line in share]
    if found:
        raise damaged(folder, found)
    problem = None
    if ranks.rank == 0:
        try:
            CheckpointReader(folder).check_plain()
        except CheckpointError as error:
            problem = str(error)
    problem = ranks.broadcast_object(problem)
    if problem is not None:
        raise CheckpointError(problem)
