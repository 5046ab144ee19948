"""Each language's neurons switched off, and what that does to every language's loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_xalign.errors import ConfigError, CorpusError, FormatError
from megatron_xalign.formats.atomic import sha256_of, write_json
from megatron_xalign.workflows.conversion import checkpoint_of


@dataclass(frozen=True, kw_only=True)
class AblateOptions:
    """Whose neurons, found how, and the sentences whose loss is measured."""

    model: Path
    """Run folder, checkpoint, or Hugging Face folder."""
    stats: Path
    """``neurons/step-N`` of this model, in which the neurons are found."""
    pairs: Path
    """Translations (probe file) whose loss is measured; better others than those the neurons were found on."""
    find: Literal["lape", "average_precision"] = "lape"
    count: int = 1000
    """Neurons of each language by average precision; LAPE has its own rule."""
    max_pairs: int = 500
    batch_size: int = 16
    seed: int = 1234
    """Of the random neurons and of the resamples."""

    def __post_init__(self) -> None:
        if self.find not in ("lape", "average_precision"):
            raise ConfigError(f"find={self.find!r} is not one of lape, average_precision.")
        for name in ("count", "max_pairs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be positive.")


def ablate(options: AblateOptions, out: Path) -> dict[str, Any]:
    """Switch off each language's neurons, and as many random others, and measure every language; write and return it.

    Raises:
        ConfigError: ``out`` exists.
        CorpusError: the pairs hold no sentence set of the languages.
        FormatError: the statistics are not of this model or have no probe of two languages.
    """
    from megatron_xalign.analysis import ablation, resampling
    from megatron_xalign.capture.interventions import zero_neurons
    from megatron_xalign.steering.models import continuation_loss

    if out.exists():
        raise ConfigError(f"{out} exists; name another file, or remove it.")
    languages, sets_KLF = _neurons(options)
    try:
        controls_KLF = [
            ablation.random_neurons_like(own_LF, options.seed + number) for number, own_LF in enumerate(sets_KLF)
        ]
    except ValueError as error:
        raise ConfigError(f"{error} Use a smaller count, so that there can be a control.") from None
    texts = _texts(options, languages)
    with _model_and_points(options.model) as (model, tokenizer, points):
        if (points.num_layers, points.ffn_hidden_size) != sets_KLF.shape[1:]:
            raise FormatError(
                f"{options.stats} is of {sets_KLF.shape[1]} layers of {sets_KLF.shape[2]} neurons, and the model has "
                f"{points.num_layers} of {points.ffn_hidden_size}; they are not of one model."
            )
        tokens = {
            language: [ids.tolist() for ids in tokenizer.encode(own)] for language, own in texts.items()
        }
        short = [language for language, own in tokens.items() if min(map(len, own)) < 2]
        if short:
            raise CorpusError(f"{options.pairs}: a sentence in {short[0]} has fewer than two tokens and so no loss.")

        def losses() -> dict[str, Any]:
            # The first token has nothing before it.
            return {
                language: continuation_loss(
                    model, [ids[:1] for ids in own], [ids[1:] for ids in own], options.batch_size
                )
                for language, own in tokens.items()
            }

        intact = losses()
        counts_RD = resampling.resample_counts(len(next(iter(tokens.values()))), seed=options.seed)
        rows: list[dict[str, Any]] = []
        change: dict[str, list[list[float]]] = {"language": [], "random": []}
        for number, language in enumerate(languages):
            drawn_LF = controls_KLF[number]
            for kind, chosen_LF in (("language", sets_KLF[number]), ("random", drawn_LF)):
                with zero_neurons(points, _by_layer(chosen_LF)):
                    found = losses()
                effects = {
                    other: ablation.ablation_effect(
                        intact[other].nats_D, found[other].nats_D, intact[other].tokens_D, counts_RD
                    )
                    for other in languages
                }
                change[kind].append([effects[other].change for other in languages])
                rows += [
                    {"neurons_of": language, "kind": kind, "loss_of": other, **asdict(effect)}
                    for other, effect in effects.items()
                ]
    report = {
        "format": "megatron_xalign ablation", "version": 1, "languages": languages, "find": options.find,
        "num_neurons": {language: int(own.sum()) for language, own in zip(languages, sets_KLF, strict=True)},
        "num_pairs": len(counts_RD[0]), "pairs_sha256": sha256_of(options.pairs),
        "model": str(options.model), "stats": str(options.stats), "seed": options.seed,
        "unit": "nats per token, ablated minus intact", "change": change,
        "selectivity": dict(zip(languages, ablation.selectivity(np.array(change["language"])).tolist(), strict=True)),
        "rows": rows,
    }  # fmt: skip
    write_json(out, report)
    return report


def _neurons(options: AblateOptions) -> tuple[list[str], np.ndarray]:
    """Languages, and bool [K, L, F]: the neurons of each."""
    from megatron_xalign.analysis import neurons
    from megatron_xalign.formats.neuron_stats import read_neuron_stats

    stats = read_neuron_stats(options.stats)
    probed = [language for language in stats.languages if language in set(stats.document_languages)]
    if len(probed) < 2:
        raise FormatError(f"{options.stats} has probe sentences in {probed}; two languages are needed.")
    keep = [stats.languages.index(language) for language in probed]
    try:
        if options.find == "lape":
            found = neurons.lape(stats.probe_gate_positive_KLF[keep], stats.probe_tokens_K[keep])
            return probed, found.languages_of
        scores = stats.probe_neuron_mean_DLF
        flat_DN = scores.reshape(len(scores), -1)
        own_D = np.array([probed.index(language) for language in stats.document_languages])
        precision_KN = neurons.average_precision_by_language(flat_DN, own_D, len(probed))
        sets_KN = np.zeros(precision_KN.shape, np.bool_)
        for number, own_N in enumerate(precision_KN):
            sets_KN[number, neurons.top_neurons(own_N, min(options.count, own_N.size))] = True
        return probed, sets_KN.reshape(len(probed), *scores.shape[1:])
    except ValueError as error:
        raise FormatError(f"{options.stats}: {error}") from None


def _texts(options: AblateOptions, languages: list[str]) -> dict[str, list[str]]:
    from megatron_xalign.data.documents import read_probe

    texts: dict[str, list[str]] = {language: [] for language in languages}
    for pair in read_probe(options.pairs):
        if all(language in pair.texts for language in languages):
            for language in languages:
                texts[language].append(pair.texts[language])
        if len(texts[languages[0]]) == options.max_pairs:
            break
    if not texts[languages[0]]:
        raise CorpusError(f"{options.pairs} holds no pair with a sentence in each of {', '.join(languages)}.")
    return texts


def _by_layer(chosen_LF: np.ndarray) -> Mapping[int, np.ndarray]:
    return {layer: np.flatnonzero(own_F) for layer, own_F in enumerate(chosen_LF) if own_F.any()}


@contextmanager
def _model_and_points(folder: Path) -> Iterator[tuple[Any, Any, Any]]:
    """A model as steering runs it, its tokenizer, and the points at which capture reaches its neurons."""
    from megatron_xalign.capture import hook_points
    from megatron_xalign.data.tokenizer import Tokenizer
    from megatron_xalign.steering.models import HfModel, MegatronModel

    if (folder / "config.json").is_file():
        model = HfModel.load(folder)
        yield model, Tokenizer.load(folder), hook_points.hugging_face_points(model.model)
        return
    from megatron_xalign.training.inference import load_model

    with load_model(checkpoint_of(folder)) as loaded:
        points = hook_points.megatron_points(loaded.model_chunks, loaded.ranks)
        tokenizer = Tokenizer.load(loaded.config.data.tokenizer)
        yield MegatronModel(loaded.logits, loaded.layers, loaded.vocab_size), tokenizer, points

