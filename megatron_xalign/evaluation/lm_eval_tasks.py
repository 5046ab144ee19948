"""Tasks of EleutherAI's lm-eval, run on a local folder without a hub; and task files made from held-out text.

lm-eval is no dependency: ``pip install 'lm-eval[hf]>=0.4.9'`` (it asks for an older python-dateutil than some tools
bring).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_xalign.errors import ConfigError
from megatron_xalign.evaluation.tasks import Measured
from megatron_xalign.formats.atomic import write_text

PREFIX = "lm_eval."
"""Before the names of its measures: ``lm_eval.bits_per_byte`` of a task."""


def run_tasks(folder: Path, tasks: Sequence[str], include: Path | None, limit: int | None) -> list[Measured]:
    """Run tasks on a Hugging Face folder; each number with lm-eval's own standard error.

    Args:
        folder: the model.
        tasks: names.
        include: folder with further task files (YAML).
        limit: documents of each task; all if left out.

    Raises:
        ConfigError: lm-eval is not installed, or it does not know a task.
    """
    # Before its import: nothing is asked of a hub.
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"
    try:
        import lm_eval
        from lm_eval.models import huggingface  # noqa: F401 - what its extra `hf` brings
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"tasks of lm-eval need it ({error}): pip install 'lm-eval[hf]>=0.4.9'.") from None
    manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(f"lm-eval knows no task {', '.join(unknown)}; name the folder of its YAML (--include-path).")
    outcome = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(folder), "dtype": "float32", "trust_remote_code": False},
        tasks=list(tasks), task_manager=manager, limit=limit, device="cpu", batch_size=1, bootstrap_iters=100,
    )
    return measured(outcome["results"])


def measured(results: Mapping[str, Mapping[str, Any]]) -> list[Measured]:
    """lm-eval's ``results`` as numbers of ours: measure by metric, subject by task."""
    found = []
    for task, metrics in sorted(results.items()):
        for key, value in sorted(metrics.items()):
            name, _, how = key.partition(",")
            if not isinstance(value, (int, float)) or isinstance(value, bool) or name.endswith("_stderr"):
                continue
            if name in ("sample_len", "samples", "alias"):
                continue
            error = metrics.get(f"{name}_stderr,{how}")
            width = 1.96 * error if isinstance(error, (int, float)) else None  # "N/A" for some metrics
            low, high = (None, None) if width is None else (value - width, value + width)
            filtered = "" if how in ("none", "") else f".{how}"
            found.append(Measured(f"{PREFIX}{name}{filtered}", task, float(value), low, high))
    return found


def write_tasks(folder: Path, texts: Mapping[str, Sequence[str]]) -> list[str]:
    """Write a task for each language's text (bits per byte, rolling) and its data; return the tasks' names."""
    names = []
    for language, items in sorted(texts.items()):
        name = f"xalign_text_{language}"
        data = folder / f"{name}.jsonl"
        write_text(data, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in items))
        task = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
            "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}], "metadata": {"version": 1},
        }
        write_text(folder / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False, allow_unicode=True))
        names.append(name)
    return names
