"""Control vectors, text steered by them, and how far it is in the language it should be in."""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_xalign import __version__
from megatron_xalign.errors import ConfigError, CorpusError, FormatError
from megatron_xalign.formats.atomic import sha256_of, whole_folder
from megatron_xalign.workflows.conversion import checkpoint_of, convert_to_hf

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SteerOptions:
    """What to steer, where from and to, and on which prompts."""

    model: Path
    """Run folder, checkpoint, or Hugging Face folder."""
    source: str
    """Language the prompts are in."""
    target: str
    """Language to steer towards."""
    prompts: Path
    """Text, one prompt a line, or JSON lines with ``text``."""
    pairs: Path | None = None
    """Translations (probe file) that control vectors are made of, by this model."""
    stats: Path | None = None
    """Or ``neurons/step-N`` of this model, whose probe they are made of."""
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Among which one is chosen on prompts of its own."""
    num_dev: int = 50
    """Prompts the strength is chosen on; the next ones are reported."""
    num_test: int = 200
    max_pairs: int = 1000
    """Pairs the vectors are made of."""
    max_new_tokens: int = 30
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 42
    batch_size: int = 16
    norm_preserving: bool = True
    layers: tuple[int, ...] | None = None
    uncached: bool = False
    """Run a checkpoint in Megatron's own model, which sees the whole prefix again for every token."""
    judge: dict[str, Any] | None = field(default=None)
    """Settings of ``steering.judge.JudgeConfig``."""

    def __post_init__(self) -> None:
        if (self.pairs is None) == (self.stats is None):
            raise ConfigError("control vectors come from --pairs or from --stats: give one of them.")
        if self.source == self.target:
            raise ConfigError(f"{self.source} is both the language of the prompts and the one to steer towards.")
        if not self.strengths or len(set(self.strengths)) != len(self.strengths):
            raise ConfigError(f"strengths={list(self.strengths)} must be different numbers, one at least.")
        for name in ("num_dev", "num_test", "max_pairs", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive.")
        if not self.temperature >= 0.0 or not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"temperature={self.temperature} must be 0 or more and top_p={self.top_p} in (0, 1].")


def plan_steering(options: SteerOptions) -> dict[str, Any]:
    """What ``steer`` would do, judge's bill included; no model is loaded and nothing written."""
    dev, test = _prompts(options)
    runs = len(options.strengths) * len(dev) + 2 * len(test) + len(dev)
    plan: dict[str, Any] = {
        "model": str(options.model), "source": options.source, "target": options.target,
        "dev_prompts": len(dev), "test_prompts": len(test), "strengths": list(options.strengths),
        "continuations": runs, "new_tokens_at_most": runs * options.max_new_tokens,
    }  # fmt: skip
    if options.judge is not None:
        from megatron_xalign.steering.judge import JudgeConfig, estimate

        # A continuation is not known yet; a token of it is about four characters.
        texts = [(prompt, " " * 4 * options.max_new_tokens) for prompt in test] * 2
        bill = estimate(JudgeConfig(**options.judge), texts, options.target)
        plan["judge"] = asdict(bill) | {"in_words": str(bill)}
    return plan


def steer(options: SteerOptions, out: Path) -> dict[str, Any]:
    """Make control vectors, choose a strength on some prompts, report on others; return the report.

    Writes into ``out``: ``steering.json`` (the report), ``texts.jsonl`` (every continuation), ``vectors.safetensors``.

    Raises:
        ConfigError: settings do not fit, or an optional package is missing.
        CorpusError: there are too few prompts or pairs.
        FormatError: the statistics are not of this model.
    """
    import numpy as np
    from safetensors.numpy import save_file

    from megatron_xalign.analysis.generation import choose_strength
    from megatron_xalign.data.language_identification import LanguageIdentifier

    if out.exists():
        raise ConfigError(f"{out} exists; name another folder, or remove it.")
    dev, test = _prompts(options)
    identifier = LanguageIdentifier([options.source, options.target])
    with _model(options.model, options.uncached) as (model, tokenizer):
        dev_tokens, test_tokens = ([ids.tolist() for ids in tokenizer.encode(texts)] for texts in (dev, test))
        wrong = [layer for layer in options.layers or () if layer >= len(model.layers)]
        if wrong:
            raise ConfigError(f"layers {wrong} are not of this model, whose layers are 0 to {len(model.layers) - 1}.")
        vectors_LH, made_of = _vectors(options, model, tokenizer)
        job = _Job(options, model, tokenizer, identifier, vectors_LH)
        dev_states_DH, test_states_DH = (
            middle_states(model, tokens, options.batch_size) for tokens in (dev_tokens, test_tokens)
        )
        plain_dev = job.measure(dev_states_DH, dev_tokens, None)
        by_strength = {
            strength: job.measure(dev_states_DH, dev_tokens, strength, plain_dev.report["nll_per_token"])
            for strength in options.strengths
        }
        chosen = choose_strength({strength: made.score for strength, made in by_strength.items()})
        plain = job.measure(test_states_DH, test_tokens, None)
        made = job.measure(test_states_DH, test_tokens, chosen, plain.report["nll_per_token"])
    judged = _judge(options, test, {"unsteered": plain.texts, "steered": made.texts})
    report = {
        "format": "megatron_xalign steering", "version": 1, "xalign": __version__,
        "options": json.loads(json.dumps(asdict(options), default=str)),
        "identifier": identifier.name, "run_by": type(model).__name__, "vectors": made_of,
        "prompts_sha256": sha256_of(options.prompts),
        "chosen_strength": chosen,
        "chosen_on": {"prompts": len(dev), "by": "harmonic mean of language rate and fluency, on prompts of its own"},
        "search": [{"strength": strength, **entry.report} for strength, entry in by_strength.items()],
        "unsteered_on_dev": plain_dev.report, "unsteered": plain.report, "steered": made.report,
    }  # fmt: skip
    if judged is not None:
        report["judge"] = judged
    with whole_folder(out) as folder:
        save_file({"vectors_LH": np.ascontiguousarray(vectors_LH, np.float32)}, folder / "vectors.safetensors")
        lines = [
            {"part": part, "strength": strength, "prompt": prompt, "continuation": text}
            for part, strength, prompts, texts in (
                *(("dev", strength, dev, entry.texts) for strength, entry in by_strength.items()),
                ("dev", 0.0, dev, plain_dev.texts),
                ("test", 0.0, test, plain.texts),
                ("test", chosen, test, made.texts),
            )
            for prompt, text in zip(prompts, texts, strict=True)
        ]  # fmt: skip
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / "texts.jsonl").write_text(text, encoding="utf-8")
        (folder / "steering.json").write_text(
            json.dumps(report, ensure_ascii=False, indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )
    return report


@dataclass(frozen=True)
class _Made:
    texts: list[str]
    report: dict[str, Any]
    score: Any


@dataclass(frozen=True)
class _Job:
    options: SteerOptions
    model: Any
    tokenizer: Any
    identifier: Any
    vectors_LH: Any

    def measure(
        self, states_DH: Any, tokens: list[list[int]], strength: float | None, plain_nll: float | None = None
    ) -> _Made:
        """Continue prompts of some ``middle_states``, and measure what came without a judge."""
        import numpy as np

        from megatron_xalign.analysis import generation
        from megatron_xalign.data.language_identification import script_shares
        from megatron_xalign.steering.generation import Sampling, generate
        from megatron_xalign.steering.models import Steering, continuation_loss

        options = self.options
        sampling = Sampling(
            max_new_tokens=options.max_new_tokens, temperature=options.temperature, top_p=options.top_p,
            seed=options.seed, banned=(self.tokenizer.eod,), batch_size=options.batch_size,
        )  # fmt: skip
        steering = None
        if strength is not None:
            steering = Steering(
                vectors_LH=self.vectors_LH, strength=strength, norm_preserving=options.norm_preserving,
                layers=options.layers,
            )  # fmt: skip
        made = generate(self.model, tokens, sampling, steering)
        texts = [self.tokenizer.decode(ids) for ids in made]
        loss = continuation_loss(self.model, tokens, made, options.batch_size)
        nll = float(loss.nats_D.sum() / loss.tokens_D.sum())
        found = self.identifier.identify(texts, options.target)
        rate = float(np.mean([one.language == options.target for one in found]))
        repeated = generation.repeated_ngram_rate(made)
        score = generation.SteeringScore(rate, nll, repeated, nll if plain_nll is None else plain_nll)
        bytes_made = sum(len(text.encode("utf-8")) for text in texts)
        shares = script_shares(texts, options.target)
        context = context_similarity(states_DH, middle_states(self.model, made, options.batch_size))
        with_letters = shares[~np.isnan(shares)] if shares is not None else np.zeros(0)
        report = {
            "language_rate": rate,
            "source_language_rate": float(np.mean([one.language == options.source for one in found])),
            "undetermined": sum(not one.determined for one in found),
            "mean_language_share": float(np.mean([one.share for one in found])),
            "script_share": float(with_letters.mean()) if len(with_letters) else None,
            "context_similarity": context[0] if context else None,
            "context_similarity_others": context[1] if context else None,
            "mean_characters": float(np.mean([len(text) for text in texts])),
            "nll_per_token": nll,
            "perplexity": float(np.exp(min(nll, 700.0))),
            "bits_per_byte": float(loss.nats_D.sum() / np.log(2) / bytes_made) if bytes_made else 0.0,
            "distinct_1": generation.distinct_n(made, 1),
            "distinct_2": generation.distinct_n(made, 2),
            "repeated_4gram_rate": repeated,
            "fluency": score.fluency,
            "value": score.value,
        }
        return _Made(texts, report, score)


def middle_states(model: Any, texts: Sequence[Sequence[int]], batch_size: int) -> Any:
    """float64 [D, H]: mean state of each text by itself in the middle layer of the unsteered model."""
    from megatron_xalign.steering.models import block_means

    return block_means(model, texts, batch_size)[:, len(model.layers) // 2]


def context_similarity(prompts_DH: Any, made_DH: Any) -> tuple[float, float] | None:
    """Whether continuations are about what their prompts are about, by the ``middle_states`` of both.

    Returns:
        Mean cosine of a continuation with its own prompt, and with all other prompts; None where there are no others.
    """
    from megatron_xalign.analysis.similarity import cosine

    if len(prompts_DH) < 2:
        return None
    found = cosine(prompts_DH, made_DH)
    return found.translation, found.random_derangement


@contextmanager
def _model(folder: Path, uncached: bool) -> Iterator[tuple[Any, Any]]:
    """The model and its tokenizer. A checkpoint runs as its Hugging Face class, which keeps keys and values."""
    from megatron_xalign.data.tokenizer import Tokenizer

    if (folder / "config.json").is_file():
        from megatron_xalign.steering.models import HfModel

        yield HfModel.load(folder), Tokenizer.load(folder)
        return
    from megatron_xalign.training.inference import load_model, read_checkpoint

    if not uncached and importlib.util.find_spec("transformers") is not None:
        from megatron_xalign.steering.models import HfModel

        config, _, _ = read_checkpoint(checkpoint_of(folder))
        with tempfile.TemporaryDirectory(prefix="xalign-steer-") as name:
            model = HfModel.load(convert_to_hf(folder, Path(name) / "hf"))
            model.most_tokens = config.data.seq_length
            yield model, Tokenizer.load(config.data.tokenizer)
        return
    from megatron_xalign.steering.models import MegatronModel

    log.info("%s runs without a cache, which takes longer the longer its texts get.", folder)
    with load_model(checkpoint_of(folder)) as loaded:
        tokenizer = Tokenizer.load(loaded.config.data.tokenizer)
        yield MegatronModel(loaded.logits, loaded.layers, loaded.vocab_size), tokenizer


def _prompts(options: SteerOptions) -> tuple[list[str], list[str]]:
    """Prompts to choose the strength on, and others to report on, in the order of the file; each once."""
    try:
        lines = options.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{options.prompts} cannot be read as UTF-8 text: {error}.") from None
    texts: dict[str, None] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        text: Any = line.strip()
        if options.prompts.suffix == ".jsonl":
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                raise CorpusError(f"{options.prompts}:{number} is not a JSON object with a text.") from None
            if not isinstance(text, str) or not text.strip():
                raise CorpusError(f"{options.prompts}:{number}: text is empty or no string.")
        texts[text] = None
    if len(texts) < options.num_dev + options.num_test:
        raise CorpusError(
            f"{options.prompts} holds {len(texts)} different prompts; {options.num_dev} to choose the strength on and "
            f"{options.num_test} others to report on are asked for. Give more, or lower --dev or --test."
        )
    ordered = list(texts)
    return ordered[: options.num_dev], ordered[options.num_dev : options.num_dev + options.num_test]


def _vectors(options: SteerOptions, model: Any, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    """float64 [L, H], from source to target, and what they are made of."""
    import numpy as np

    from megatron_xalign.analysis.steering import control_vector

    if options.stats is not None:
        from megatron_xalign.formats.neuron_stats import read_neuron_stats

        stats = read_neuron_stats(options.stats)
        for language in (options.source, options.target):
            if language not in stats.document_languages:
                raise FormatError(f"{options.stats} has no probe sentences in {language}.")
        if stats.num_layers != len(model.layers):
            raise FormatError(f"{options.stats} is of {stats.num_layers} layers and the model has {len(model.layers)}.")
        rows = [stats.rows(language)[: options.max_pairs] for language in (options.source, options.target)]
        vectors = []
        for layer in range(stats.num_layers):
            acts_DH = stats.layer("probe_residual_mean_DMH", layer)
            try:
                vectors.append(control_vector(acts_DH[rows[0]], acts_DH[rows[1]]))
            except ValueError as error:
                raise FormatError(f"{options.stats}, layer {layer}: {error}") from None
        return np.stack(vectors), {"stats": str(options.stats), "pairs": len(rows[0]), "step": stats.step}
    from megatron_xalign.data.documents import read_probe
    from megatron_xalign.steering.models import block_means

    assert options.pairs is not None
    sides: list[tuple[str, str]] = []
    for pair in read_probe(options.pairs):
        if options.source in pair.texts and options.target in pair.texts:
            sides.append((pair.texts[options.source], pair.texts[options.target]))
        if len(sides) == options.max_pairs:
            break
    if not sides:
        raise CorpusError(f"{options.pairs} holds no pair of {options.source} and {options.target}.")
    means = []
    for texts in zip(*sides, strict=True):
        tokens = [ids.tolist() for ids in tokenizer.encode(list(texts))]
        if not all(tokens):
            raise CorpusError(f"{options.pairs}: pair {[bool(ids) for ids in tokens].index(False) + 1} has no token.")
        means.append(block_means(model, tokens, options.batch_size))
    vectors = [control_vector(means[0][:, layer], means[1][:, layer]) for layer in range(means[0].shape[1])]
    return np.stack(vectors), {"pairs_sha256": sha256_of(options.pairs), "pairs": len(sides)}


def _judge(options: SteerOptions, prompts: list[str], texts: dict[str, list[str]]) -> dict[str, Any] | None:
    if options.judge is None:
        return None
    import numpy as np

    from megatron_xalign.steering.judge import JudgeConfig, estimate, judge

    config = JudgeConfig(**options.judge)
    found: dict[str, Any] = {"model": config.model, "base_url": config.base_url}
    asked = {name: list(zip(prompts, own, strict=True)) for name, own in texts.items()}
    log.info("judge: %s", estimate(config, [text for own in asked.values() for text in own], options.target))
    for name, own in asked.items():
        grades = judge(config, own, options.target)
        found[name] = {
            "coherence": float(np.mean([grade.coherence for grade in grades])),
            "fluency": float(np.mean([grade.fluency for grade in grades])),
            "grades": [asdict(grade) for grade in grades],
        }
    return found
