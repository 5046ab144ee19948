"""What chosen neurons fire on: a bounded sample of tokens with their text, and the tokens that excite each most.

Two things are kept over the training batches of a window, both bounded whatever its length. The **sample**: per
language a fixed number of tokens, drawn without regard to activations, with the activations of all chosen neurons. The
**top**: for each chosen neuron the tokens of its largest activations. Every token gets a priority, a hash of the seed,
the step, its row and its place in it, and the sample are the tokens of lowest priority: so it is uniform, the same
whatever the micro-batches and the parallel layout, and samples of several processes join into the sample of all.
"""

# S sequence, B micro-batch, T tokens in the order of [S, B], K languages, R sampled tokens of a language
# N chosen neurons, E top tokens of a neuron, W tokens of context, F ffn width of this rank

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_xalign.batch import Batch, context_positions
from megatron_xalign.capture.recorder import MicroBatch, Recorder
from megatron_xalign.config import SampleConfig
from megatron_xalign.topology import Axis, Ranks

_NEVER = np.iinfo(np.int64).max
_OUTSIDE = -1


@dataclass
class _Pending:
    """Tokens of a running micro-batch that may enter the sample."""

    batch: Batch
    whole: Batch
    position_S: torch.Tensor
    """int64: where in the whole sequences the tokens of the batch are."""
    all_languages: torch.Tensor
    """int64: of all tokens of the micro-batch."""
    all_priorities: torch.Tensor
    """int64: the same."""
    place_T: torch.Tensor
    """Numbers of the tokens that may enter, among all."""
    context_TW: torch.Tensor
    act_TN: torch.Tensor
    layers_left: int


class NeuronSamples:
    """Samples and tops over training tokens; a ``recorder.Listener``.

    Args:
        config: which neurons, how many tokens.
        num_languages: K.
        recorder: what this process holds.
        ranks: this process's place; everything is kept on its device.
    """

    wants_residual = False

    def __init__(self, config: SampleConfig, num_languages: int, recorder: Recorder, ranks: Ranks) -> None:
        self.neurons = tuple(config.chosen)
        """(layer, neuron) of each of the N."""
        self.step = 0
        """The optimizer step the coming micro-batches belong to; set before each."""
        self._config, self._num_languages, self._ranks = config, num_languages, ranks
        self._device = device = ranks.device
        first, stop = recorder.neurons
        # Of each layer held here: places among the N, and columns of this process's activations.
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for row, layer in enumerate(recorder.layers):
            here = [
                (place, neuron - first) for place, (of, neuron) in enumerate(self.neurons)
                if of == layer and first <= neuron < stop
            ]
            if here:
                places, columns = zip(*here, strict=True)
                self._own[row] = (torch.tensor(places, device=device), torch.tensor(columns, device=device))
        self._num_rows = len(recorder.layers)
        self._weights = torch.from_numpy(
            np.random.default_rng(config.seed).integers(-(2**62), 2**62, 1, dtype=np.int64)
        )
        self.arrays: dict[str, torch.Tensor] = {}
        """What is kept, by name."""
        self.reset()

    def reset(self) -> None:
        """Begin again with nothing."""
        self.arrays = {
            name: torch.full(shape, filler, dtype=dtype, device=self._device)
            for name, (shape, dtype, filler) in self.layout().items()
        }
        self._pending: list[_Pending] = []

    def copy(self) -> dict[str, torch.Tensor]:
        """What is kept now, for ``put_back``."""
        return {name: array.clone() for name, array in self.arrays.items()}

    def put_back(self, before: dict[str, torch.Tensor]) -> None:
        """Forget what came after ``copy``."""
        self.arrays = before

    def layout(self) -> dict[str, tuple[tuple[int, ...], torch.dtype, float | int]]:
        """Shape, type and empty value of each array."""
        tokens, top = self._config.tokens_per_language, self._config.top
        width, count = 2 * self._config.context_tokens + 1, len(self.neurons)
        languages = self._num_languages
        return {
            "priority_KR": ((languages, tokens), torch.int64, _NEVER),
            "act_KRN": ((languages, tokens, count), torch.float32, 0.0),
            "context_KRW": ((languages, tokens, width), torch.int64, _OUTSIDE),
            "top_act_NE": ((count, top), torch.float32, -torch.inf),
            "top_priority_NE": ((count, top), torch.int64, _NEVER),
            "top_language_NE": ((count, top), torch.int64, _OUTSIDE),
            "top_context_NEW": ((count, top, width), torch.int64, _OUTSIDE),
        }

    def take_gates(self, row: int, gate_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Nothing."""

    def take_residual(self, row: int, hidden_SBH: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Nothing."""

    def take_neurons(self, row: int, act_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Look at one micro-batch's activations of one layer."""
        pending = self._pending_of(micro_batch)
        if row in self._own:
            places, columns = self._own[row]
            act_TN = act_SBF.flatten(0, 1).index_select(1, columns).float()
            pending.act_TN[:, places] = act_TN[pending.place_T]
            self._take_top(places, act_TN, pending)
        pending.layers_left -= 1
        if pending.layers_left == 0:
            self._pending.remove(pending)
            self._merge_sample(pending)

    def _pending_of(self, micro_batch: MicroBatch) -> _Pending:
        batch, whole = micro_batch.batch, micro_batch.whole
        for pending in self._pending:
            if pending.batch is batch:
                return pending
        position_S = context_positions(whole.tokens.shape[1], self._ranks.context_rank, self._ranks.context_size)
        position_S = position_S.to(self._device)
        language_T = batch.language_ids.t().reshape(-1).long()
        priority_T = self._priorities(whole)[:, position_S].t().reshape(-1)
        chosen = []
        for k in range(self._num_languages):
            candidates = torch.nonzero(language_T == k)[:, 0]
            candidates = candidates[priority_T[candidates] < self.arrays["priority_KR"][k, -1]]
            order = torch.argsort(priority_T[candidates])[: self._config.tokens_per_language]
            chosen.append(candidates[order])
        place_T = torch.cat(chosen)
        pending = _Pending(
            batch=batch, whole=whole, position_S=position_S, all_languages=language_T, all_priorities=priority_T,
            place_T=place_T, context_TW=self._contexts(whole, position_S, place_T),
            act_TN=torch.zeros(len(place_T), len(self.neurons), device=self._device), layers_left=self._num_rows,
        )
        self._pending.append(pending)
        return pending

    def _priorities(self, batch: Batch) -> torch.Tensor:
        """int64 [B, S] of whole sequences, not negative and below the largest number."""
        length = batch.tokens.shape[1]
        # 64-bit arithmetic that wraps around: the same on every device.
        place_S = _mixed(torch.arange(1, length + 1, device=self._device) + _mixed(self._weights.to(self._device)))
        row_B = (_mixed(batch.tokens) * (place_S | 1)).sum(1)
        hashed_BS = _mixed(_mixed(row_B + self.step * 0x1F3D5B79)[:, None] + place_S)
        return hashed_BS & (_NEVER >> 1)

    def _contexts(self, whole: Batch, position_S: torch.Tensor, place_T: torch.Tensor) -> torch.Tensor:
        """int64 [T, W]: the tokens around each, the token itself in the middle; -1 outside the row."""
        batch_size, length = whole.tokens.shape
        reach = torch.arange(-self._config.context_tokens, self._config.context_tokens + 1, device=self._device)
        position_TW = position_S[place_T // batch_size][:, None] + reach
        inside = (position_TW >= 0) & (position_TW < length)
        tokens = whole.tokens[(place_T % batch_size)[:, None], position_TW.clamp(0, length - 1)]
        return torch.where(inside, tokens, _OUTSIDE)

    def _merge_sample(self, pending: _Pending) -> None:
        kept = self.arrays
        for k in range(self._num_languages):
            own = pending.all_languages[pending.place_T] == k
            if not own.any():
                continue
            priority = torch.cat([kept["priority_KR"][k], pending.all_priorities[pending.place_T][own]])
            first = torch.argsort(priority, stable=True)[: self._config.tokens_per_language]
            for name, new in (("act_KRN", pending.act_TN), ("context_KRW", pending.context_TW)):
                kept[name][k] = torch.cat([kept[name][k], new[own]])[first]
            kept["priority_KR"][k] = priority[first]

    def _take_top(self, places: torch.Tensor, act_TN: torch.Tensor, pending: _Pending) -> None:
        language_T, priority_T = pending.all_languages, pending.all_priorities
        act_TN = torch.where((language_T >= 0)[:, None], act_TN, -torch.inf)
        count = min(self._config.top, len(act_TN))
        # Ties go to the lower priority, as everywhere: equal tokens may have equal activations.
        by_priority_T = torch.argsort(priority_T)
        sorted_TN, order_TN = act_TN[by_priority_T].sort(dim=0, descending=True, stable=True)
        best_EN, place_EN = sorted_TN[:count], by_priority_T[order_TN[:count]]
        new = {
            "top_act_NE": best_EN.t(),
            "top_priority_NE": torch.where(torch.isinf(best_EN), _NEVER, priority_T[place_EN]).t(),
            "top_language_NE": torch.where(torch.isinf(best_EN), _OUTSIDE, language_T[place_EN]).t(),
            "top_context_NEW": self._contexts(pending.whole, pending.position_S, place_EN.t().reshape(-1)).reshape(
                len(places), count, -1
            ),
        }
        both = {name: torch.cat([self.arrays[name][places], values], dim=1) for name, values in new.items()}
        for name, values in _best(both, self._config.top).items():
            self.arrays[name][places] = values

    def joined(self, ranks: Ranks) -> dict[str, torch.Tensor]:
        """The arrays of all processes as one, the same on each; every process of the job calls it."""
        arrays = self.arrays
        axes: tuple[Axis, ...] = ("tensor", "pipeline", "data_context")
        for axis in axes:
            parts = {name: ranks.gather_over(array, axis) for name, array in arrays.items()}
            if len(parts["priority_KR"]) > 1:
                arrays = self._join(parts, same_tokens=axis != "data_context")
        return arrays

    def set(self, arrays: Mapping[str, torch.Tensor]) -> None:
        """Go on from joined arrays; of the activations only those of neurons held here are kept, as before joining."""
        self.reset()
        own = torch.zeros(len(self.neurons), dtype=torch.bool, device=self._device)
        for places, _ in self._own.values():
            own[places] = True
        for name, array in arrays.items():
            if name.startswith("top_"):
                self.arrays[name][own] = array.to(self._device)[own]
            elif name == "act_KRN":
                self.arrays[name] = torch.where(own, array.to(self._device), 0.0)
            else:
                self.arrays[name].copy_(array)

    def _join(self, parts: Mapping[str, Sequence[torch.Tensor]], same_tokens: bool) -> dict[str, torch.Tensor]:
        """Parts of processes that saw the same tokens and hold other neurons, or saw other tokens."""
        joined = {name: torch.full_like(part[0], self.layout()[name][2]) for name, part in parts.items()}
        for k in range(self._num_languages):
            priority = torch.cat([part[k] for part in parts["priority_KR"]])
            act = torch.cat([part[k] for part in parts["act_KRN"]])
            context = torch.cat([part[k] for part in parts["context_KRW"]])
            unique, group = torch.unique(priority, return_inverse=True)  # in ascending order
            count = min(len(unique), self._config.tokens_per_language)
            first = torch.full((len(unique),), len(priority), device=group.device, dtype=torch.int64)
            first.scatter_reduce_(0, group, torch.arange(len(priority), device=group.device), "amin")
            if same_tokens:
                # Each neuron is held by one process, and zero in the others.
                act = torch.zeros(len(unique), act.shape[1], device=act.device).index_add_(0, group, act)
            else:
                act = act[first]
            joined["priority_KR"][k, :count] = unique[:count]
            joined["act_KRN"][k, :count] = act[:count]
            joined["context_KRW"][k, :count] = context[first][:count]
        tops = {name: torch.cat(list(part), dim=1) for name, part in parts.items() if name.startswith("top_")}
        return joined | _best(tops, self._config.top)


def _best(arrays: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Of candidates along the second axis those with the largest activations; ties go to the lower priority."""
    order = torch.argsort(arrays["top_priority_NE"], dim=1, stable=True)
    by_act = torch.argsort(arrays["top_act_NE"].gather(1, order), dim=1, descending=True, stable=True)
    order = order.gather(1, by_act)[:, :count]
    return {
        name: array.gather(1, order if array.dim() == 2 else order[..., None].expand(-1, -1, array.shape[2]))
        for name, array in arrays.items()
    }


def _mixed(values: torch.Tensor) -> torch.Tensor:
    """Scramble 64-bit integers; the finaliser of MurmurHash3, with arithmetic shifts."""
    values = values.long()
    for factor in (-0x61C8864680B583EB, -0x3B314601E57A13AD):
        values = (values ^ (values >> 33)) * factor
    return values ^ (values >> 29)
