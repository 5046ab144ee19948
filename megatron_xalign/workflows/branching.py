"""Runs that go on from a checkpoint, their own or another run's: what must be the same, and what is taken over."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_xalign.batch_sizes import batch_sizes
from megatron_xalign.config import RunConfig
from megatron_xalign.config.tree import from_tree
from megatron_xalign.errors import CheckpointError, ConfigError, CorpusError, FormatError
from megatron_xalign.formats.run_folder import differing_settings

if TYPE_CHECKING:
    from megatron_xalign.data.blend import Blend

log = logging.getLogger(__name__)

# What a checkpoint's tensors, or its place in the data, would mean something else with.
_FIXED = ("model.", "training.global_batch_size", "training.rampup_batch_size", "data.seq_length")
# Of the model only what its first weights were, and how the vocabulary is padded.
_FREE = ("model.init_method", "model.make_vocab_size_divisible_by")
# Of the data what may differ: the order in which the sources come is compared, and where and how they are read is
# nothing to a sample. Tokenizers and token files are compared by content.
_COMPARED = (
    "data.mixture.parallel_fraction", "data.mixture.schedule", "data.mixture.languages", "data.mixture.fraction_of",
    "data.mixture.budget_rule", "data.num_workers", "data.prefetch_factor", "data.index_cache_dir", "data.probe",
    "data.tokenizer",
)
_COMPARED_OF_SOURCES = ("prefix", "max_repeats")


@dataclass(frozen=True)
class Branch:
    """Where a run begins that goes on from another one's checkpoint."""

    checkpoint: Path
    step: int
    """Optimizer steps done."""
    differing: list[str]
    """Settings that differ between the two runs, as ``path: old -> new``."""
    counted: tuple[list[str], list[str]] | None
    """Languages and sources whose tokens the other run counted; None where its sources cannot be read any more."""
    keeps_neurons: bool
    """Whether the same is captured, of the same languages."""
    keeps_scales: bool
    """Whether FP8 scales are those of the other run; not from one recipe to another, or from bf16."""

    def facts(self) -> dict[str, Any]:
        """As ``run.json`` tells it."""
        return {"branched_from": {
            "checkpoint": str(self.checkpoint), "step": self.step, "differing": self.differing,
        }}

    def describe(self) -> str:
        """In a line."""
        differing = "; ".join(self.differing) or "no setting"
        return f"goes on from step {self.step} of {self.checkpoint}; what differs from that run: {differing}"


def plan_branch(config: RunConfig, blend: Blend, vocab_size: int, tokenizer_sha256: str) -> Branch:
    """Compare a run with the one whose checkpoint it is to go on from (``training.load_state``).

    Args:
        config: of the run.
        blend: its samples.
        vocab_size: its ids.
        tokenizer_sha256: by what its tokenizer is known.

    Raises:
        CheckpointError: the checkpoint cannot be used, its run read another text, or other samples up to there.
        ConfigError: the run ends before the checkpoint's step, or differs in what must be the same.
    """
    from megatron_xalign.data.common_samples import common_samples
    from megatron_xalign.formats.checkpoint_folder import damaged, find_damage, read_manifest

    checkpoint = Path(str(config.training.load_state))
    manifest = read_manifest(checkpoint)
    step, extra = manifest["step"], manifest.get("extra")
    if manifest.get("weights_only") or not isinstance(extra, dict) or "config" not in extra:
        raise CheckpointError(
            f"{checkpoint} holds weights and no state of a run; take them by training.load_weights={checkpoint}."
        )
    # Contents are compared where they are loaded; what is missing or cut is told before the run's folder is written.
    if damage := find_damage(checkpoint, manifest, most_hashed_bytes=0):
        raise damaged(checkpoint, damage)
    try:
        before = from_tree(RunConfig, extra["config"])
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint}: the settings of its run cannot be read: {error}") from None
    differing = [
        text for text in differing_settings(before, config)
        if not text.startswith(("name: ", "training.load_state: ", "training.load_weights: "))
    ]
    _check_fixed(checkpoint, before, config, differing)
    if (extra.get("vocab_size"), extra.get("tokenizer_sha256")) != (vocab_size, tokenizer_sha256):
        raise CheckpointError(f"{checkpoint} was trained with another tokenizer than {config.data.tokenizer}.")
    sizes = batch_sizes(dataclasses.replace(config.training, train_steps=blend.train_steps))
    if step >= sizes.num_steps:
        raise ConfigError(
            f"training.load_state={checkpoint} is of step {step}, and this run ends at step {sizes.num_steps}; set "
            "training.train_steps to more."
        )
    known, now = extra.get("data"), blend.fingerprint()
    if isinstance(known, dict):
        # There may be more sources now; had they been read before, the samples would differ.
        now = {name: content for name, content in now.items() if name in known}
        check_same_data(checkpoint, known, now, config.training.allow_changed_data)
    num_samples, may_differ = sizes.samples_before(step), config.training.allow_changed_data
    problem, earlier = None, None
    try:
        earlier = _blend_of(before, config)
    except (ConfigError, CorpusError, FormatError) as error:
        problem = f"its samples cannot be compared: {error}"
    else:
        common = common_samples(earlier, blend, num_samples)
        if other := [text for text in differing if _is_other_data(text)]:
            problem = f"its data was another: {'; '.join(other)}"
        elif common < num_samples:
            problem = (
                f"its run had read {num_samples:,} samples ({num_samples * config.data.seq_length:,} tokens), of which "
                f"this one has the first {common:,} only in common. A data.mixture.schedule can be that run's fraction "
                "up to there and another one from there on"
            )
    if problem is not None:
        if not may_differ:
            raise CheckpointError(
                f"{checkpoint}: {problem.rstrip('.')}. With --set training.allow_changed_data=true it goes on all the "
                f"same, with this run's own samples from number {num_samples:,} on; text may then come twice or never."
            )
        log.warning("%s: %s; going on as training.allow_changed_data says.", checkpoint, problem)
    return Branch(
        checkpoint, step, differing,
        counted=None if earlier is None else (earlier.languages, earlier.source_names),
        keeps_neurons=earlier is not None and earlier.languages == blend.languages and before.capture == config.capture,
        keeps_scales=before.fp8 == config.fp8,
    )


def check_same_data(
    checkpoint: Path, before: dict[str, Any] | None, now: dict[str, Any], allow_changed_data: bool
) -> None:
    """Compare the token files a checkpoint was trained on with those that are there now.

    Raises:
        CheckpointError: they differ, by content and not by place, and that is not allowed.
    """
    if before is None or before == now:
        return
    names = sorted({*before, *now})
    differing = [
        f"{name} ({'is new' if name not in before else 'is gone' if name not in now else 'has another content'})"
        for name in names
        if before.get(name) != now.get(name)
    ]
    what = f"{checkpoint} was trained on other token files: {', '.join(differing)}"
    if not allow_changed_data:
        raise CheckpointError(
            f"{what}. Its samples would not be the ones it would have read. Restore the files, start a new run, or go "
            "on with the changed ones by --set training.allow_changed_data=true."
        )
    log.warning("%s; going on as training.allow_changed_data says.", what)


def _check_fixed(checkpoint: Path, before: RunConfig, config: RunConfig, differing: list[str]) -> None:
    fixed = [text for text in differing if text.startswith(_FIXED) and not text.startswith(_FREE)]
    if before.params_dtype != config.params_dtype:
        fixed.append(f"precision: {before.precision_name} -> {config.precision_name}")
    if fixed:
        raise ConfigError(
            f"training.load_state={checkpoint} is of a run that must be like this one in model, precision of weights, "
            f"batch and sequence length, and differs: {'; '.join(fixed)}. Set them as there, or take its weights alone "
            f"by training.load_weights={checkpoint}."
        )


def _is_other_data(text: str) -> bool:
    key = text.split(":", 1)[0]
    is_source = key.startswith("data.sources.")
    return (
        key.startswith("data.") and not key.startswith(_COMPARED)
        and not (is_source and key.rsplit(".", 1)[-1] in _COMPARED_OF_SOURCES)
    )


def _blend_of(before: RunConfig, config: RunConfig) -> Blend:
    """The samples of the other run, read where this one reads its token files."""
    from megatron_xalign.data.blend import build_blend

    places = {Path(source.prefix).name: source.prefix for source in config.data.sources}
    sources = before.data.sources
    if len(places) == len(config.data.sources):
        sources = tuple(
            dataclasses.replace(source, prefix=places.get(Path(source.prefix).name, source.prefix))
            for source in sources
        )
    data = dataclasses.replace(before.data, sources=sources, index_cache_dir=config.data.index_cache_dir)
    return build_blend(dataclasses.replace(before, data=data))
