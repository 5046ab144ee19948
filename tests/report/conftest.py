"""Run folders with invented numbers, written through the writers that real runs go through."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_xalign.config import RunConfig
from megatron_xalign.config.tree import from_tree, to_yaml
from megatron_xalign.formats.atomic import write_json, write_text
from megatron_xalign.formats.results import Results, Row, write_results

NUM_PAIRS = 200
TOKENS_PER_STEP = 32 * 256


def write_run(
    folder: Path,
    fraction: float,
    *,
    name: str | None = None,
    languages: Sequence[str] = ("eng_Latn", "fin_Latn"),
    num_layers: int = 4,
    ffn_hidden_size: int = 512,
    steps: Sequence[int] = tuple(range(0, 601, 50)),
    num_pairs: int = NUM_PAIRS,
    skip_measures: Sequence[str] = (),
    holds: bool = True,
    seed: int = 0,
) -> Path:
    """One analysed run whose alignment grows with training and, more so, with the fraction."""
    random = np.random.default_rng([seed, int(1000 * fraction)])
    config = from_tree(
        RunConfig,
        {
            "name": name or f"p{fraction:g}",
            "output_dir": str(folder),
            "model": {"num_layers": num_layers, "ffn_hidden_size": ffn_hidden_size},
            "parallel": {"tensor_model_parallel_size": 2},
            "data": {"mixture": {"parallel_fraction": fraction}},
            "training": {"train_steps": max(steps[-1], 1)},
        },
    )
    write_text(folder / "config.yaml", to_yaml(config))
    write_json(folder / "run.json", _facts(config))
    write_json(folder / "audit.json", _audit(fraction, languages, holds))
    lines = [_metric(step, fraction, languages, random) for step in range(10, steps[-1] + 1, 10)]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))

    rows = [
        row
        for step in steps
        for row in _measures(step, fraction, list(languages), num_layers, ffn_hidden_size, num_pairs, random)
        if row.measure not in skip_measures
    ]
    documents = np.repeat(np.arange(len(languages)), num_pairs)
    centres = random.normal(size=(num_layers + 1, len(languages), 2)) * 3
    points = centres[:, documents] + random.normal(size=(len(steps), num_layers + 1, len(documents), 2))
    arrays = {
        "pca_coordinates": points.astype(np.float32),
        "pca_explained": np.tile(np.array([0.41, 0.17], dtype=np.float32), (num_layers + 1, 1)),
        "pca_steps": np.array(steps, dtype=np.int64),
        "document_languages": documents,
        "ap_scores": random.beta(12, 12, size=(len(languages), num_layers, ffn_hidden_size)).astype(np.float32),
    }
    context = {
        "run": config.name, "parallel_fraction": fraction, "languages": list(languages), "num_layers": num_layers,
        "ffn_hidden_size": ffn_hidden_size, "hidden_size": 192, "num_pairs": num_pairs, "pooling": "mean",
        "probe_sha256": "0" * 64, "probed_languages": list(languages), "lape": {"top_rate": 0.01},
    }  # fmt: skip
    write_results(folder / "analysis", Results(context, rows, arrays))
    return folder


def _measures(
    step: int, fraction: float, languages: list[str], num_layers: int, width: int, num_pairs: int,
    random: np.random.Generator,
) -> list[Row]:  # fmt: skip
    tokens = step * TOKENS_PER_STEP
    grown = 1.0 - np.exp(-step / 200)
    strength = 0.15 + 0.6 * (1 - np.exp(-6 * fraction))
    rows: list[Row] = []

    def add(measure: str, layer: int | None, subject: str, value: float, spread: float | None = None) -> None:
        value = float(value)
        ends = (None, None) if spread is None else (value - spread, value + spread)
        rows.append(Row(step, tokens, measure, layer, subject, value, *ends))

    for pair in ("-".join(two) for two in itertools.combinations(languages, 2)):
        for layer in range(-1, num_layers):
            depth = (layer + 1) / num_layers
            base = strength * grown * (0.3 + 0.7 * np.sin(np.pi * min(1.0, 0.2 + 0.65 * depth)))
            found = float(np.clip(0.06 + 0.6 * base + 0.01 * random.normal(), 0.04, 0.96))
            # Far from proportional, so that the two measures have different best layers and a mix-up shows.
            add("retrieval_centred", layer, pair, found, 0.03)
            add("retrieval", layer, pair, 0.05 + 0.02 * (num_layers - layer) * grown, 0.02)
            add("retrieval_forward", layer, pair, found + 0.01)
            add("retrieval_backward", layer, pair, found - 0.01)
            add("mexa", layer, pair, 0.8 * found, 0.03)
            add("cosine_translation", layer, pair, 0.6 + 0.3 * base)
            add("cosine_random", layer, pair, 0.58)
            add("cosine_gap", layer, pair, 0.02 + 0.3 * base, 0.01)
            add("cosine_centred_gap", layer, pair, 0.05 + 0.4 * base, 0.02)
            add("cka", layer, pair, min(0.95, 0.3 + 0.7 * base), 0.03)
            add("cka_permuted", layer, pair, 0.25 + 0.02 * random.normal())
            add("pwcca", layer, pair, 0.5 + 0.4 * base)
            add("pwcca_permuted", layer, pair, 0.45)
    for layer in range(-1, num_layers):
        add("silhouette", layer, "", 0.5 - 0.5 * fraction * grown * (layer + 1) / num_layers)
    for index, language in enumerate(languages):
        counts = np.round((0.02 + 0.2 * grown * (1 - 0.8 * fraction)) * width * np.linspace(0.4, 1.4, num_layers))
        lape = np.round(0.02 * width * np.linspace(1.5, 0.5, num_layers) * (1 + 0.2 * index))
        for layer in range(num_layers):
            add("ap_count_0.9", layer, language, counts[layer])
            add("ap_null_0.9", layer, language, 0.2)
            add("lape_count", layer, language, lape[layer])
        add("ap_count_0.9", None, language, counts.sum())
        add("ap_null_0.9", None, language, 0.2 * num_layers)
        add("lape_count", None, language, lape.sum())
        nll = 3.1 + 5.2 * np.exp(-step / 120) + 0.3 * index - 0.2 * fraction
        add("nll_per_token", None, language, nll, 0.05)
        add("bits_per_byte", None, language, nll / 2.2, 0.03)
    return rows


def _metric(step: int, fraction: float, languages: Sequence[str], random: np.random.Generator) -> dict[str, Any]:
    loss = 3.2 + 5.0 * np.exp(-step / 110) - 0.15 * fraction + 0.03 * random.normal()
    return {
        "step": step, "consumed_tokens": step * TOKENS_PER_STEP, "loss": float(loss),
        "loss_by_language": {code: float(loss + 0.2 * index) for index, code in enumerate(languages)},
        "loss_by_source": {}, "grad_norm": 0.7, "lr": 1e-3, "tokens_per_second": 21345.0 + step, "seconds": 3.75,
    }  # fmt: skip


def _audit(fraction: float, languages: Sequence[str], holds: bool) -> dict[str, Any]:
    def source(name: str, origin: str, codes: Sequence[str], tokens: int) -> dict[str, Any]:
        return {
            "name": name, "prefix": f"tokens/{name}", "origin": origin, "languages": list(codes),
            "samples": tokens // 256, "tokens": tokens, "content_tokens": int(tokens * 0.98),
            "loss_tokens": tokens - 1000, "available_tokens": 2_345_678, "repeats": round(tokens / 2_345_678, 3),
            "max_repeats": 4.0, "documents_begun": tokens // 90, "documents_cut": tokens // 256,
        }  # fmt: skip

    total = 600 * TOKENS_PER_STEP
    mono = int(total * (1 - fraction) / len(languages))
    achieved = round(fraction * 1.0002, 6)
    return {
        "asked": {"parallel_fraction": fraction, "fraction_of": "content", "languages": {}},
        "achieved": {
            "parallel_fraction": achieved, "parallel_fraction_content": achieved,
            "parallel_fraction_all": fraction * 1.02, "parallel_fraction_loss": fraction * 1.01,
        },
        "difference_samples": 0.21, "holds": holds, "samples": total // 256, "seq_length": 256, "tokens": total,
        "content_tokens": int(total * 0.98), "loss_tokens": total - 5000,
        "sources": [
            *(source(code, "monolingual", [code], mono) for code in languages),
            source("pairs", "parallel", languages, int(total * fraction)),
        ],
        "languages": {
            code: {
                "asked": 1 / len(languages), "achieved": 1 / len(languages), "content_tokens": total // len(languages),
                "monolingual": mono, "parallel": total // len(languages) - mono,
            }
            for code in languages
        },
    }  # fmt: skip


def _facts(config: RunConfig) -> dict[str, Any]:
    return {
        "name": config.name, "version": "0.1.0", "commit": "0123abc", "seed": config.seed,
        "layout": {"tensor": 2, "pipeline": 1, "data": 1}, "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "parameters": 2_345_678,
        "starts": [{"time": "2026-11-22T12:00:00+00:00", "command": ["xalign", "train", "p0.yaml"]}],
    }  # fmt: skip


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """``write_run``, for tests that change one thing about a run."""
    return write_run


@pytest.fixture(scope="session")
def series_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs at 0, 0.05 and 0.3."""
    root = tmp_path_factory.mktemp("runs")
    return [write_run(root / f"p{fraction:g}", fraction) for fraction in (0.3, 0.0, 0.05)]
