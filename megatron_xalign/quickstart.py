"""The whole path on a laptop: text, tokenizer, token files, a run per fraction, analysis, conversion, one page.

Every stage is a workflow of its own and leaves files; a stage whose files are there is not done again, so a stopped
quickstart continues by the same command.
"""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_xalign import launch, workflows
from megatron_xalign.config import (
    CaptureConfig,
    DataConfig,
    MixtureConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
)
from megatron_xalign.config.tree import to_yaml
from megatron_xalign.errors import ConfigError
from megatron_xalign.formats.atomic import read_json, write_json, write_text
from megatron_xalign.formats.run_folder import RunFolder, check_same_run

log = logging.getLogger(__name__)

# Chosen by trial on two cores (docs/quickstart.md): what shows alignment within a quarter of an hour.
STEPS = 800
# Word-sized entries: they looked better than half as many in single trials of one seed.
VOCAB_SIZE = 8192
SEQ_LENGTH = 96
GLOBAL_BATCH_SIZE = 16
NUM_PROBES = 8
CORPUS_SEED = 1234
"""The split of the text stays the same whatever ``--seed`` is, so that runs of several seeds can be compared."""
MODEL = ModelConfig(
    num_layers=4, hidden_size=128, ffn_hidden_size=256, num_attention_heads=4,
    untie_embeddings_and_output_weights=False, init_method_std=0.06,
)
MONOLINGUAL_REPEATS = 8.0
PARALLEL_REPEATS = 16.0


@dataclass(frozen=True, kw_only=True)
class QuickstartPlan:
    """What a quickstart will do and where its files go."""

    out: Path
    fractions: tuple[float, ...]
    steps: int
    seed: int
    corpus: Path | None
    cache: Path | None
    processes: int
    master_port: int | None

    @property
    def corpus_folder(self) -> Path:
        """Text, one JSON object a line."""
        return self.out / "corpus"

    @property
    def tokenizer_folder(self) -> Path:
        """The trained tokenizer."""
        return self.out / "tokenizer"

    @property
    def report_folder(self) -> Path:
        """The page."""
        return self.out / "report"

    def token_prefix(self, name: str) -> Path:
        """Path of a token file without its ending."""
        return self.out / "tokens" / name

    def run_folder(self, fraction: float) -> RunFolder:
        """Where the run of a fraction lies."""
        return RunFolder(self.out / "runs" / run_name(fraction))

    def hf_folder(self, fraction: float) -> Path:
        """Where the run's last checkpoint lies as a Hugging Face folder."""
        return self.out / "hf" / run_name(fraction)

    def config_path(self, fraction: float) -> Path:
        """The YAML that ``xalign train`` reads."""
        return self.out / "configs" / f"{run_name(fraction)}.yaml"

    def layout(self, fraction: float) -> ParallelConfig:
        """Tensor-parallel for every other run, pipeline-parallel for those between, both with four processes."""
        if self.processes == 4:
            return ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
        if self.processes != 2:
            return ParallelConfig()
        if self.fractions.index(fraction) % 2 == 0:
            return ParallelConfig(tensor_model_parallel_size=2)
        return ParallelConfig(pipeline_model_parallel_size=2)

    def config(self, fraction: float, languages: tuple[str, str]) -> RunConfig:
        """The run of one fraction; runs differ in ``parallel_fraction``, in their layout and in nothing else."""
        interval = max(1, self.steps // NUM_PROBES)
        return RunConfig(
            name=run_name(fraction),
            output_dir=str(self.run_folder(fraction).path),
            seed=self.seed,
            model=MODEL,
            parallel=self.layout(fraction),
            optimizer=OptimizerConfig(lr=5e-3, min_lr=5e-4, lr_warmup_steps=self.steps // 10),
            data=DataConfig(
                tokenizer=str(self.tokenizer_folder),
                sources=(
                    *(
                        SourceConfig(prefix=str(self.token_prefix(language)), max_repeats=MONOLINGUAL_REPEATS)
                        for language in languages
                    ),
                    SourceConfig(prefix=str(self.token_prefix("-".join(languages))), max_repeats=PARALLEL_REPEATS),
                ),
                mixture=MixtureConfig(
                    parallel_fraction=fraction, seed=self.seed,
                    languages={language: 1.0 / len(languages) for language in languages},
                ),
                seq_length=SEQ_LENGTH,
                probe=str(self.corpus_folder / "probe.jsonl"),
            ),
            training=TrainingConfig(
                train_steps=self.steps, global_batch_size=GLOBAL_BATCH_SIZE,
                micro_batch_size=GLOBAL_BATCH_SIZE // 4 if self.layout(fraction).pipeline_model_parallel_size > 1
                else GLOBAL_BATCH_SIZE,
                log_interval_steps=max(1, min(10, self.steps // 10)), save_interval_steps=interval, keep_checkpoints=2,
            ),
            capture=CaptureConfig(probe_interval_steps=interval),
        )

    def describe(self) -> str:
        """What would be done, for ``--dry-run``."""
        tokens = self.steps * GLOBAL_BATCH_SIZE * SEQ_LENGTH
        text = self.corpus or "registry packages (" + ", ".join(workflows.registry_packages()) + ")"
        lines = [
            f"text        from {text} to {self.corpus_folder}",
            f"tokenizer   {VOCAB_SIZE} entries, byte-level BPE, to {self.tokenizer_folder}",
            f"token files to {self.token_prefix('')}",
        ]
        for fraction in self.fractions:
            layout = self.layout(fraction)
            lines.append(
                f"run {run_name(fraction):8s}{self.steps} steps, {tokens:,} tokens, "
                f"TP{layout.tensor_model_parallel_size} PP{layout.pipeline_model_parallel_size} on {self.processes} "
                f"process(es), to {self.run_folder(fraction).path}; Hugging Face folder {self.hf_folder(fraction)}"
            )
        return "\n".join([*lines, f"report      {self.report_folder / 'index.html'}"])


def run_name(fraction: float) -> str:
    """``0.05`` -> ``p0.05``."""
    return f"p{fraction:g}"


def plan_quickstart(
    *, out: Path, fractions: tuple[float, ...], steps: int | None, seed: int, corpus: Path | None, cache: Path | None,
    processes: int, master_port: int | None,
) -> QuickstartPlan:
    """Check what can be checked before work starts.

    Raises:
        ConfigError: the batch cannot be split over that many processes, or ``out`` holds a quickstart on other text.
        WorkerError: the port is in use.
    """
    plan = QuickstartPlan(
        out=out, fractions=fractions, steps=steps or STEPS, seed=seed, corpus=corpus.resolve() if corpus else None,
        cache=cache, processes=processes, master_port=master_port,
    )
    if master_port is not None:
        launch.check_port(master_port)
    data_size = processes // plan.layout(fractions[0]).model_parallel_size
    if GLOBAL_BATCH_SIZE % data_size:
        raise ConfigError(
            f"--nproc-per-node {processes} would split batches of {GLOBAL_BATCH_SIZE} samples into {data_size} parts; "
            "use 1, 2 or 4."
        )
    settings = plan.out / "quickstart.json"
    text = str(plan.corpus) if plan.corpus else "registry"
    if settings.is_file() and read_json(settings)["text"] != text:
        raise ConfigError(
            f"{out} holds a quickstart on other text ({read_json(settings)['text']}, not {text}); "
            "choose another --out, or remove that folder to start over."
        )
    return plan


def run_quickstart(plan: QuickstartPlan) -> str:
    """Run every stage that is not done yet; return where things lie and what came out, as text for a terminal."""
    stages = _Stages(3 + 3 * len(plan.fractions) + 1)

    with stages.next("text"):
        workflows.make_corpus(
            plan.corpus_folder, cache=plan.cache, seed=CORPUS_SEED, own_folder=plan.corpus,
        )
        write_json(plan.out / "quickstart.json", {"text": str(plan.corpus) if plan.corpus else "registry"})
        languages = workflows.corpus_languages(plan.corpus_folder)
        pair = "-".join(languages)
    with stages.next("tokenizer"):
        workflows.train_tokenizer(plan.corpus_folder, plan.tokenizer_folder, VOCAB_SIZE, "bpe")
    with stages.next("token files"):
        for language in languages:
            workflows.preprocess(
                [plan.corpus_folder / f"{language}.jsonl"], plan.token_prefix(language), plan.tokenizer_folder,
                language=language,
            )
        workflows.preprocess(
            [plan.corpus_folder / "pairs.jsonl"], plan.token_prefix(pair), plan.tokenizer_folder,
            pair=languages, seed=CORPUS_SEED,
        )
    for fraction in plan.fractions:
        # Both are proved before minutes are spent on training, and before a config of another run is overwritten.
        if plan.run_folder(fraction).config_path.is_file():
            check_same_run(plan.run_folder(fraction), plan.config(fraction, languages))
        workflows.audit_blend(plan.config(fraction, languages))
    for fraction in plan.fractions:
        config = plan.config(fraction, languages)
        write_text(plan.config_path(fraction), _header(plan, fraction) + to_yaml(config))
    for fraction in plan.fractions:
        run, name = plan.run_folder(fraction), run_name(fraction)
        with stages.next(f"training {name}"):
            config = plan.config(fraction, languages)
            if not workflows.is_trained(config):
                launch.run_workers(["train", str(plan.config_path(fraction))], plan.processes, plan.master_port)
        with stages.next(f"measures of {name}"):
            workflows.analyze(run.path)
        with stages.next(f"Hugging Face folder of {name}"):
            if not workflows.is_converted(run.path, plan.hf_folder(fraction)):
                workflows.convert_to_hf(run.path, plan.hf_folder(fraction))
                workflows.check_hf(run.path, plan.hf_folder(fraction))
    with stages.next("report"):
        page = workflows.report(
            [plan.run_folder(fraction).path for fraction in plan.fractions], plan.report_folder,
            corpus=plan.corpus_folder, commands=list(commands(plan, languages)),
            hf={run_name(fraction): plan.hf_folder(fraction) for fraction in plan.fractions},
        )
    return _summary(plan, page, stages)


def commands(plan: QuickstartPlan, languages: tuple[str, str]) -> Iterator[str]:
    """The stages as commands of their own, in order."""
    pairs = plan.token_prefix("-".join(languages))
    own = [f"--monolingual {name}={plan.corpus}/{name}.jsonl" for name in languages] if plan.corpus else []
    own += [f"--pairs {plan.corpus}/pairs.jsonl"] if plan.corpus else []
    yield " ".join(["xalign corpus", _quoted(plan.corpus_folder), *own])
    yield (
        f"xalign tokenizer train {_quoted(plan.corpus_folder)} {_quoted(plan.tokenizer_folder)} "
        f"--vocab-size {VOCAB_SIZE}"
    )
    for language in languages:
        yield (
            f"xalign preprocess {_quoted(plan.corpus_folder / f'{language}.jsonl')} --language {language} "
            f"--tokenizer {_quoted(plan.tokenizer_folder)} --output-prefix {_quoted(plan.token_prefix(language))}"
        )
    yield (
        f"xalign preprocess {_quoted(plan.corpus_folder / 'pairs.jsonl')} --pairs {','.join(languages)} "
        f"--tokenizer {_quoted(plan.tokenizer_folder)} --output-prefix {_quoted(pairs)}"
    )
    for fraction in plan.fractions:
        yield f"xalign train {_quoted(plan.config_path(fraction))} --nproc-per-node {plan.processes}"
        yield f"xalign analyze {_quoted(plan.run_folder(fraction).path)}"
        yield f"xalign convert to-hf {_quoted(plan.run_folder(fraction).path)} {_quoted(plan.hf_folder(fraction))}"
    runs = " ".join(_quoted(plan.run_folder(fraction).path) for fraction in plan.fractions)
    yield f"xalign report {runs} --out {_quoted(plan.report_folder)} --corpus {_quoted(plan.corpus_folder)}"


class _Stages:
    """Numbers the stages, and keeps what each took."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seconds: dict[str, float] = {}

    @contextmanager
    def next(self, name: str) -> Iterator[None]:
        """Announce a stage and time it."""
        log.info("[%d/%d] %s", len(self.seconds) + 1, self.total, name)
        started = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - started


def _header(plan: QuickstartPlan, fraction: float) -> str:
    return (
        f"# One run of a quickstart: {fraction:g} of its content tokens come from parallel documents.\n"
        f"# Needs the token files beside it; run: xalign train {plan.config_path(fraction)} "
        f"--nproc-per-node {plan.processes}\n"
        "# Vary data.mixture.parallel_fraction (and output_dir) to see what parallel text does.\n"
    )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _summary(plan: QuickstartPlan, page: Path, stages: _Stages) -> str:
    lines = ["", f"{'run':8s}{'loss':>8s}{'of unigrams':>13s}{'retrieval':>11s}"]
    for fraction in plan.fractions:
        outcome = workflows.outcome(plan.run_folder(fraction).path)
        lines.append(
            f"{run_name(fraction):8s}{outcome['loss']:8.3f}{outcome['unigram_entropy']:13.3f}{outcome['retrieval']:11.1%}"
        )
    lines += [
        "loss: training text, nats per token, last logged steps; of unigrams: if only token frequencies were known;",
        f"retrieval: held-out translations found, languages centred, at the best layer; chance {outcome['chance']:.1%}",
        "",
        f"report       {page}",
        *(f"checkpoints  {plan.run_folder(fraction).checkpoints}" for fraction in plan.fractions),
        *(f"HF folder    {plan.hf_folder(fraction)}" for fraction in plan.fractions),
        f"took         {sum(stages.seconds.values()) / 60:.1f} minutes",
    ]
    return "\n".join(lines)
