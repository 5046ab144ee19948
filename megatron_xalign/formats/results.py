"""The measures of one run: what analysis writes and the report reads.

``results.json`` holds the context (languages, sizes, chance levels) and the rows; ``results.csv`` the same rows for a
spreadsheet; ``arrays.safetensors`` what is too big for text (projections, scores of every neuron). The JSON is written
last and names the SHA-256 of the arrays, so a folder that was cut off half way does not read as a finished one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.atomic import read_json, sha256_of, whole_file, write_text

FORMAT = "megatron_xalign results"
VERSION = 1
JSON_NAME = "results.json"
CSV_NAME = "results.csv"
ARRAYS_NAME = "arrays.safetensors"


@dataclass(frozen=True)
class Row:
    """One number: a measure of one subject at one layer of one checkpoint."""

    step: int
    """Finished optimizer steps."""
    consumed_tokens: int
    """Tokens the model was trained on by then."""
    measure: str
    """Name of the measure, such as ``retrieval`` (docs/analysis.md lists them)."""
    layer: int | None
    """0-based layer, -1 for the embedding output, None for a number of the whole model."""
    subject: str
    """A language code, a pair ``eng_Latn-fin_Latn``, or "" where it is about all languages."""
    value: float
    """The number."""
    low: float | None = None
    """Lower end of the 95 % bootstrap interval over sentences, if there is one."""
    high: float | None = None
    """Upper end of it."""

    @property
    def place(self) -> str:
        """The row in words, for messages."""
        where = "whole model" if self.layer is None else f"layer {self.layer}"
        return f"step {self.step}, {where}, {self.measure}" + (f" of {self.subject}" if self.subject else "")


@dataclass(frozen=True)
class Results:
    """Context, rows and arrays of one run."""

    context: dict[str, Any]
    """What the numbers are about: run, languages, sizes, number of sentences, chance levels. JSON-able."""
    rows: list[Row]
    """Every number, ordered by step."""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    """Named arrays (docs/architecture.md)."""

    def select(
        self,
        measure: str | EllipsisType = ...,
        layer: int | EllipsisType | None = ...,
        subject: str | EllipsisType = ...,
        step: int | EllipsisType = ...,
    ) -> list[Row]:
        """Rows that have all the given properties, in order; what is left out may be anything.

        ``layer=None`` asks for numbers of the whole model; leaving ``layer`` out asks for all layers.
        """
        return [
            row
            for row in self.rows
            if (measure is ... or row.measure == measure)
            and (layer is ... or row.layer == layer)
            and (subject is ... or row.subject == subject)
            and (step is ... or row.step == step)
        ]

    @property
    def steps(self) -> list[int]:
        """Steps that have rows, ascending."""
        return sorted({row.step for row in self.rows})


def write_results(folder: str | Path, results: Results) -> None:
    """Write the three files; each appears whole, the JSON last.

    Raises:
        ValueError: a number is NaN or infinite, an interval is upside down or has one end, a row is there twice, or
            the context is not JSON-able; the message names step, layer and measure.
    """
    _check(results.rows)
    for name, array in results.arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"array {name} holds {np.count_nonzero(~np.isfinite(array))} values that are not finite.")
    folder = Path(folder)
    packed = save({name: np.ascontiguousarray(array) for name, array in results.arrays.items()})
    rows = [_plain(row) for row in results.rows]
    head = json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "arrays_sha256": hashlib.sha256(packed).hexdigest(),
            "context": results.context,
        },
        ensure_ascii=False, indent=2, allow_nan=False,
    )
    # One row a line: a third of the size of indented JSON, and two versions can be compared by diff.
    lines = ",\n".join("    " + json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    text = head.removesuffix("\n}") + ',\n  "rows": [\n' + lines + ("\n" if lines else "") + "  ]\n}\n"

    with whole_file(folder / ARRAYS_NAME) as file:
        file.write(packed)
    write_text(folder / CSV_NAME, _csv(rows))
    write_text(folder / JSON_NAME, text)


def read_results(folder: str | Path) -> Results:
    """Read what ``write_results`` wrote.

    Raises:
        FormatError: a file is missing, truncated, of another version, or the arrays are not those of the rows.
    """
    folder = Path(folder)
    path = folder / JSON_NAME
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FormatError(f"{path} is not a results file of megatron_xalign; write it with `xalign analyze`.")
    if content.get("version") != VERSION:
        raise FormatError(
            f"{path} is of version {content.get('version')}; this program reads version {VERSION}. "
            "Run `xalign analyze` again."
        )
    context, raw_rows = content.get("context"), content.get("rows")
    if not isinstance(context, dict) or not isinstance(raw_rows, list):
        raise FormatError(f"{path} has no context or no rows; run `xalign analyze` again.")
    names = {item.name for item in fields(Row)}
    rows = []
    for number, raw in enumerate(raw_rows):
        if not isinstance(raw, dict) or set(raw) != names:
            raise FormatError(f"{path}: row {number} should have the fields {', '.join(sorted(names))}.")
        rows.append(Row(**raw))
    return Results(context, rows, _read_arrays(folder / ARRAYS_NAME, content.get("arrays_sha256")))


def _read_arrays(path: Path, expected_sha256: object) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FormatError(f"{path} does not exist, though {JSON_NAME} beside it does; run `xalign analyze` again.")
    if sha256_of(path) != expected_sha256:
        raise FormatError(f"{path} is not the file that {JSON_NAME} was written with; run `xalign analyze` again.")
    try:
        return load(path.read_bytes())
    except SafetensorError as error:
        raise FormatError(f"{path} is not a safetensors file: {error}.") from None


def _check(rows: Iterable[Row]) -> None:
    seen = set()
    for row in rows:
        if not math.isfinite(row.value):
            raise ValueError(f"{row.place} is {row.value}; only finite numbers are written.")
        if (row.low is None) != (row.high is None):
            raise ValueError(f"{row.place} has one end of an interval without the other.")
        if row.low is not None and row.high is not None and not -math.inf < row.low <= row.high < math.inf:
            raise ValueError(f"{row.place} has the interval [{row.low}, {row.high}].")
        key = (row.step, row.measure, row.layer, row.subject)
        if key in seen:
            raise ValueError(f"{row.place} is there twice.")
        seen.add(key)


def _plain(row: Row) -> dict[str, Any]:
    """NumPy scalars become Python numbers, which JSON knows."""
    plain = asdict(row)
    plain["step"], plain["consumed_tokens"] = int(row.step), int(row.consumed_tokens)
    plain["layer"] = None if row.layer is None else int(row.layer)
    for name in ("value", "low", "high"):
        plain[name] = None if plain[name] is None else float(plain[name])
    return plain


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [item.name for item in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
