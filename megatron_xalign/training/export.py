"""Hugging Face folders of a run's checkpoints, made while training goes on by a process of their own.

The ranks wait for nothing: a finished checkpoint is linked (no bytes are copied), so that its removal harms nothing,
and ``xalign convert to-hf`` runs beside the first process, one checkpoint at a time. What fails is logged with its
reason and leaves ``hf/step-NNNNNN.log``; training goes on.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_xalign.formats.checkpoint_folder import MANIFEST, checkpoint_folders, step_folder
from megatron_xalign.formats.run_folder import RunFolder

log = logging.getLogger(__name__)

# What tells a process that it belongs to a job; a conversion is a job of its own, on the CPU.
_OF_THE_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_LINKS = "exporting"


@dataclass
class _Running:
    step: int
    process: subprocess.Popen[bytes]
    log_file: IO[bytes]


class HfExporter:
    """An observer that exports checkpoints; only the first process of a job has one.

    Args:
        run: the run's folder; folders go to ``hf/step-NNNNNN``.
        interval_steps: checkpoints of multiples of this, and of the last step, are exported.
        train_steps: the last step; a run that ends before it was stopped, and does not wait for its exports.
    """

    def __init__(self, run: RunFolder, interval_steps: int, train_steps: int) -> None:
        self._run, self._interval, self._last = run, interval_steps, train_steps
        self._waiting: list[tuple[int, Path]] = []
        self._running: _Running | None = None
        self._reached_end = False
        self.failed: dict[int, str] = {}
        """Reason by step."""
        shutil.rmtree(run.path / _LINKS, ignore_errors=True)
        for checkpoint in checkpoint_folders(run.checkpoints):
            # What a run that was killed had not exported.
            if (checkpoint / MANIFEST).is_file():
                self.after_save(int(checkpoint.name.removeprefix("step-")), checkpoint)

    def before_step(self, step: int) -> None:
        """Nothing happens here."""

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """See whether an export has ended, and begin the next."""
        self._advance()

    def after_save(self, step: int, path: Path) -> None:
        """Put a checkpoint in line."""
        self._reached_end |= step == self._last
        out = step_folder(self._run.hf, step)
        if (step % self._interval and step != self._last) or (out / "config.json").is_file():
            return
        self._waiting.append((step, self._link(path)))
        self._advance()

    def close(self) -> None:
        """After the last step, wait for what is left; a run that was stopped leaves it to its next start."""
        while self._running is not None or self._waiting:
            if not self._reached_end:
                if self._running is not None:
                    self._running.process.kill()
                    self._running.process.wait()
                    self._running.log_file.close()
                self._running, self._waiting = None, []
                break
            if self._running is not None:
                self._running.process.wait()
            self._advance()
        shutil.rmtree(self._run.path / _LINKS, ignore_errors=True)
        if self.failed:
            log.error(
                "%d checkpoints were not exported: %s. Run `xalign convert to-hf CHECKPOINT %s` for them.",
                len(self.failed), ", ".join(f"step {step}" for step in sorted(self.failed)), self._run.hf / "step-...",
            )

    def _link(self, checkpoint: Path) -> Path:
        """The checkpoint under a name of ours, which stays when the run removes it; itself where links cannot be."""
        linked = self._run.path / _LINKS / checkpoint.name
        shutil.rmtree(linked, ignore_errors=True)
        try:
            linked.mkdir(parents=True)
            for file in checkpoint.iterdir():
                os.link(file, linked / file.name)
        except OSError as error:
            log.info("%s cannot be linked (%s); it is exported from where it lies.", checkpoint, error)
            shutil.rmtree(linked, ignore_errors=True)
            return checkpoint
        return linked

    def _advance(self) -> None:
        if self._running is not None:
            code = self._running.process.poll()
            if code is None:
                return
            self._end(self._running, code)
            self._running = None
        if not self._waiting:
            return
        step, checkpoint = self._waiting.pop(0)
        out = step_folder(self._run.hf, step)
        try:
            self._run.hf.mkdir(exist_ok=True)
            log_file = self._log_path(step).open("wb")
            process = subprocess.Popen(
                [
                    sys.executable, "-m", "megatron_xalign", "convert", "to-hf", str(checkpoint), str(out), "--dtype",
                    "stored",
                ],
                stdin=subprocess.DEVNULL, stdout=log_file, stderr=subprocess.STDOUT, env=_environment(),
            )
        except OSError as error:
            self._fail(step, str(error))
            return
        self._running = _Running(step, process, log_file)

    def _end(self, running: _Running, code: int) -> None:
        running.log_file.close()
        shutil.rmtree(self._run.path / _LINKS / step_folder(Path(), running.step).name, ignore_errors=True)
        path = self._log_path(running.step)
        if code == 0:
            path.unlink(missing_ok=True)
            log.info("exported step %d to %s.", running.step, step_folder(self._run.hf, running.step))
            return
        said = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        self._fail(running.step, said[-1] if said else f"it ended with code {code}")
        # A folder that failed its check is not one to evaluate.
        out = step_folder(self._run.hf, running.step)
        if out.is_dir():
            shutil.rmtree(out.with_name(f"{out.name}.failed"), ignore_errors=True)
            out.rename(out.with_name(f"{out.name}.failed"))

    def _fail(self, step: int, reason: str) -> None:
        self.failed[step] = reason
        log.error("step %d was not exported to a Hugging Face folder: %s", step, reason)

    def _log_path(self, step: int) -> Path:
        return self._run.hf / f"{step_folder(Path(), step).name}.log"


def _environment() -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items()
        if name not in _OF_THE_JOB and not name.startswith("TORCHELASTIC_")
    }
    # No GPU of the job's, and one thread: training has the rest.
    return kept | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "XALIGN_PROGRESS": "0"}
