"""Loss per language and per source over an interval of training, and the file they are written to."""

# B micro-batch, S sequence, K languages, N sources

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_xalign.batch import Batch
from megatron_xalign.errors import FormatError
from megatron_xalign.formats.atomic import write_text
from megatron_xalign.topology import Ranks


class LossSums:
    """Token-weighted sums of the loss: in all, by language of the label, and by source; and tokens since the start.

    Args:
        languages: what language ids in batches count.
        source_names: what source ids in batches count.
        ranks: this process's place.
        parallel_sources: names of the sources that hold pairs, for ``parallel_fraction``; None leaves that out.
        with_z_loss: whether there is a z-loss, which is then reported beside the loss.
    """

    def __init__(
        self, languages: Sequence[str], source_names: Sequence[str], ranks: Ranks,
        parallel_sources: Collection[str] | None = None, with_z_loss: bool = False,
    ) -> None:
        self.languages = list(languages)
        self.source_names = list(source_names)
        self.ranks = ranks
        self._parallel_sources = parallel_sources
        # Rows: loss and tokens of the interval, tokens since the start. Columns: in all; no language, K languages; no
        # source, N sources; content tokens of no source, of N sources; z-loss, where there is one.
        self._sources_at = 2 + len(self.languages)
        self._content_at = self._sources_at + 1 + len(self.source_names)
        self._z_loss_at = self._content_at + 1 + len(self.source_names) if with_z_loss else None
        num_columns = self._content_at + 1 + len(self.source_names) + with_z_loss
        self._sums = torch.zeros(3, num_columns, dtype=torch.float64, device=ranks.device)

    def add(self, batch: Batch, loss_BS: torch.Tensor, z_loss_BS: torch.Tensor | None = None) -> None:
        """Add a micro-batch's losses, [B, S], weighted by its ``loss_mask``."""
        weight = batch.loss_mask.double().flatten()
        rows = torch.stack([loss_BS.double().flatten() * weight, weight, weight])
        language = batch.label_language_ids.long().flatten()
        source = batch.source_ids.long().flatten()
        self._sums[:, 0] += rows.sum(1)
        self._sums.index_add_(1, language + 2, rows)
        self._sums.index_add_(1, source + self._sources_at + 1, rows)
        self._sums.index_add_(1, source + self._content_at + 1, rows * (language >= 0))
        if self._z_loss_at is not None and z_loss_BS is not None:
            self._sums[0, self._z_loss_at] += (z_loss_BS.double().flatten() * weight).sum()

    def copy(self) -> torch.Tensor:
        """The sums of this process as they are now, for ``mean_since`` and ``put_back``."""
        return self._sums.clone()

    def mean_since(self, before: torch.Tensor) -> float:
        """Mean loss of the tokens added since a copy was made, over all tokens of the job, on every process."""
        added = self.ranks.sum_over(self._sums[:2, 0] - before[:2, 0], "data_context")
        loss, tokens = self.ranks.broadcast_over(added, "pipeline", self.ranks.pipeline_size - 1).tolist()
        # Not where the number of tokens is NaN: that is a loss to be judged.
        return 0.0 if tokens == 0 else loss / tokens

    def put_back(self, before: torch.Tensor) -> None:
        """Forget what was added since a copy was made."""
        self._sums.copy_(before)

    def state(self) -> list[list[float]]:
        """The sums over all ranks that hold other tokens, the same on every process, for a checkpoint.

        A z-loss, if there is one, is a row of its own: a run may go on with or without it.
        """
        sums = self.ranks.sum_over(self._sums, "data_context")
        state: list[list[float]] = self.ranks.broadcast_over(sums, "pipeline", self.ranks.pipeline_size - 1).tolist()
        if self._z_loss_at is None:
            return state
        return [row[: self._z_loss_at] for row in state] + [[state[0][self._z_loss_at]]]

    def restore(self, state: Sequence[Sequence[float]]) -> None:
        """Go on from the sums of a checkpoint.

        Raises:
            ValueError: they are of another number of languages or sources.
        """
        rows, z_loss = state[:3], state[3:]
        sums = torch.zeros_like(self._sums)
        columns = self._sums.shape[1] - (self._z_loss_at is not None)
        if [len(row) for row in rows] != [columns] * 3:
            raise ValueError(f"loss sums of {[len(row) for row in rows]} columns; this run has three of {columns}.")
        sums[:, :columns] = torch.tensor(rows, dtype=sums.dtype)
        if self._z_loss_at is not None and z_loss:
            sums[0, self._z_loss_at] = z_loss[0][0]
        # They are already summed over data- and context-parallel ranks: one of those holds them.
        self._sums.copy_(sums if self.ranks.data_context_rank == 0 else torch.zeros_like(sums))

    def take(self) -> dict[str, Any]:
        """Means since the last call, over all tokens of the job, on every process; start again from zero.

        Returns:
            ``loss``, ``loss_by_language`` and ``loss_by_source`` in nats per token; a language or source without a
            token in this interval is left out. ``tokens_by_language`` and ``tokens_by_source``: loss-bearing tokens
            since the start of the run. ``parallel_fraction``: share of content tokens (those with a language) so far
            that came from ``parallel_sources``. ``z_loss``: its mean, where there is one.
        """
        sums = self.ranks.sum_over(self._sums, "data_context")
        loss, tokens, so_far = self.ranks.broadcast_over(sums, "pipeline", self.ranks.pipeline_size - 1).tolist()
        self._sums[:2].zero_()

        def means(names: list[str], first: int) -> dict[str, float]:
            return {
                name: loss[column] / tokens[column]
                for column, name in enumerate(names, start=first)
                if tokens[column] > 0
            }

        def counts(names: list[str], first: int) -> dict[str, int]:
            return {name: round(so_far[column]) for column, name in enumerate(names, start=first)}

        means_and_counts: dict[str, Any] = {
            "loss": loss[0] / tokens[0] if tokens[0] > 0 else 0.0,
            "loss_by_language": means(self.languages, 2),
            "loss_by_source": means(self.source_names, self._sources_at + 1),
            "tokens_by_language": counts(self.languages, 2),
            "tokens_by_source": counts(self.source_names, self._sources_at + 1),
        }
        if self._z_loss_at is not None:
            means_and_counts["z_loss"] = loss[self._z_loss_at] / tokens[0] if tokens[0] > 0 else 0.0
        if self._parallel_sources is not None:
            content = counts(self.source_names, self._content_at + 1)
            parallel = sum(content[name] for name in self._parallel_sources)
            means_and_counts["parallel_fraction"] = parallel / max(sum(content.values()), 1)
        return means_and_counts


def with_columns_of(
    state: Sequence[Sequence[float]], before: tuple[Sequence[str], Sequence[str]],
    now: tuple[Sequence[str], Sequence[str]],
) -> list[list[float]]:
    """Sums as ``LossSums.state`` gives them, of a run with some languages and sources, for one with others.

    Args:
        state: the sums.
        before: languages and source names of the run that summed.
        now: those of the run that goes on; what is new to it has sums of zero, what it lacks is left out.
    """

    def columns(languages: Sequence[str], sources: Sequence[str]) -> list[tuple[str, str | None]]:
        return [
            ("all", None), *(("language", name) for name in (None, *languages)),
            *(("source", name) for name in (None, *sources)), *(("content", name) for name in (None, *sources)),
        ]

    rows = [dict(zip(columns(*before), row, strict=True)) for row in state[:3]]
    return [[row.get(column, 0.0) for column in columns(*now)] for row in rows] + [list(row) for row in state[3:]]


def readable(line: Mapping[str, Any], train_steps: int) -> str:
    """A line of metrics for people who read a log: what is learned, whether it is well, how fast, how long still."""
    languages = ", ".join(f"{name} {loss:.3f}" for name, loss in line.get("loss_by_language", {}).items())
    loss = f"loss {line['loss']:.4f}" + (f" ({languages})" if languages else "")
    parts = [f"step {line['step']}/{train_steps}", loss]
    if "parallel_fraction" in line:
        parts.append(f"parallel {100 * line['parallel_fraction']:.2f} %")
    if line.get("grad_norm") is not None:
        parts.append(f"gradient {line['grad_norm']:.3f}")
    parts += [f"lr {line['lr']:.3g}", f"{line['tokens_per_second']:,.0f} tokens/s"]
    if "mfu" in line:
        parts.append(f"MFU {100 * line['mfu']:.1f} %")
    minutes, seconds = divmod(round(line["seconds_left"]), 60)
    hours, minutes = divmod(minutes, 60)
    parts += [f"{line['memory_gib']:.1f} GiB", f"{hours}:{minutes:02d}:{seconds:02d} left"]
    return " | ".join(parts)


def append_metrics(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line to ``metrics.jsonl`` and hand it to the operating system at once.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the lines of ``metrics.jsonl`` up to ``step``, for a run that goes on from a checkpoint of that step.

    A last line cut off when the run was killed is dropped.

    Raises:
        FormatError: another line is not JSON with a ``step``.
    """
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    kept = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            if int(json.loads(line.decode("utf-8"))["step"]) <= step:
                kept.append(line.decode("utf-8"))
        except (ValueError, KeyError, TypeError):
            # Every whole line ends in a newline, so only the piece after the last one can be unfinished.
            if number == len(lines):
                continue
            shown = line[:80].decode("utf-8", errors="replace")
            raise FormatError(
                f"{path} line {number} is not a JSON object with a step: {shown!r}. Take that line out, or restore the "
                "file from a copy; the run then goes on."
            ) from None
    write_text(path, "".join(line + "\n" for line in kept))
