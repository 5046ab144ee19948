"""Sampled tokens of chosen neurons with their text: ``samples/step-000100.safetensors`` of a run.

One file a step, written whole by one process. Its metadata hold a JSON ``header``; tokens are ids of the run's
tokenizer, -1 where a context reaches beyond its training sample.
"""

# K languages, R sampled tokens of a language, N chosen neurons, E top tokens of a neuron, W tokens of context

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.atomic import whole_file

FORMAT_VERSION = 1
_ARRAYS = {
    "priority_KR": "int64", "act_KRN": "float32", "context_KRW": "int64", "top_act_NE": "float32",
    "top_priority_NE": "int64", "top_language_NE": "int64", "top_context_NEW": "int64",
}
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Example:
    """One token and what a neuron did at it."""

    activation: float
    language: str
    before: tuple[int, ...]
    """Token ids before it in its training sample."""
    token: int
    after: tuple[int, ...]


@dataclass(frozen=True)
class NeuronSamples:
    """The samples of one window of training steps."""

    step: int
    languages: tuple[str, ...]
    neurons: tuple[tuple[int, int], ...]
    """(layer, neuron) of each of the N."""
    first_step: int
    """First optimizer step of the window."""
    seed: int
    arrays: Mapping[str, np.ndarray]

    def top(self, layer: int, neuron: int) -> list[Example]:
        """The tokens at which a neuron was largest, largest first."""
        place = self._place(layer, neuron)
        arrays = self.arrays
        return [
            self._example(float(act), int(language), context)
            for act, language, context in zip(
                arrays["top_act_NE"][place], arrays["top_language_NE"][place], arrays["top_context_NEW"][place],
                strict=True,
            )
            if language >= 0
        ]

    def sample(self, layer: int, neuron: int) -> list[Example]:
        """Tokens drawn without regard to activations, language by language."""
        place = self._place(layer, neuron)
        return [
            self._example(float(self.arrays["act_KRN"][k, row, place]), k, self.arrays["context_KRW"][k, row])
            for k, row in np.argwhere(self.arrays["priority_KR"] != _NEVER)
        ]

    def _place(self, layer: int, neuron: int) -> int:
        if (layer, neuron) not in self.neurons:
            raise ValueError(f"neuron {layer}:{neuron} was not sampled; sampled were {_listed(self.neurons)}.")
        return self.neurons.index((layer, neuron))

    def _example(self, activation: float, language: int, context_W: np.ndarray) -> Example:
        middle = len(context_W) // 2
        before, after = context_W[:middle], context_W[middle + 1 :]
        return Example(
            activation, self.languages[language], tuple(map(int, before[before >= 0])), int(context_W[middle]),
            tuple(map(int, after[after >= 0])),
        )


def samples_path(run_folder: str | Path, step: int) -> Path:
    """Where a run keeps the samples of a step."""
    return Path(run_folder) / "samples" / f"step-{step:06d}.safetensors"


def list_samples(run_folder: str | Path) -> list[tuple[int, Path]]:
    """Steps a run has samples of, in order, with their files."""
    found = []
    for path in (Path(run_folder) / "samples").glob("step-*.safetensors"):
        match = re.fullmatch(r"step-(\d+)\.safetensors", path.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found)


def write_samples(path: str | Path, samples: NeuronSamples) -> None:
    """Write one file; it appears whole or not at all."""
    from safetensors.numpy import save

    header = {
        "format_version": FORMAT_VERSION, "step": samples.step, "languages": list(samples.languages),
        "neurons": [list(neuron) for neuron in samples.neurons], "first_step": samples.first_step,
        "seed": samples.seed,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.ascontiguousarray(array) for name, array in samples.arrays.items()}
    with whole_file(path) as file:
        file.write(save(arrays, metadata={"header": json.dumps(header)}))


def read_samples(path: str | Path) -> NeuronSamples:
    """Read one file.

    Raises:
        FormatError: it is missing, damaged or of another version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path} does not exist.")
    try:
        with safe_open(path, framework="np") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {})["header"])
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        if header["format_version"] != FORMAT_VERSION:
            raise FormatError(f"{path} has format version {header['format_version']}; this is {FORMAT_VERSION}.")
        samples = NeuronSamples(
            step=header["step"], languages=tuple(header["languages"]),
            neurons=tuple((layer, neuron) for layer, neuron in header["neurons"]), first_step=header["first_step"],
            seed=header["seed"], arrays=arrays,
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path} is not a readable file of neuron samples: {error!r}.") from None
    counts = (len(samples.languages), len(samples.neurons))
    wrong = [name for name, dtype in _ARRAYS.items() if arrays[name].dtype != np.dtype(dtype)]
    if wrong or (len(arrays["act_KRN"]), len(arrays["top_act_NE"])) != counts:
        raise FormatError(f"{path} contradicts itself: its arrays do not fit its header.")
    return samples


def _listed(neurons: tuple[tuple[int, int], ...]) -> str:
    shown = ", ".join(f"{layer}:{neuron}" for layer, neuron in neurons[:20])
    return shown + (f" and {len(neurons) - 20} more" if len(neurons) > 20 else "")
