"""The numbers of ``metrics.jsonl`` for TensorBoard, Weights & Biases and MLflow, as observers of the loop.

They exist on the first process only. A service that fails, on the network or in itself, is given up with a warning,
also at the start, since a job that requeues itself at night must not end for it: what it would have got is in
``metrics.jsonl``. A package that is missing is an error, before the first step.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_xalign.config import LoggingConfig, RunConfig
from megatron_xalign.config.tree import to_tree
from megatron_xalign.errors import ConfigError
from megatron_xalign.formats.event_file import EventFile

log = logging.getLogger(__name__)


class Tracker:
    """Sends every logged line somewhere.

    Args:
        name: of the service, for messages.
        send: gets a step and its numbers.
        finish: called once at the end.
    """

    def __init__(
        self, name: str, send: Callable[[int, dict[str, float]], Any], finish: Callable[[], Any]
    ) -> None:
        self._name, self._send, self._finish = name, send, finish
        self._works = True

    def before_step(self, step: int) -> None:
        """Nothing."""

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send a logged step, and the scores of one that was probed; before the first those of the untrained model."""
        numbers = dict(metrics)
        at_start = numbers.pop("scores_at_start", None)
        if at_start:
            self._try(lambda: self._send(0, dict(flat({"scores": at_start}))))
        if "loss" in numbers or "scores" in numbers:
            self._try(lambda: self._send(step, dict(flat(numbers))))

    def after_save(self, step: int, path: Path) -> None:
        """Nothing."""

    def close(self) -> None:
        """Hand over what is left."""
        self._try(self._finish)

    def _try(self, act: Callable[[], Any]) -> None:
        if not self._works:
            return
        try:
            act()
        except Exception as error:
            # Whatever the service's client raises; training does not depend on it.
            self._works = False
            log.warning(
                "%s failed and gets nothing more (%s: %s); metrics.jsonl has it all.",
                self._name, type(error).__name__, error,
            )


def flat(metrics: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a line of metrics by name: ``loss``, ``loss_by_language/fin_Latn``; what is not finite is left out."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}{name}/")
        elif isinstance(value, (int, float)) and name != "step" and math.isfinite(value):
            yield f"{path}{name}", float(value)


def build_trackers(config: RunConfig, folder: Path, start_step: int) -> list[Tracker]:
    """The trackers a run asks for; call it on the first process only.

    Args:
        config: ``logging`` says which.
        folder: the run's; TensorBoard's files go to ``tensorboard/`` in it.
        start_step: finished steps.

    Raises:
        ConfigError: a package is missing.
    """
    found = []
    if config.logging.tensorboard:
        events = EventFile(folder / "tensorboard", start_step + 1)
        found.append(Tracker("TensorBoard", events.write, events.close))
    services = ((config.logging.wandb_project, _wandb), (config.logging.mlflow_experiment, _mlflow))
    for asked, build in services:
        if asked is None:
            continue
        try:
            found.append(build(config, config.logging, folder))
        except ConfigError:
            raise
        except Exception as error:  # whatever the service's client raises
            log.warning("%s cannot be reached (%s: %s); metrics.jsonl has it all.", asked, type(error).__name__, error)
    return found


def _wandb(config: RunConfig, wanted: LoggingConfig, folder: Path) -> Tracker:
    try:
        import wandb
    except ImportError:
        raise ConfigError(
            f"logging.wandb_project={wanted.wandb_project} needs a package: pip install 'megatron-xalign[wandb]'."
        ) from None
    # The same id every time: a run that continues appends to its curves.
    run = wandb.init(
        project=wanted.wandb_project, name=config.name, id=_stable_id(folder), resume="allow", mode=wanted.wandb_mode,
        dir=str(folder), config=to_tree(config),
    )
    return Tracker("Weights & Biases", lambda step, numbers: run.log(numbers, step=step), run.finish)


def _mlflow(config: RunConfig, wanted: LoggingConfig, folder: Path) -> Tracker:
    try:
        import mlflow
    except ImportError:
        raise ConfigError(
            f"logging.mlflow_experiment={wanted.mlflow_experiment} needs a package: pip install "
            "'megatron-xalign[mlflow]'."
        ) from None
    server = wanted.mlflow_tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if server is None:
        # Plain files need no database and no network; newer versions ask to be told that this is meant.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        server = (folder / "mlflow").resolve().as_uri()
    mlflow.set_tracking_uri(server)
    mlflow.set_experiment(wanted.mlflow_experiment)
    id_file = folder / "mlflow-run-id"
    known = id_file.read_text(encoding="utf-8").strip() if id_file.is_file() else None
    run = mlflow.start_run(run_id=known, run_name=None if known else config.name)
    if known is None:
        id_file.write_text(run.info.run_id, encoding="utf-8")
        mlflow.log_params({name: str(value)[:250] for name, value in _settings(to_tree(config))})
    return Tracker("MLflow", lambda step, numbers: mlflow.log_metrics(numbers, step=step), mlflow.end_run)


def _settings(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _settings(value, f"{path}.{name}" if path else name)
    else:
        yield path, tree


def _stable_id(folder: Path) -> str:
    """An id of a run folder that stays when the run is started again."""
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
