"""Neuron statistics of one step: what capture writes and analysis reads.

``neurons/step-000100/`` holds one safetensors shard per (tensor, pipeline) rank and ``index.json``, written last.
Each rank writes its own layers and its own slice of the neurons (and of the residual width); nothing is gathered.
The folder is written beside and renamed once every shard is there, so a folder under its final name is complete.
"""

# D documents (probe sentences), P pairs, K languages, L captured layers, F ffn width, H hidden width
# M = L + 1 residual rows: row 0 is the embedding output, the others the outputs of the captured layers, in order,
# before the final norm



from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.atomic import read_json, replace_folder, sha256_of, sync_folder, write_json

FORMAT_VERSION = 1
INDEX_NAME = "index.json"

ARRAYS: dict[str, tuple[str, str]] = {
    "probe_neuron_mean_DLF": ("DLF", "float32"),
    "probe_residual_mean_DMH": ("DMH", "float32"),
    "probe_tokens_D": ("D", "int64"),
    "probe_bytes_D": ("D", "int64"),
    "probe_nll_D": ("D", "float64"),
    "probe_tokens_K": ("K", "int64"),
    "probe_gate_positive_KLF": ("KLF", "int64"),
    "stream_tokens_K": ("K", "int64"),
    "stream_sum_KLF": ("KLF", "float64"),
    "stream_sum_of_squares_KLF": ("KLF", "float64"),
    "stream_max_KLF": ("KLF", "float32"),
    "stream_positive_KLF": ("KLF", "int64"),
    "stream_gate_positive_KLF": ("KLF", "int64"),
    "stream_residual_sum_KMH": ("KMH", "float64"),
    "stream_residual_sum_of_squares_KMH": ("KMH", "float64"),
    "stream_attention_sum_KLH": ("KLH", "float64"),
    "stream_attention_sum_of_squares_KLH": ("KLH", "float64"),
}
"""Name -> (axes, dtype) of every array a statistics folder can hold; those of a kind come all together."""

PROBE_ARRAYS = tuple(name for name in ARRAYS if name.startswith("probe_"))
RESIDUAL_ARRAYS = tuple(name for name in ARRAYS if name.startswith("stream_residual_"))
ATTENTION_ARRAYS = tuple(name for name in ARRAYS if name.startswith("stream_attention_"))
STREAM_ARRAYS = tuple(
    name for name in ARRAYS if name.startswith("stream_") and name not in RESIDUAL_ARRAYS + ATTENTION_ARRAYS
)


@dataclass(frozen=True, kw_only=True)
class StatsIndex:
    """What a statistics folder is about; everything but the shard list of ``index.json``."""

    run_name: str
    """Name of the run."""
    step: int
    """Finished optimizer steps of the weights the probe saw."""
    consumed_tokens: int
    """Tokens trained on by then."""
    languages: tuple[str, ...]
    """Codes of the K languages."""
    num_layers: int
    """Layers of the model."""
    ffn_hidden_size: int
    hidden_size: int
    layers: tuple[int, ...] | None = None
    """Captured layers, in order; None: all."""
    document_ids: tuple[str, ...] = ()
    """One per probe sentence (D); empty if there was no probe."""
    document_languages: tuple[str, ...] = ()
    """Language code of every probe sentence."""
    document_pairs: tuple[str, ...] = ()
    """Pair id of every probe sentence; sentences of one id are translations of one another."""
    probe_sha256: str = ""
    """Identity of the probe: texts and tokens in their order."""
    pooling: str = ""
    """How tokens became one vector per sentence."""
    counted_tokens: str = ""
    """Which tokens count."""
    stream_first_step: int | None = None
    """First optimizer step of the stream sums; None if there are none."""
    stream_last_step: int | None = None
    """Last optimizer step of the stream sums."""
    stream_interval_steps: int | None = None
    """Sums were taken at every n-th step of that window."""
    stream_left_out_steps: tuple[int, ...] = ()
    """Steps of that window whose update the run passed over (a loss that was no number); they are not in the sums."""
    stream_residual: bool = False
    """Whether the stream has sums of the residual stream too."""
    stream_attention: bool = False
    """Whether it has sums of the attention output."""

    def __post_init__(self) -> None:
        documents = len(self.document_ids)
        if len(self.document_languages) != documents or len(self.document_pairs) != documents:
            raise ValueError(
                f"{documents} document ids, {len(self.document_languages)} languages and {len(self.document_pairs)} "
                "pair ids; one of each per probe sentence is needed."
            )
        unknown = sorted(set(self.document_languages) - set(self.languages))
        if unknown:
            raise ValueError(f"probe sentences are in {unknown}, which are not among the languages {self.languages}.")
        if self.layers is not None and (
            list(self.layers) != sorted(set(self.layers)) or not set(self.layers) <= set(range(self.num_layers))
        ):
            raise ValueError(f"layers {self.layers} are not in order, or not among the {self.num_layers} of the model.")
        keys = list(zip(self.document_pairs, self.document_languages, strict=True))
        if len(set(keys)) != len(keys):
            double = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"probe pair {double[0]!r} has two sentences in {double[1]}.")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank's part of the statistics, axes as in ``ARRAYS`` but with L, F, M and H cut down to what it holds."""

    tensor_rank: int
    pipeline_rank: int
    layers: tuple[int, ...]
    """Global layers along the L axis, in order."""
    neurons: tuple[int, int]
    """First and one past the last neuron along the F axis."""
    residual_rows: tuple[int, ...]
    """Residual rows along the M axis, in order."""
    residual_columns: tuple[int, int]
    """First and one past the last hidden coordinate along the H axis."""
    arrays: Mapping[str, np.ndarray]
    """Arrays by name. Those without an L or M axis are held by exactly one shard."""

    @property
    def file_name(self) -> str:
        """Name of the shard's file."""
        return self.name_of(self.tensor_rank, self.pipeline_rank)

    @staticmethod
    def name_of(tensor_rank: int, pipeline_rank: int) -> str:
        """Name of the file of a rank's shard."""
        return f"shard-tp{tensor_rank}-pp{pipeline_rank}.safetensors"


@dataclass(frozen=True)
class ShardEntry:
    """A written shard as ``index.json`` lists it."""

    file: str
    size_bytes: int
    sha256: str


def stats_folder(run_folder: str | Path, step: int) -> Path:
    """Where a run keeps the statistics of a step."""
    return Path(run_folder) / "neurons" / f"step-{step:06d}"


def _partial_folder(folder: Path) -> Path:
    # Named without a process id: every rank writes into the same one.
    return folder.with_name(f".{folder.name}.partial")


def begin_neuron_stats(folder: str | Path) -> None:
    """Make an empty place for the shards; one process calls it, and the others wait until it has."""
    partial = _partial_folder(Path(folder))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def write_shard(folder: str | Path, shard: Shard) -> ShardEntry:
    """Write one rank's shard; the folder does not show under its name yet.

    Returns:
        what ``finish_neuron_stats`` wants to know of it.

    Raises:
        ValueError: an array's name, dtype or shape is not what the format says.
    """
    from safetensors.numpy import save_file

    for name, array in shard.arrays.items():
        if name not in ARRAYS:
            raise ValueError(f"{name!r} is not an array of the neuron statistics format.")
        axes, dtype = ARRAYS[name]
        if array.dtype != np.dtype(dtype) or array.ndim != len(axes):
            raise ValueError(f"{name} is {array.dtype} of shape {array.shape}; {dtype} with axes {axes} is needed.")
        for axis, have in zip(axes, array.shape, strict=True):
            want = _local_size(shard, axis)
            if want is not None and have != want:
                raise ValueError(f"{name} has {have} entries along {axis}; the shard says it holds {want}.")
    header = {
        "format_version": FORMAT_VERSION,
        "tensor_rank": shard.tensor_rank,
        "pipeline_rank": shard.pipeline_rank,
        "layers": list(shard.layers),
        "neurons": list(shard.neurons),
        "residual_rows": list(shard.residual_rows),
        "residual_columns": list(shard.residual_columns),
    }
    path = _partial_folder(Path(folder)) / shard.file_name
    save_file(
        {name: np.ascontiguousarray(array) for name, array in shard.arrays.items()},
        path,
        metadata={"header": json.dumps(header)},
    )
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return ShardEntry(shard.file_name, path.stat().st_size, sha256_of(path))


def _local_size(shard: Shard, axis: str) -> int | None:
    sizes = {
        "L": len(shard.layers),
        "F": shard.neurons[1] - shard.neurons[0],
        "M": len(shard.residual_rows),
        "H": shard.residual_columns[1] - shard.residual_columns[0],
    }
    return sizes.get(axis)


def finish_neuron_stats(folder: str | Path, index: StatsIndex, entries: Sequence[ShardEntry]) -> Path:
    """Write the index and give the folder its name; one process calls it once every shard is written.

    Raises:
        FormatError: a shard another rank wrote is not to be seen from here (the run folder is on a local disk), or
            the shards together do not hold every layer and neuron once.
    """
    folder = Path(folder)
    partial = _partial_folder(folder)
    for entry in entries:
        path = partial / entry.file
        if not path.exists() or path.stat().st_size != entry.size_bytes:
            raise FormatError(
                f"{path}, written by another process, cannot be seen whole from this one; the run folder must be on a "
                "disk that all processes share."
            )
    content = {
        "format": "megatron_xalign neuron statistics",
        "format_version": FORMAT_VERSION,
        **dataclasses.asdict(index),
        "shards": [dataclasses.asdict(entry) for entry in sorted(entries, key=lambda entry: entry.file)],
    }
    write_json(partial / INDEX_NAME, content)
    _open(partial, index, entries)
    sync_folder(partial)
    replace_folder(partial, folder)
    return folder


def list_neuron_stats(run_folder: str | Path) -> list[tuple[int, Path]]:
    """Steps a run has complete statistics of, in order, with their folders; an empty list if there are none."""
    found = []
    neurons = Path(run_folder) / "neurons"
    for path in neurons.iterdir() if neurons.is_dir() else ():
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / INDEX_NAME).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def read_neuron_stats(folder: str | Path, verify: bool = True) -> NeuronStats:
    """Open the statistics of one step; arrays are joined over shards when first asked for.

    Args:
        folder: ``neurons/step-NNNNNN``.
        verify: whether to check every shard's SHA-256; sizes, headers and completeness are always checked.

    Raises:
        FormatError: the folder is incomplete, of another version, or a shard is missing, truncated or changed; the
            message names the file.
    """
    folder = Path(folder)
    path = folder / INDEX_NAME
    content = read_json(path)
    try:
        if content["format_version"] != FORMAT_VERSION:
            raise FormatError(
                f"{path} has format version {content['format_version']}; this version of xalign reads {FORMAT_VERSION}."
            )
        values = {
            item.name: content[item.name]
            for item in dataclasses.fields(StatsIndex)
            if item.name in content or item.default is dataclasses.MISSING
        }
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        index = StatsIndex(**values)
        entries = [ShardEntry(**entry) for entry in content["shards"]]
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is not an index of neuron statistics ({error!r}).") from None
    for entry in entries:
        shard = folder / entry.file
        if not shard.is_file():
            raise FormatError(f"{shard}, listed in {INDEX_NAME}, does not exist.")
        if shard.stat().st_size != entry.size_bytes:
            raise FormatError(f"{shard} is {shard.stat().st_size} bytes long; {INDEX_NAME} says {entry.size_bytes}.")
        if verify and sha256_of(shard) != entry.sha256:
            raise FormatError(f"{shard} is not the file that was written: its SHA-256 differs from {INDEX_NAME}.")
    return _open(folder, index, entries)


@dataclass(frozen=True)
class _Part:
    """Where a shard's file lies and which part of the whole it holds."""

    path: Path
    names: frozenset[str]
    axes: Mapping[str, tuple[int, ...]]
    """Places along L, F, M and H of the whole arrays."""


def _open(folder: Path, index: StatsIndex, entries: Sequence[ShardEntry]) -> NeuronStats:
    parts = []
    for entry in entries:
        path = folder / entry.file
        with _safe_open(path) as file:
            try:
                header = json.loads((file.metadata() or {})["header"])
                # Places along the axes of the whole arrays; captured layers need not be all.
                layers = {layer: place for place, layer in enumerate(_captured(index))}
                axes = {
                    "L": tuple(layers[layer] for layer in header["layers"]),
                    "F": tuple(range(*header["neurons"])),
                    "M": tuple(0 if row == 0 else layers[row - 1] + 1 for row in header["residual_rows"]),
                    "H": tuple(range(*header["residual_columns"])),
                }
            except (KeyError, TypeError, ValueError) as error:
                raise FormatError(f"{path} has no readable header ({error!r}).") from None
            names = frozenset(file.keys())
            parts.append(_Part(path, names, axes))
    stats = NeuronStats(folder, index, parts)
    _check_complete(stats)
    return stats


def _captured(index: StatsIndex) -> tuple[int, ...]:
    return tuple(range(index.num_layers)) if index.layers is None else index.layers


def _safe_open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="np")
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} is not a readable safetensors file: {error}.") from None


def _check_complete(stats: NeuronStats) -> None:
    """Every array there should be must be covered exactly once by the shards."""
    expected: tuple[str, ...] = ()
    if stats.has_probe:
        expected += PROBE_ARRAYS
    if stats.has_stream:
        expected += STREAM_ARRAYS
        expected += RESIDUAL_ARRAYS if stats.index.stream_residual else ()
        expected += ATTENTION_ARRAYS if stats.index.stream_attention else ()
    for name in expected:
        axes = ARRAYS[name][0]
        split = [axis for axis in axes if axis in "LFMH"]
        parts = [part for part in stats.parts if name in part.names]
        if not split:
            if len(parts) != 1:
                raise FormatError(f"{stats.folder}: {name} is held by {len(parts)} shards; exactly one should hold it.")
            continue
        count = np.zeros([stats.size(axis) for axis in split], dtype=np.int16)
        for part in parts:
            try:
                count[np.ix_(*(np.array(part.axes[axis], np.int64) for axis in split))] += 1
            except IndexError:
                raise FormatError(
                    f"{part.path} holds {name} outside the {'x'.join(map(str, count.shape))} the index tells of."
                ) from None
        if (count != 1).any():
            row, column = map(int, np.argwhere(count != 1)[0])
            if split[0] == "L":
                what = f"layer {stats.layers[row]}, {'neuron' if split[1] == 'F' else 'coordinate'} {column}"
            else:
                what = f"residual row {row}, coordinate {column}"
            how = "no shard" if count[row, column] == 0 else f"{count[row, column]} shards"
            raise FormatError(f"{stats.folder}: {name} of {what} is in {how}; exactly one should hold it.")


class NeuronStats:
    """Statistics of one step, joined over shards; arrays are read when first used and then kept."""

    probe_neuron_mean_DLF: np.ndarray
    """float32 [D, L, F]: mean post-activation over a sentence's counted tokens."""
    probe_residual_mean_DMH: np.ndarray
    """float32 [D, L + 1, H]: mean residual stream; row 0 the embedding output, l + 1 the output of layer l."""
    probe_tokens_D: np.ndarray
    """int64 [D]: counted tokens."""
    probe_bytes_D: np.ndarray
    """int64 [D]: UTF-8 bytes of the sentence."""
    probe_nll_D: np.ndarray
    """float64 [D]: sum of nats over the sentence's tokens."""
    probe_tokens_K: np.ndarray
    """int64 [K]: counted probe tokens per language."""
    probe_gate_positive_KLF: np.ndarray
    """int64 [K, L, F]: probe tokens at which the gate (before SiLU) is above zero."""
    stream_tokens_K: np.ndarray
    """int64 [K]: counted training tokens per language."""
    stream_sum_KLF: np.ndarray
    """float64 [K, L, F]: sum of the post-activation."""
    stream_sum_of_squares_KLF: np.ndarray
    """float64 [K, L, F]: sum of its squares."""
    stream_max_KLF: np.ndarray
    """float32 [K, L, F]: its maximum; minus infinity where a language had no token."""
    stream_positive_KLF: np.ndarray
    """int64 [K, L, F]: tokens at which it is above zero."""
    stream_gate_positive_KLF: np.ndarray
    """int64 [K, L, F]: tokens at which the gate (before SiLU) is above zero; what LAPE counts."""
    stream_residual_sum_KMH: np.ndarray
    """float64 [K, M, H]: sum of the residual stream, where asked for."""
    stream_residual_sum_of_squares_KMH: np.ndarray
    """float64 [K, M, H]: sum of its squares."""
    stream_attention_sum_KLH: np.ndarray
    """float64 [K, L, H]: sum of what attention adds to the residual stream, where asked for."""
    stream_attention_sum_of_squares_KLH: np.ndarray
    """float64 [K, L, H]: sum of its squares."""

    def __init__(self, folder: Path, index: StatsIndex, parts: Sequence[_Part]) -> None:
        self.folder = folder
        self.index = index
        self.parts = tuple(parts)
        self._kept: dict[str, np.ndarray] = {}
        languages = set(index.languages) & set(index.document_languages)
        by_pair: dict[str, dict[str, int]] = {}
        for row, (pair, language) in enumerate(zip(index.document_pairs, index.document_languages, strict=True)):
            by_pair.setdefault(pair, {})[language] = row
        self._complete_pairs = {pair: rows for pair, rows in by_pair.items() if set(rows) == languages}

    def __getattr__(self, name: str) -> np.ndarray:
        if name not in ARRAYS:
            raise AttributeError(f"NeuronStats has no attribute {name!r}")
        if name not in self._kept:
            self._kept[name] = self._read(name, None)
        return self._kept[name]

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.index.step

    @property
    def consumed_tokens(self) -> int:
        """Tokens trained on by then."""
        return self.index.consumed_tokens

    @property
    def run_name(self) -> str:
        """Name of the run."""
        return self.index.run_name

    @property
    def languages(self) -> list[str]:
        """Codes of the K languages."""
        return list(self.index.languages)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.index.num_layers

    @property
    def layers(self) -> list[int]:
        """The captured layers, in the order of the L axis; all of the model unless others were asked for."""
        return list(_captured(self.index))

    @property
    def ffn_hidden_size(self) -> int:
        """F."""
        return self.index.ffn_hidden_size

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.index.hidden_size

    @property
    def document_ids(self) -> list[str]:
        """Ids of the D probe sentences."""
        return list(self.index.document_ids)

    @property
    def document_languages(self) -> list[str]:
        """Language codes of the D probe sentences."""
        return list(self.index.document_languages)

    @property
    def document_language_ids(self) -> np.ndarray:
        """int64 [D]: languages of the probe sentences as indices into ``languages``."""
        return np.array([self.index.languages.index(code) for code in self.index.document_languages], dtype=np.int64)

    @property
    def pair_ids(self) -> list[str]:
        """Ids of the P pairs that have a sentence in every probed language, in the order of the probe."""
        return list(self._complete_pairs)

    @property
    def has_probe(self) -> bool:
        """Whether there was a probe."""
        return bool(self.index.document_ids)

    @property
    def has_stream(self) -> bool:
        """Whether there are sums from training batches (there are none at step 0)."""
        return self.index.stream_last_step is not None

    def size(self, axis: str) -> int:
        """Length of an axis of the whole arrays: one of D, K, L, F, M, H."""
        index = self.index
        return {
            "D": len(index.document_ids),
            "K": len(index.languages),
            "L": len(self.layers),
            "F": index.ffn_hidden_size,
            "M": len(self.layers) + 1,
            "H": index.hidden_size,
        }[axis]

    def rows(self, language: str) -> np.ndarray:
        """int64 [P]: rows along D of one language's sentences, in the order of ``pair_ids``.

        Raises:
            ValueError: the probe has no sentence in that language.
        """
        if language not in self.index.document_languages:
            raise ValueError(f"{language!r} is not probed; probed are {sorted(set(self.index.document_languages))}.")
        return np.array([rows[language] for rows in self._complete_pairs.values()], dtype=np.int64)

    def probe_neurons(self, language: str) -> np.ndarray:
        """float32 [P, L, F]: mean post-activations of one language's sentences, aligned over languages by pair."""
        return self.probe_neuron_mean_DLF[self.rows(language)]

    def probe_residual(self, language: str) -> np.ndarray:
        """float32 [P, L + 1, H]: mean residual stream of one language's sentences, aligned over languages by pair."""
        return self.probe_residual_mean_DMH[self.rows(language)]

    def layer(self, name: str, layer: int) -> np.ndarray:
        """One layer of an array, read without the others; for the residual stream -1 is the embedding output.

        Returns:
            the array without its L (or M) axis, such as [D, F].

        Raises:
            ValueError: the array has no layers, or not that one.
        """
        axes = ARRAYS[name][0]
        known = [-1, *self.layers] if "M" in axes else self.layers if "L" in axes else []
        if layer not in known:
            raise ValueError(
                f"{name} has no layer {layer}; the model has {self.num_layers} layers, of which "
                f"{len(self.layers)} were captured."
            )
        position = known.index(layer)
        if name in self._kept:
            return np.take(self._kept[name], position, axis=1)
        return self._read(name, position)

    def _read(self, name: str, position: int | None) -> np.ndarray:
        """Join an array over the shards, whole or at one position of its second axis."""
        axes, dtype = ARRAYS[name]
        for names, there, kind in (
            (PROBE_ARRAYS, self.has_probe, "a probe"),
            (STREAM_ARRAYS, self.has_stream, "sums from training batches"),
            (RESIDUAL_ARRAYS, self.has_stream and self.index.stream_residual, "sums of the residual stream"),
            (ATTENTION_ARRAYS, self.has_stream and self.index.stream_attention, "sums of the attention output"),
        ):
            if name not in names or there:
                continue
            raise FormatError(f"{self.folder} was written without {kind}; {name} is not in it.")
        kept_axes = axes if position is None else axes[0] + axes[2:]
        whole = np.empty([self.size(axis) for axis in kept_axes], dtype=dtype)
        for part in self.parts:
            if name not in part.names or (position is not None and position not in part.axes[axes[1]]):
                continue
            with _safe_open(part.path) as file:
                if position is None:
                    block = file.get_tensor(name)
                else:
                    block = file.get_slice(name)[:, part.axes[axes[1]].index(position)]
            where = tuple(
                np.array(part.axes.get(axis, tuple(range(self.size(axis)))), np.int64) for axis in kept_axes
            )
            if block.dtype != whole.dtype or block.shape != tuple(map(len, where)):
                raise FormatError(
                    f"{part.path} holds {name} as {block.dtype} {block.shape}; {dtype} {tuple(map(len, where))} "
                    "is expected."
                )
            whole[np.ix_(*where)] = block
        return whole
