"""Running sums of neurons per language, kept on the device: what the stream of training batches leaves behind.

Sums are taken in float64 from the first addition on, so they do not depend on how batches were cut, beyond the last
digits of float64; counts are exact. On a CPU one pass of C++ over a layer's activations takes all of them. Elsewhere,
and for types that it does not know, a matrix product with a one-hot matrix sums all languages at once.
"""

# T tokens in the order of [S, B], S sequence, B micro-batch
# F ffn width of this rank, K languages, L layers of this rank

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from megatron_xalign import _native
from megatron_xalign.batch import Batch
from megatron_xalign.capture.recorder import MicroBatch


class TokenGroups:
    """Which tokens are summed together: those of a language, or of a sentence.

    Args:
        group_ids_BS: integers [B, S], counting from 0; a token with -1 belongs to no group.
        num_groups: K.
    """

    def __init__(self, group_ids_BS: torch.Tensor, num_groups: int) -> None:
        self.num_groups = num_groups
        self.ids_T = group_ids_BS.t().reshape(-1)
        """Group of each token, in the order of the model's [S, B] tensors."""

    @cached_property
    def one_hot_KT(self) -> torch.Tensor:
        """float64 [K, T] of zeros and ones; a token without a group has a column of zeros."""
        groups_K = torch.arange(self.num_groups, device=self.ids_T.device, dtype=self.ids_T.dtype)
        return (self.ids_T[None, :] == groups_K[:, None]).double()

    @cached_property
    def tokens_K(self) -> torch.Tensor:
        """int64 [K]: tokens of each group."""
        return torch.bincount(self.ids_T[self.ids_T >= 0], minlength=self.num_groups)

    @cached_property
    def rows_T1(self) -> torch.Tensor:
        """int64 [T, 1]: group of each token, those without one in a row behind all groups."""
        ids_T = self.ids_T.long()
        return torch.where(ids_T < 0, self.num_groups, ids_T)[:, None]

    @cached_property
    def for_native(self) -> np.ndarray:
        """int32 [T], as the C++ pass takes them."""
        return self.ids_T.int().numpy()


def for_native(values_TX: torch.Tensor) -> np.ndarray | None:
    """The same memory as the C++ pass takes it, bfloat16 as its bits; None where it takes it not."""
    if values_TX.device.type != "cpu" or (values_TX.shape[1] > 1 and values_TX.stride(1) != 1):
        return None
    if values_TX.dtype == torch.float32:
        return values_TX.numpy()
    if values_TX.dtype == torch.bfloat16:
        return values_TX.view(torch.int16).numpy().view(np.uint16)
    return None


def block_tokens(width: int, device: torch.device) -> int:
    """How many tokens to work on at a time: what stays in a CPU's cache, or some hundred megabytes on a GPU."""
    return max(64, (1 << 18 if device.type == "cpu" else 1 << 24) // width)


def count_positive(groups: TokenGroups, values_SBF: torch.Tensor, count_KF: torch.Tensor) -> None:
    """Add to counts how often each coordinate is above zero in each group; exact.

    Args:
        groups: of the tokens.
        values_SBF: [S, B, F], any float dtype; may be a view of some columns of a wider tensor.
        count_KF: int64 [K, F], added to.
    """
    values_TF = values_SBF.flatten(0, 1)
    native = for_native(values_TF)
    if native is not None:
        _native.add_to_groups(native, groups.for_native, groups.num_groups, positive=count_KF.numpy())
        return
    # Zeros and ones add up exactly in float32 below 2^24 tokens, far above a block; so they do in TF32.
    one_hot_KT = groups.one_hot_KT.float()
    step = block_tokens(values_TF.shape[1], values_TF.device)
    for start in range(0, len(values_TF), step):
        block = values_TF[start : start + step]
        positive = torch.gt(block, 0, out=torch.empty(block.shape, dtype=torch.float32, device=block.device))
        count_KF += (one_hot_KT[:, start : start + step] @ positive).long()


class StreamSums:
    """Sums over training tokens per language, layer and neuron of this process; a ``recorder.Listener``.

    Args:
        num_languages: K.
        num_layers: L, layers listened to.
        width: F.
        device: where the sums are kept.
        hidden_size: H, needed for the two below.
        num_residual_rows: M; 0 leaves the residual stream out.
        attention: whether the attention output is summed too.
    """

    def __init__(
        self,
        num_languages: int,
        num_layers: int,
        width: int,
        device: torch.device,
        hidden_size: int = 0,
        num_residual_rows: int = 0,
        attention: bool = False,
    ) -> None:
        shape = (num_languages, num_layers, width)
        self.tokens_K = torch.zeros(num_languages, dtype=torch.int64, device=device)
        """int64 [K]: counted tokens, which are those with a language."""
        self.sum_KLF = torch.zeros(shape, dtype=torch.float64, device=device)
        """float64 [K, L, F]: sum of the post-activation."""
        self.sum_of_squares_KLF = torch.zeros(shape, dtype=torch.float64, device=device)
        """float64 [K, L, F]: sum of its squares."""
        # One row more than there are languages takes the tokens without one.
        self._max_KLF = torch.full((num_languages + 1, *shape[1:]), -torch.inf, device=device)
        self.positive_KLF = torch.zeros(shape, dtype=torch.int64, device=device)
        """int64 [K, L, F]: tokens at which it is above zero."""
        self.gate_positive_KLF = torch.zeros(shape, dtype=torch.int64, device=device)
        """int64 [K, L, F]: tokens at which the gate is above zero."""
        self.residual_sums_2KMH = torch.zeros(
            2, num_languages, num_residual_rows, hidden_size, dtype=torch.float64, device=device
        )
        """float64 [2, K, M, H]: sum of the residual stream and of its squares, over the tokens this process sees."""
        self.attention_sums_2KLH = torch.zeros(
            2, num_languages, num_layers if attention else 0, hidden_size, dtype=torch.float64, device=device
        )
        """float64 [2, K, L, H]: the same of the attention output."""
        self.wants_residual = num_residual_rows > 0
        self.wants_attention = attention
        self._num_languages = num_languages
        self._batch: Batch | None = None
        self._groups: dict[tuple[int, int], TokenGroups] = {}

    @property
    def max_KLF(self) -> torch.Tensor:
        """float32 [K, L, F]: largest post-activation; minus infinity where a language had no token."""
        return self._max_KLF[: self._num_languages]

    @property
    def num_bytes(self) -> int:
        """Memory that the sums take; it does not grow with the number of tokens."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))

    def reset(self) -> None:
        """Begin again at zero."""
        for total in self._totals():
            total.zero_()
        self._max_KLF.fill_(-torch.inf)
        self._batch = None

    def copy(self) -> list[torch.Tensor]:
        """All sums as they are now, for ``put_back``."""
        return [total.clone() for total in self._totals()]

    def put_back(self, before: list[torch.Tensor]) -> None:
        """Forget what came after ``copy``."""
        for total, was in zip(self._totals(), before, strict=True):
            total.copy_(was)

    def _totals(self) -> tuple[torch.Tensor, ...]:
        return (
            self.tokens_K, self.sum_KLF, self.sum_of_squares_KLF, self._max_KLF, self.positive_KLF,
            self.gate_positive_KLF, self.residual_sums_2KMH, self.attention_sums_2KLH,
        )

    def take_gates(self, row: int, gate_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Add one micro-batch's gates of one layer."""
        count_positive(self._look_at(micro_batch), gate_SBF, self.gate_positive_KLF[:, row])

    def take_neurons(self, row: int, act_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Add one micro-batch's post-activations of one layer."""
        groups = self._look_at(micro_batch)
        if row == 0:
            self.tokens_K += groups.tokens_K
        act_TF = act_SBF.flatten(0, 1)
        native = for_native(act_TF)
        if native is not None:
            _native.add_to_groups(
                native, groups.for_native, groups.num_groups, sum=self.sum_KLF[:, row].numpy(),
                sum_of_squares=self.sum_of_squares_KLF[:, row].numpy(), max=self.max_KLF[:, row].numpy(),
                positive=self.positive_KLF[:, row].numpy(),
            )
            return
        count_positive(groups, act_SBF, self.positive_KLF[:, row])
        self._max_KLF[:, row].scatter_reduce_(0, groups.rows_T1.expand(-1, act_TF.shape[1]), act_TF.float(), "amax")
        _add_moments(groups, act_SBF, self.sum_KLF[:, row], self.sum_of_squares_KLF[:, row])

    def take_residual(self, row: int, hidden_SBH: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Add one micro-batch's residual stream of one row."""
        self._add_hidden(self.residual_sums_2KMH, row, hidden_SBH, micro_batch)

    def take_attention(self, row: int, output_SBH: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Add one micro-batch's attention output of one layer."""
        self._add_hidden(self.attention_sums_2KLH, row, output_SBH, micro_batch)

    def _add_hidden(self, sums_2KXH: torch.Tensor, row: int, values_SBH: torch.Tensor, micro_batch: MicroBatch) -> None:
        groups = self._look_at(micro_batch)
        _add_moments(groups, values_SBH, sums_2KXH[0, :, row], sums_2KXH[1, :, row])

    def _look_at(self, micro_batch: MicroBatch) -> TokenGroups:
        """Languages of the tokens that the tensor covers, worked out once for all layers."""
        batch, positions = micro_batch.batch, micro_batch.positions
        if batch is not self._batch:
            self._batch, self._groups = batch, {}
        key = (positions.start, positions.stop)
        if key not in self._groups:
            self._groups[key] = TokenGroups(batch.language_ids[:, positions], self._num_languages)
        return self._groups[key]


def _add_moments(
    groups: TokenGroups, values_SBX: torch.Tensor, sum_KX: torch.Tensor, sum_of_squares_KX: torch.Tensor
) -> None:
    """Add the values of each group's tokens, and their squares, to sums [K, X] in float64."""
    values_TX = values_SBX.flatten(0, 1)
    native = for_native(values_TX)
    if native is not None:
        _native.add_to_groups(
            native, groups.for_native, groups.num_groups, sum=sum_KX.numpy(), sum_of_squares=sum_of_squares_KX.numpy()
        )
        return
    step = block_tokens(values_TX.shape[1], values_TX.device)
    for start in range(0, len(values_TX), step):
        # A copy in any case: it is squared in place below, and the activation is the model's.
        block = values_TX[start : start + step].to(torch.float64, copy=True)
        # What is no finite number enters the sums of all groups here, as zero times it is no number either.
        of_block = groups.one_hot_KT[:, start : start + step]
        sum_KX += of_block @ block
        sum_of_squares_KX += of_block @ block.square_()
