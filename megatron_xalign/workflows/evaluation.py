"""Evaluation of every checkpoint of a run, and of Hugging Face folders."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_xalign import __version__
from megatron_xalign.errors import ConfigError, XAlignError
from megatron_xalign.formats.atomic import read_json, sha256_of, write_json
from megatron_xalign.formats.results import Results, Row, write_results
from megatron_xalign.formats.run_folder import RunFolder
from megatron_xalign.workflows.conversion import convert_to_hf

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What is evaluated and on what."""

    texts: Path | None = None
    """JSON lines of held-out translations; default: the run's probe."""
    most: int = 200
    """Sentences of each language at most."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval beside the built-in ones."""
    include: Path | None = None
    """Folder with task files of lm-eval."""
    limit: int | None = None
    """Documents of each of its tasks."""


def evaluate(folder: Path, plan: EvaluationPlan) -> Results:
    """Evaluate every checkpoint of a run, or one Hugging Face folder; return and write the results.

    A run's lie in ``analysis/evaluation/``, those of a Hugging Face folder in its ``evaluation/``, in the form of
    ``results.json``. What was evaluated before on the same text is not evaluated again.

    Raises:
        ConfigError: there is no text to evaluate on.
        FormatError: the folder is neither.
    """
    is_run = (folder / "config.yaml").is_file()
    texts = texts_of(folder, plan)
    out = RunFolder(folder).evaluation if is_run else folder / "evaluation"
    rows: list[Row] = []
    for step, consumed_tokens, identity, source in _models(folder, is_run):
        key = _key(identity, texts, plan)
        kept = out / "cache" / f"step-{step:06d}-{key[:16]}.json"
        try:
            numbers = read_json(kept)["numbers"] if kept.is_file() else None
        except (XAlignError, KeyError, TypeError):
            numbers = None  # damaged: measured again
        if numbers is None:
            with _as_hf(source, is_run, out) as hf:
                numbers = _measure(hf, texts, plan)
            write_json(kept, {"key": key, "numbers": numbers})
        rows += [Row(step=step, consumed_tokens=consumed_tokens, layer=None, **number) for number in numbers]
        log.info("%s: step %d evaluated.", folder, step)
    context = {
        "run": folder.name, "texts": str(texts), "texts_sha256": sha256_of(texts), "most": plan.most,
        "lm_eval_tasks": list(plan.tasks), "version": __version__,
    }
    results = Results(context, rows)
    write_results(out, results)
    return results


def texts_of(folder: Path, plan: EvaluationPlan) -> Path:
    """The text to evaluate a folder on.

    Raises:
        ConfigError: none is named, and the folder's run has no probe.
    """
    if plan.texts is not None:
        return plan.texts
    probe = RunFolder(folder).config().data.probe if (folder / "config.yaml").is_file() else None
    if probe is None:
        raise ConfigError(f"{folder} has no probe to evaluate on; name held-out translations (--texts FILE).")
    return Path(probe)


def write_lm_eval_tasks(texts: Path, folder: Path, most: int = 200) -> list[str]:
    """Task files for lm-eval from held-out text, a task for each language; return their names."""
    from megatron_xalign.evaluation.lm_eval_tasks import write_tasks

    return write_tasks(folder, _by_language(texts, most))


def _models(folder: Path, is_run: bool) -> Iterator[tuple[int, int, str, Path]]:
    """Step, tokens, identity and place of everything to evaluate."""
    from megatron_xalign.formats.checkpoint_folder import MANIFEST, checkpoint_folders

    if not is_run:
        status = [(path.name, path.stat()) for path in sorted(folder.glob("*.safetensors"))]
        files = [[name, item.st_size, item.st_mtime_ns] for name, item in status]
        if not files:
            raise ConfigError(f"{folder} is neither a run folder nor a Hugging Face folder with *.safetensors.")
        yield 0, 0, json.dumps(files), folder
        return
    run = RunFolder(folder)
    config = run.config()
    found = [path for path in checkpoint_folders(run.checkpoints) if (path / MANIFEST).is_file()]
    exported = {path.name: path for path in run.hf.glob("step-*") if (path / "config.json").is_file()}
    names = {path.name: path for path in found}
    if not names and not exported:
        raise ConfigError(f"{folder} holds no checkpoint to evaluate; `xalign train` writes them.")
    for name in sorted(names.keys() | exported.keys(), key=lambda text: (len(text), text)):
        step = int(name.removeprefix("step-"))
        # Checkpoints may have been removed since they were exported.
        identity = sha256_of(names[name] / MANIFEST) if name in names else sha256_of(exported[name] / "config.json")
        place = exported.get(name, names.get(name))
        assert place is not None
        yield step, step * config.training.global_batch_size * config.data.seq_length, identity, place


def _key(identity: str, texts: Path, plan: EvaluationPlan) -> str:
    include = [] if plan.include is None else [
        [path.name, sha256_of(path)] for path in sorted(plan.include.iterdir()) if path.is_file()
    ]
    facts = [__version__, identity, sha256_of(texts), plan.most, plan.tasks, plan.limit, include]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@contextmanager
def _as_hf(source: Path, is_run: bool, out: Path) -> Iterator[Path]:
    if not is_run or (source / "config.json").is_file():
        yield source
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".evaluating-", dir=out) as name:
        yield convert_to_hf(source, Path(name) / "hf", dtype=None)


def _measure(hf: Path, texts: Path, plan: EvaluationPlan) -> list[dict[str, Any]]:
    from megatron_xalign.evaluation import model as models
    from megatron_xalign.evaluation.lm_eval_tasks import run_tasks
    from megatron_xalign.evaluation.tasks import Measured, text_by_language, translation_choice

    pairs = _pairs(texts, plan.most)
    found: list[Measured] = []
    with models.load(hf) as model:
        settings = (model.encode, model.score, model.start, model.longest)
        found += text_by_language(_by_language(texts, plan.most), *settings)
        languages = sorted({language for pair in pairs for language in pair})
        for source in languages:
            for target in languages:
                both = [pair for pair in pairs if source in pair and target in pair]
                if source != target and both:
                    found += translation_choice(
                        [pair[source] for pair in both], [pair[target] for pair in both], f"{source}-{target}",
                        *settings,
                    )
    if plan.tasks:
        found += run_tasks(hf, plan.tasks, plan.include, plan.limit)
    return [asdict(number) for number in found]


def _pairs(texts: Path, most: int) -> list[dict[str, str]]:
    import itertools

    from megatron_xalign.data.documents import read_probe

    return [dict(pair.texts) for pair in itertools.islice(read_probe(texts), most)]


def _by_language(texts: Path, most: int) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for pair in _pairs(texts, most):
        for language, text in pair.items():
            found.setdefault(language, []).append(text)
    return found


def describe_evaluation(folder: Path, results: Results) -> str:
    """The numbers of the last step, with their intervals, and of the first where there are several."""
    first, last = results.steps[0], results.steps[-1]
    lines = [f"{folder}: step {last}" + (f", and {first} before" if first != last else "")]
    for row in results.select(step=last):
        before = results.select(measure=row.measure, subject=row.subject, step=first)
        came = f"{before[0].value:9.4f} ->" if before and first != last else " " * 12
        interval = "" if row.low is None or row.high is None else f"  [{row.low:.4f}, {row.high:.4f}]"
        lines.append(f"  {row.measure:26s}{row.subject:22s}{came}{row.value:9.4f}{interval}")
    return "\n".join(lines)


def evaluate_all(folders: Sequence[Path], plan: EvaluationPlan) -> dict[Path, Results]:
    """The same for several folders."""
    return {folder: evaluate(folder, plan) for folder in folders}
