"""The folder of one training run: what lies where, and the facts written before its first step.

```
RUN/config.yaml    the resolved config, the first file written
RUN/run.json       version, commit, seed, command, library versions, layout
RUN/audit.json     the mixture, asked against achieved
RUN/metrics.jsonl  one object per logged step
RUN/tensorboard/   the same numbers for TensorBoard
RUN/checkpoints/   step-000100/ ...
RUN/neurons/       step-000100/ ...
RUN/analysis/      results.json ...
RUN/.training      held while a job trains (run_lock)
```
"""

from __future__ import annotations

import importlib.metadata
import json
import platform as python_platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_xalign import __version__
from megatron_xalign.config import RunConfig, read_config
from megatron_xalign.config.tree import to_tree, to_yaml
from megatron_xalign.errors import CheckpointError, ConfigError, FormatError
from megatron_xalign.formats.atomic import read_json, write_json, write_text

# Settings that may change between two starts of one run without changing a single trained bit.
_FREE_TO_CHANGE = (
    "output_dir", "training.log_interval_steps", "training.save_interval_steps", "training.keep_checkpoints",
    "parallel.distributed_timeout_seconds", "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size", "parallel.sequence_parallel", "parallel.use_distributed_optimizer",
    "training.micro_batch_size", "training.hf_export_interval_steps",
    "training.keep_every_steps", "training.checkpoint_hashes", "training.async_save",
    "training.allow_changed_data", "parallel.heartbeat_interval_seconds", "logging.tensorboard",
    "logging.wandb_project", "logging.wandb_mode", "logging.mlflow_experiment", "logging.mlflow_tracking_uri",
    # What becomes of bad steps to come: a run that one of them stopped goes on with another policy.
    "training.nonfinite_policy", "training.loss_spike_policy", "training.loss_spike_deviations",
    "training.loss_spike_window", "training.max_bad_steps",
)

_WAY_OUT = "Restore it from a copy; or delete it, and the next start writes it again, without the earlier ones."


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of one run lie."""

    path: Path

    @property
    def config_path(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def facts_path(self) -> Path:
        """Version, commit, seed, command, layout."""
        return self.path / "run.json"

    @property
    def audit_path(self) -> Path:
        """The mixture, asked against achieved."""
        return self.path / "audit.json"

    @property
    def metrics_path(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def validation_path(self) -> Path:
        """Losses on held-out documents, one JSON object a line, where they are measured."""
        return self.path / "validation.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, a folder each."""
        return self.path / "checkpoints"

    @property
    def hf(self) -> Path:
        """Hugging Face folders of checkpoints, by step, where they are exported while training."""
        return self.path / "hf"

    @property
    def neurons(self) -> Path:
        """Neuron statistics, a folder per probed step."""
        return self.path / "neurons"

    @property
    def analysis(self) -> Path:
        """Measures computed from the neuron statistics."""
        return self.path / "analysis"

    @property
    def evaluation(self) -> Path:
        """What `xalign evaluate` measured of the checkpoints."""
        return self.analysis / "evaluation"

    @property
    def captures_path(self) -> Path:
        """How statistics were captured of a model that was not trained here."""
        return self.path / "capture.json"

    def captures(self) -> dict[str, Any]:
        """What ``captures_path`` tells of each step, by the name of its folder in ``neurons``.

        Raises:
            FormatError: it cannot be read, or is not what `xalign capture` writes.
        """
        if not self.captures_path.is_file():
            return {}
        content = read_json(self.captures_path)
        captures = content.get("captures") if isinstance(content, dict) else None
        if not isinstance(captures, dict) or not all(isinstance(entry, dict) for entry in captures.values()):
            raise FormatError(
                f"{self.captures_path} is not what `xalign capture` writes; capture again into a new folder."
            )
        return captures

    def config(self) -> RunConfig:
        """The resolved config of the run.

        Raises:
            FormatError: this is not a run folder, or its config cannot be read.
        """
        if not self.config_path.is_file():
            raise FormatError(f"{self.path} is not a run folder: it has no config.yaml; `xalign train` makes one.")
        try:
            if not self.config_path.stat().st_size:
                raise ConfigError("it is empty.")
            return read_config(self.config_path)
        except ConfigError as error:
            raise FormatError(
                f"{self.config_path}, which `xalign train` wrote, cannot be read: {error} Restore it from a copy; or "
                "delete it, and the next start of the run writes it again, of its own settings."
            ) from None

    def facts(self) -> dict[str, Any]:
        """What ``run.json`` holds.

        Raises:
            FormatError: it is missing, or not what `xalign train` writes.
        """
        if not self.facts_path.is_file():
            raise FormatError(f"{self.facts_path} does not exist; `xalign train` writes it at every start.")
        try:
            facts = read_json(self.facts_path)
        except FormatError as error:
            raise FormatError(f"{error} {_WAY_OUT}") from None
        if not isinstance(facts, dict) or not isinstance(facts.get("starts"), list):
            raise self._not_ours("it has no list of starts")
        return facts

    def first_step(self) -> int:
        """Optimizer steps that the run began with: those of the checkpoint it branched from; 0 for most."""
        branched = self.facts().get("branched_from") if self.facts_path.is_file() else None
        if branched is None:
            return 0
        if not isinstance(branched, dict) or not isinstance(branched.get("step"), int):
            raise self._not_ours(f"branched_from is {branched!r}")
        return int(branched["step"])

    def _not_ours(self, why: str) -> FormatError:
        return FormatError(f"{self.facts_path} is not what `xalign train` writes: {why}. {_WAY_OUT}")

    def train_steps(self) -> int:
        """Optimizer steps of the whole run; more than its config asks for with ``budget_rule: add``."""
        if not self.facts_path.is_file():
            return self.config().training.train_steps
        steps = self.facts().get("train_steps")
        if not isinstance(steps, int):
            raise self._not_ours(f"train_steps is {steps!r}")
        return steps

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The logged steps in order.

        Raises:
            FormatError: the file is missing or a line other than a cut-off last one is not JSON.
        """
        if not self.metrics_path.is_file():
            raise FormatError(f"{self.metrics_path} does not exist; the run has not logged a step yet.")
        lines = self.metrics_path.read_bytes().rstrip(b"\n").split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line.decode("utf-8"))
            except ValueError:
                if number == len(lines):  # the run was killed while it wrote this line
                    return
                shown = line[:80].decode("utf-8", errors="replace")
                raise FormatError(
                    f"{self.metrics_path}:{number} is not JSON: {shown!r}. Take that line out, or restore the file "
                    "from a copy."
                ) from None


    def check_may_begin(self) -> None:
        """Check, where there is no checkpoint, that the run has not got past the first one it wrote.

        One that was stopped before that begins again; another would be written over from its first step.

        Raises:
            CheckpointError: it has got further.
        """
        if not (self.metrics_path.is_file() and self.config_path.is_file()):
            return
        training, begin = self.config().training, self.first_step()
        saved = (begin // training.save_interval_steps + 1) * training.save_interval_steps
        if training.async_save:
            # Complete when the next one begins, at the latest.
            saved += training.save_interval_steps
        last = 0
        for line in self.metrics():
            last = line["step"] if isinstance(line, dict) and isinstance(line.get("step"), int) else last
        if last > saved:
            raise CheckpointError(
                f"{self.metrics_path} goes to step {last}, and {self.checkpoints} holds no checkpoint any more: the "
                f"run would start from step {begin} and write over what is there. Restore a checkpoint from a copy, or "
                f"train in another output_dir; or delete {self.metrics_path.name}, and it starts over."
            )


def start_run(config: RunConfig, command: list[str], layout: dict[str, int], facts: dict[str, Any]) -> RunFolder:
    """Create a run's folder, or accept the one that is there if it holds the same run; call on one rank only.

    Raises:
        ConfigError: the folder holds another run; the message names the settings that differ.
    """
    run = RunFolder(Path(config.output_dir))
    if run.config_path.is_file():
        check_same_run(run, config)
    before = run.facts() if run.facts_path.is_file() else {}
    if "branched_from" in before:
        facts = {"branched_from": before["branched_from"], **facts}
    write_text(run.config_path, to_yaml(config))
    write_json(
        run.facts_path,
        {
            "name": config.name,
            "version": __version__,
            "commit": source_commit(),
            "seed": config.seed,
            "layout": layout,
            "versions": library_versions(),
            **facts,
            "starts": [
                *before.get("starts", []),
                {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": command},
            ],
        },
    )
    return run


def check_same_run(run: RunFolder, config: RunConfig) -> None:
    """Raise ConfigError if a folder holds a run that differs from ``config``; the message names the settings."""
    differing = differing_settings(run.config(), config)
    if differing:
        raise ConfigError(
            f"output_dir={run.path} holds a run with other settings: {'; '.join(differing)}. "
            "Choose another output_dir, or remove that folder to start over."
        )


def differing_settings(before: RunConfig, now: RunConfig) -> list[str]:
    """Settings that make two configs different runs, as ``path: old -> new``."""
    flat_before, flat_now = dict(_flatten(to_tree(before))), dict(_flatten(to_tree(now)))
    return [
        f"{key}: {flat_before.get(key)} -> {flat_now.get(key)}"
        for key in sorted(flat_before.keys() | flat_now.keys())
        if flat_before.get(key) != flat_now.get(key) and key not in _FREE_TO_CHANGE
        # They watch.
        and not key.startswith("observers.")
    ]


def _flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield path, tree
        return
    for key, value in items:
        yield from _flatten(value, f"{path}.{key}" if path else str(key))


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape a run's numbers."""
    versions = {"python": python_platform.python_version()}
    for name in ("torch", "megatron-core", "transformer-engine", "flash-attn", "apex", "numpy", "tokenizers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def source_commit() -> str | None:
    """Git commit of the checkout this package runs from, ``+changes`` if edited; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, check=True, timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")


def command_line() -> list[str]:
    """The command this process was started with."""
    return ["xalign", *sys.argv[1:]]
