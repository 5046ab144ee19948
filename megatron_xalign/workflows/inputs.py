"""All that a training run reads, found and checked before anything is built."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_xalign.batch_sizes import BatchSizes, batch_sizes
from megatron_xalign.config import DataConfig, RunConfig, TrainingConfig
from megatron_xalign.errors import ConfigError, CorpusError
from megatron_xalign.formats.checkpoint_folder import checkpoint_folders
from megatron_xalign.formats.run_folder import RunFolder
from megatron_xalign.workflows.branching import Branch, plan_branch

if TYPE_CHECKING:
    from megatron_xalign.capture.probe import ProbeSentence
    from megatron_xalign.data.blend import Blend
    from megatron_xalign.data.evaluation import Evaluation
    from megatron_xalign.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """What a run reads."""

    config: RunConfig
    """As it was given."""
    tokenizer: Tokenizer
    """That of its text."""
    num_ids: int
    """Ids of the model."""
    blend: Blend
    """Its samples."""
    training: TrainingConfig
    """With the steps that the samples are: with ``budget_rule: add`` parallel text makes a run longer than asked."""
    sizes: BatchSizes
    """Of every step."""
    probe: list[ProbeSentence]
    """Held-out translations that capture looks at; empty without capture."""
    held_out: Evaluation | None
    """Text for validation; None without."""
    branch: Branch | None
    """Where it begins, if that is another run's checkpoint."""


def read_inputs(config: RunConfig) -> RunInputs:
    """Open and check what a run reads; one that has checkpoints of its own goes on from no other run's.

    Raises:
        ConfigError: a setting is missing or does not fit the data.
        CorpusError: there is too little text for it.
        FormatError: a file is damaged, or of another tokenizer.
        CheckpointError: the checkpoint it is to begin from cannot be gone on from, or its own are gone.
    """
    from megatron_xalign.data.blend import build_blend
    from megatron_xalign.data.evaluation import build_evaluation
    from megatron_xalign.formats.token_file import check_same_tokenizer

    run = RunFolder(Path(config.output_dir))
    is_begun = bool(checkpoint_folders(run.checkpoints))
    if not is_begun:
        run.check_may_begin()
    tokenizer = read_tokenizer(config)
    blend = build_blend(config)
    for windows in blend.windows:
        check_same_tokenizer(windows.file.manifest, tokenizer)
    training = dataclasses.replace(config.training, train_steps=blend.train_steps)
    probe = _tokenized_probe(config.data, tokenizer) if config.capture else []
    held_out = build_evaluation(config) if training.eval_interval_steps else None
    num_ids, branch = _ids_of_model(config, tokenizer), None
    if training.load_state is not None and not is_begun:
        branch = plan_branch(config, blend, num_ids, tokenizer.sha256)
    return RunInputs(
        config=config, tokenizer=tokenizer, num_ids=num_ids, blend=blend, training=training,
        sizes=batch_sizes(training), probe=probe, held_out=held_out, branch=branch,
    )


def read_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of a run's text.

    Raises:
        ConfigError: ``data.tokenizer`` is not set, or is none.
    """
    from megatron_xalign.data.tokenizer import Tokenizer

    if not config.data.tokenizer:
        raise ConfigError("data.tokenizer is not set.")
    return Tokenizer.load(Path(config.data.tokenizer))


def _ids_of_model(config: RunConfig, tokenizer: Tokenizer) -> int:
    """Ids of the model; an imported one may have more than its tokenizer."""
    stated = config.model.vocab_size
    if stated is not None and stated < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size={stated} is less than the {tokenizer.vocab_size} ids of {config.data.tokenizer}; leave "
            "it out, or use the model's own tokenizer."
        )
    return int(tokenizer.vocab_size if stated is None else stated)


def _tokenized_probe(data: DataConfig, tokenizer: Tokenizer) -> list[ProbeSentence]:
    """Both sides of every probe pair as token ids; empty if the run has no probe."""
    from megatron_xalign.capture.probe import ProbeSentence
    from megatron_xalign.data.documents import read_probe

    if data.probe is None:
        return []
    sentences = [(pair.id, language, text) for pair in read_probe(data.probe) for language, text in pair.texts.items()]
    if not sentences:
        raise CorpusError(f"data.probe={data.probe} holds no pair; leave it out, or give held-out translations.")
    encoded = tokenizer.encode([text for _, _, text in sentences])
    return [
        ProbeSentence(pair_id=pair, language=language, tokens=tokens, num_bytes=len(text.encode("utf-8")))
        for (pair, language, text), tokens in zip(sentences, encoded, strict=True)
    ]
