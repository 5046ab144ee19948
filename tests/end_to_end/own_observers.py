"""Observers that the tests name in a config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_xalign.batch import NO_LANGUAGE, Batch
from megatron_xalign.capture.recorder import MicroBatch, Recorder
from megatron_xalign.topology import ObserverState
from megatron_xalign.training.observers import RunContext


class Quiet:
    def __init__(self, run: RunContext, **options: Any) -> None:
        self.run, self.options = run, options

    def before_step(self, step: int) -> None:
        """Nothing."""

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Nothing."""

    def after_save(self, step: int, path: Path) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Fails(Quiet):
    """Ends the first start in the middle."""

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        if step == self.options["step"] and self.run.start_step == 0:
            raise RuntimeError("as it should")


class Poison(Quiet):
    """Takes the model's weights away before a step; keeps a list of what it heard."""

    name = "poison"

    def __init__(self, run: RunContext, step: int) -> None:
        super().__init__(run)
        self.step, self.heard = step, [0]

    def before_step(self, step: int) -> None:
        if step + 1 == self.step:
            for chunk in self.run.model_chunks:
                for weight in chunk.parameters():
                    weight.data.fill_(float("nan"))

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.heard.append(step)
        if step == self.run.train_steps and self.run.ranks.rank == 0:
            (self.run.run_folder / "heard").write_text(str(self.heard), encoding="utf-8")

    def state(self) -> ObserverState:
        return {"heard": self.heard}, {}

    def restore(self, state: ObserverState) -> None:
        self.heard = list(state[0]["heard"])


class Listens(Quiet):
    """Counts the micro-batches that it hears between the start of a step and its end."""

    listens, wants_residual = True, False

    def __init__(self, run: RunContext) -> None:
        super().__init__(run)
        self.recorder = Recorder(run.model_chunks, run.ranks, run.current_batch)

    def before_step(self, step: int) -> None:
        self.heard = 0
        self.recorder.start(self)

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.recorder.close()
        with (self.run.run_folder / f"heard-{self.run.ranks.rank}").open("a", encoding="utf-8") as file:
            file.write(f"{self.heard}\n")

    def take_neurons(self, row: int, act_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        self.heard += row == 0

    def take_gates(self, row: int, gate_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Nothing."""

    def take_residual(self, row: int, hidden_SBH: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Nothing."""


class Evaluates(Quiet):
    """Runs the model beside capture, at every step: on what it read last."""

    def before_step(self, step: int) -> None:
        self._evaluate(f"before {step}")

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._evaluate(f"after {step}")

    def _evaluate(self, moment: str) -> None:
        tokens_BS = torch.arange(2 * 32).reshape(2, 32) % 100
        none_BS = torch.full_like(tokens_BS, NO_LANGUAGE)
        losses = self.run.forward_only([
            Batch(
                tokens=tokens_BS, labels=tokens_BS.roll(-1, 1), loss_mask=torch.ones(2, 32),
                position_ids=torch.arange(32).expand(2, 32), language_ids=none_BS.to(torch.int8),
                label_language_ids=none_BS.to(torch.int8), source_ids=none_BS.to(torch.int16),
                document_ids=torch.zeros(2, 32, dtype=torch.int32),
            )
        ])
        if losses is not None and self.run.ranks.tensor_rank == 0:
            with (self.run.run_folder / "evaluated").open("a", encoding="utf-8") as file:
                file.write(f"{moment} {losses[0].mean().item():.6f}\n")
