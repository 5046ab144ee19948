"""Running sums of neurons per language, kept on the device: what the stream of training batches leaves behind.

Sums are taken in float64 from the first addition on, so they do not depend on how batches were cut, beyond the last
digits of float64; counts are exact. One matrix product with a one-hot matrix sums all languages at once.
"""

# T tokens in the order of [S, B], S sequence, B micro-batch
# F ffn width of this rank, K languages, L layers of this rank

from __future__ import annotations

import torch

from megatron_xalign.batch import Batch
from megatron_xalign.capture.recorder import MicroBatch


def one_hot_by_language(language_ids_BS: torch.Tensor, num_languages: int) -> torch.Tensor:
    """Which token belongs to which language, tokens in the order of the model's [S, B] tensors.

    Returns:
        float64 [K, S * B] of zeros and ones; a token without a language (id -1) has a column of zeros.
    """
    ids_T = language_ids_BS.t().reshape(-1)
    languages_K = torch.arange(num_languages, device=ids_T.device, dtype=ids_T.dtype)
    return (ids_T[None, :] == languages_K[:, None]).double()


def block_tokens(width: int, device: torch.device) -> int:
    """How many tokens to work on at a time: what stays in a CPU's cache, or some hundred megabytes on a GPU."""
    return max(64, (1 << 18 if device.type == "cpu" else 1 << 24) // width)


def count_positive(one_hot: torch.Tensor, values_SBF: torch.Tensor) -> torch.Tensor:
    """Count per language how often each coordinate is above zero.

    Args:
        one_hot: float64 [K, T] as ``one_hot_by_language`` gives it.
        values_SBF: [S, B, F], any float dtype; may be a view of some columns of a wider tensor.

    Returns:
        int64 [K, F], exact.
    """
    values_TF = values_SBF.flatten(0, 1)
    # Zeros and ones add up exactly in float32 below 2^24 tokens, far above a block; so they do in TF32.
    one_hot = one_hot.float()
    count_KF = torch.zeros(len(one_hot), values_TF.shape[1], dtype=torch.int64, device=values_TF.device)
    step = block_tokens(values_TF.shape[1], values_TF.device)
    for start in range(0, len(values_TF), step):
        block = values_TF[start : start + step]
        positive = torch.gt(block, 0, out=torch.empty(block.shape, dtype=torch.float32, device=block.device))
        count_KF += (one_hot[:, start : start + step] @ positive).long()
    return count_KF


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
        self._one_hot = torch.empty(0)
        self._max_row_T1 = torch.empty(0)

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
        for total in (
            self.tokens_K, self.sum_KLF, self.sum_of_squares_KLF, self.positive_KLF, self.gate_positive_KLF,
            self.residual_sums_2KMH, self.attention_sums_2KLH,
        ):
            total.zero_()
        self._max_KLF.fill_(-torch.inf)
        self._batch = None

    def take_gates(self, row: int, gate_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Add one micro-batch's gates of one layer."""
        self._look_at(micro_batch.batch)
        self.gate_positive_KLF[:, row] += count_positive(self._one_hot, gate_SBF)

    def take_neurons(self, row: int, act_SBF: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Add one micro-batch's post-activations of one layer."""
        self._look_at(micro_batch.batch)
        if row == 0:
            self.tokens_K += self._one_hot.sum(1).long()
        self.positive_KLF[:, row] += count_positive(self._one_hot, act_SBF)
        act_TF = act_SBF.flatten(0, 1)
        max_KF = self._max_KLF[:, row]
        max_KF.scatter_reduce_(0, self._max_row_T1.expand(-1, act_TF.shape[1]), act_TF.float(), "amax")
        _add_moments(self._one_hot, act_TF, self.sum_KLF[:, row], self.sum_of_squares_KLF[:, row])

    def take_residual(self, row: int, hidden_SBH: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Add one micro-batch's residual stream of one row."""
        self._add_hidden(self.residual_sums_2KMH, row, hidden_SBH, micro_batch)

    def take_attention(self, row: int, output_SBH: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Add one micro-batch's attention output of one layer."""
        self._add_hidden(self.attention_sums_2KLH, row, output_SBH, micro_batch)

    def _add_hidden(self, sums_2KXH: torch.Tensor, row: int, values_SBH: torch.Tensor, micro_batch: MicroBatch) -> None:
        self._look_at(micro_batch.batch)
        batch_size = len(micro_batch.batch.language_ids)
        positions = micro_batch.positions
        one_hot = self._one_hot[:, positions.start * batch_size : positions.stop * batch_size]
        _add_moments(one_hot, values_SBH.flatten(0, 1), sums_2KXH[0, :, row], sums_2KXH[1, :, row])

    def _look_at(self, batch: Batch) -> None:
        if batch is self._batch:
            return
        self._batch = batch
        self._one_hot = one_hot_by_language(batch.language_ids, self._num_languages)
        ids_T = batch.language_ids.t().reshape(-1).long()
        self._max_row_T1 = torch.where(ids_T < 0, self._num_languages, ids_T)[:, None]


def _add_moments(
    one_hot: torch.Tensor, values_TX: torch.Tensor, sum_KX: torch.Tensor, sum_of_squares_KX: torch.Tensor
) -> None:
    """Add the values and their squares to sums per language, in float64, a block that fits a cache at a time."""
    step = block_tokens(values_TX.shape[1], values_TX.device)
    for start in range(0, len(values_TX), step):
        # A copy in any case: it is squared in place below, and the activation is the model's.
        block = values_TX[start : start + step].to(torch.float64, copy=True)
        of_block = one_hot[:, start : start + step]
        sum_KX += of_block @ block
        sum_of_squares_KX += of_block @ block.square_()
