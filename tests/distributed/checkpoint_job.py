"""Runs that save, resume and convert tiny checkpoints; called by the tests through ``run_processes``."""

# S sequence

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_xalign import topology
from megatron_xalign.batch import Batch, collate
from megatron_xalign.config import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig, RunConfig, TrainingConfig
from megatron_xalign.config.tree import from_tree, to_tree
from megatron_xalign.errors import CheckpointError, XAlignError

VOCAB, LENGTH, STEPS, SAVED_AT = 203, 16, 6, 3
LANGUAGES, SOURCES = ("eng_Latn", "fin_Latn"), ("monolingual",)
# Three query heads to a key head, heads of 12, a vocabulary that is a multiple of nothing. 208 rows at tensor size 1
# and at 2, so that the losses of both are comparable.
MODEL: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 72, "ffn_hidden_size": 100, "num_attention_heads": 6, "num_query_groups": 2,
    "rotary_base": 5000, "make_vocab_size_divisible_by": 104, "init_method_std": 0.1,
}


def get_batch(numbers: list[int]) -> Batch:
    samples = []
    for number in numbers:
        rng = np.random.default_rng([5, number])
        tokens = np.minimum(rng.geometric(0.03, LENGTH + 1), VOCAB - 1)
        languages = (tokens % 2).astype(np.int8)
        samples.append({
            "tokens": tokens[:-1], "labels": tokens[1:], "position_ids": np.arange(LENGTH),
            "loss_mask": np.ones(LENGTH, np.float32), "language_ids": languages[:-1],
            "label_language_ids": languages[1:], "source_ids": np.zeros(LENGTH, np.int16),
            "document_ids": np.zeros(LENGTH, np.int32),
        })
    return collate(samples)


class Run:
    """A run on the layout of its config: built, perhaps loaded, trained, saved."""

    def __init__(
        self, folder: Path, ranks: topology.Ranks, config: RunConfig, vocab_size: int | None = None
    ) -> None:
        from megatron_xalign.training.model import build_model, padded_vocab_size
        from megatron_xalign.training.optimizer import build_optimizer

        self.folder, self.ranks, self.config = folder, ranks, config
        folder.mkdir(parents=True, exist_ok=True)
        dtype = config.params_dtype
        self.chunks = build_model(
            config.model,
            padded_vocab_size=padded_vocab_size(VOCAB, config.model.make_vocab_size_divisible_by, ranks.tensor_size),
            seq_length=LENGTH, parallel=config.parallel, params_dtype=dtype, recompute="none", ranks=ranks,
            # A resumed run starts from other weights, so that everything it has must come from the checkpoint.
            seed=config.seed, vocab_size=vocab_size,
        )
        self.optimizer = build_optimizer(
            self.chunks, config.optimizer, parallel=config.parallel, params_dtype=dtype, train_steps=STEPS
        )

    def save(self, step: int, losses: object = None, states: object = None) -> Path:
        from megatron_xalign.training.checkpoint import save_checkpoint

        extra = {
            "config": to_tree(self.config), "vocab_size": VOCAB, "tokenizer_sha256": "", "consumed_samples": step * 8
        }
        return save_checkpoint(
            self.folder, step, self.chunks, self.optimizer.megatron, self.optimizer.scheduler, self.ranks, extra
        )

    def load(self, checkpoint: Path) -> dict[str, Any]:
        from megatron_xalign.training.checkpoint import load_checkpoint

        return load_checkpoint(checkpoint, self.chunks, self.optimizer.megatron, self.optimizer.scheduler, self.ranks)

    def fit(self, start_step: int) -> list[dict[str, Any]]:
        from megatron_xalign.training.loop import fit

        metrics_path = self.folder / f"metrics-{start_step}.jsonl"
        fit(
            self.chunks, self.optimizer, get_batch, self.config.training, self.ranks, metrics_path=metrics_path,
            save=self.save, languages=LANGUAGES, source_names=SOURCES, start_step=start_step,
        )
        self.ranks.barrier()
        lines = [json.loads(line) for line in metrics_path.read_text(encoding="utf-8").splitlines()]
        return [{key: line[key] for key in ("step", "loss", "loss_by_language", "grad_norm", "lr")} for line in lines]

    def weights(self) -> str:
        digest = hashlib.sha256()
        for parameter in self.chunks[0].parameters():
            digest.update(parameter.detach().float().numpy().tobytes())
        return digest.hexdigest()


def configure(
    parallel: dict[str, Any] | None = None, model: dict[str, Any] | None = None, params_dtype: str = "fp32",
    seed: int = 1, lr: float = 3e-3,
) -> RunConfig:
    return RunConfig(
        seed=seed, model=from_tree(ModelConfig, MODEL | (model or {})),
        parallel=from_tree(ParallelConfig, {"distributed_timeout_seconds": 60, **(parallel or {})}),
        optimizer=OptimizerConfig(lr=lr, min_lr=3e-4, lr_warmup_steps=2), data=DataConfig(seq_length=LENGTH),
        training=from_tree(TrainingConfig, {
            "train_steps": STEPS, "global_batch_size": 8, "micro_batch_size": 2, "log_interval_steps": 1,
            "save_interval_steps": SAVED_AT,
        }),
        precision=params_dtype,  # type: ignore[arg-type]
    )


def train(folder: str, scenarios: list[dict[str, Any]]) -> dict[str, Any]:
    """Train each scenario from the start and, if asked, once more from its own or another's checkpoint."""
    return {scenario["name"]: _train(Path(folder), **scenario) for scenario in scenarios}


def _train(
    folder: Path, name: str, load: list[str] | None = None, resume: bool = False, **settings: Any
) -> dict[str, Any]:
    config = configure(**settings)
    result: dict[str, Any] = {}
    with topology.start(config.parallel, seed=config.seed) as ranks:
        if load is None:
            run = Run(folder / name, ranks, config)
            result["whole"] = {"metrics": run.fit(0), "weights": run.weights()}
            load = [name] if resume else []
        for source in load:
            run = Run(folder / f"{name}-from-{source}", ranks, configure(**(settings | {"seed": 99})))
            checkpoint = folder / source / f"step-{SAVED_AT:06d}"
            loaded = run.load(checkpoint)
            assert loaded["step"] == SAVED_AT and loaded["extra"]["consumed_samples"] == 8 * SAVED_AT
            # Saved again before another step: the same state must lie in the new folder.
            run.save(SAVED_AT)
            result[source] = {"metrics": run.fit(SAVED_AT), "weights": run.weights()}
    return result


def continued(folder: str, checkpoints: dict[str, str], parallel: dict[str, Any]) -> dict[str, list[float]]:
    """Losses of runs that start from imported weights."""
    from megatron_xalign.formats.checkpoint_folder import read_manifest
    from megatron_xalign.training.checkpoint import load_weights

    losses = {}
    base = configure(parallel)
    with topology.start(base.parallel, seed=1) as ranks:
        for name, checkpoint in checkpoints.items():
            model = read_manifest(Path(checkpoint))["extra"]["config"]["model"]
            # 203 ids in 208 rows: padding must have no probability, or the losses would differ.
            config = configure(parallel, model | {"make_vocab_size_divisible_by": 104})
            run = Run(Path(folder) / name, ranks, config, vocab_size=VOCAB)
            load_weights(checkpoint, run.chunks, ranks)
            losses[name] = [line["loss"] for line in run.fit(0)]
    return losses


def logits(checkpoints: list[str], out: str) -> None:
    """Megatron's logits of each checkpoint, rebuilt on one process."""
    from megatron_xalign.training.inference import load_for_inference

    tokens = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(2))
    result = {}
    for checkpoint in checkpoints:
        with load_for_inference(checkpoint) as logits_of:
            result[checkpoint] = torch.cat([logits_of(row[None]) for row in tokens])
    torch.save({"tokens": tokens, "logits": result}, out)


def hopeless(folder: str, good: str) -> dict[str, str]:
    """Everything that must fail on all processes together; what each of them said."""
    from megatron_xalign.training import checkpoint as module

    config, said = configure({"tensor_model_parallel_size": 2}), {}
    with topology.start(config.parallel, seed=1) as ranks:
        run = Run(Path(folder), ranks, config)

        def attempt(name: str, work: Any) -> None:
            try:
                work()
            except XAlignError as error:
                said[name] = f"{type(error).__name__}: {error}"
            ranks.barrier()

        write, describe = module.write_random_state, module.describe_file
        if ranks.rank == 1:
            module.write_random_state = _full_disk  # type: ignore[assignment]
        attempt("full disk", lambda: run.save(1))
        module.write_random_state = write
        if ranks.rank == 0:
            module.describe_file = _full_disk  # type: ignore[assignment]
        attempt("full disk later", lambda: run.save(1))
        module.describe_file = describe
        said["left"] = ", ".join(sorted(path.name for path in Path(folder).iterdir()))
        ranks.barrier()  # before the first process puts new folders there

        def copy(name: str) -> Path:
            path = Path(folder) / name
            if ranks.rank == 0:
                shutil.copytree(good, path)
            ranks.barrier()
            return path

        damaged = copy("damaged")
        if ranks.rank == 0:
            content = bytearray((damaged / "__1_0.distcp").read_bytes())
            content[len(content) // 2] ^= 1
            (damaged / "__1_0.distcp").write_bytes(content)
        ranks.barrier()
        attempt("one bit", lambda: run.load(damaged))
        malicious = copy("malicious")
        if ranks.rank == 0:
            _plant(malicious, Path(folder) / "ran")
        ranks.barrier()
        attempt("malicious", lambda: run.load(malicious))
        said["ran"] = str((Path(folder) / "ran").exists())
        said["before"] = run.weights()
        wider = configure({"tensor_model_parallel_size": 2}, {"ffn_hidden_size": 104})
        attempt("other model", lambda: Run(Path(folder), ranks, wider).load(Path(good)))
        faster = configure({"tensor_model_parallel_size": 2}, lr=5e-3)
        attempt("other schedule", lambda: Run(Path(folder), ranks, faster).load(Path(good)))
    return said


def _full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def _plant(folder: Path, ran: Path) -> None:
    """Put a program into the index, and make the manifest agree with it."""
    from megatron_xalign.formats.checkpoint_folder import describe_file

    index = pickle.loads((folder / ".metadata").read_bytes())
    index.planner_data = _Bomb(ran)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    manifest = json.loads((folder / "xalign.json").read_text())
    manifest["files"][".metadata"] = describe_file(folder / ".metadata")
    (folder / "xalign.json").write_text(json.dumps(manifest))


def behind(folder: str) -> dict[str, Any]:
    """Saves that go on while training does, against saves that do not; and with no room on one process's disk."""
    from megatron_xalign.training import checkpoint as module

    config, place, said = configure({"use_distributed_optimizer": True}), Path(folder), {}
    with topology.start(config.parallel, seed=1) as ranks:
        run = Run(place / "at-once", ranks, config)
        run.fit(0)

        def begin(where: str, step: int, **options: Any) -> module.UnfinishedSave:
            extra = {"config": {}, "vocab_size": VOCAB, "tokenizer_sha256": "", "consumed_samples": 0}
            return module.begin_save(
                place / where, step, run.chunks, run.optimizer.megatron, run.optimizer.scheduler, ranks, extra,
                **options,
            )

        unfinished = begin("behind", STEPS)
        exists_before = (place / "behind" / f"step-{STEPS:06d}").exists()
        with torch.no_grad():
            for parameter in run.chunks[0].parameters():
                parameter.add_(1.0)
            for state in run.optimizer.megatron.optimizer.state.values():
                state["exp_avg"].add_(1.0)
        unfinished.finish()
        begin("unhashed", 1, with_hashes=False).finish()
        run.load(place / "unhashed" / "step-000001")

        before = run.weights()
        for in_background in (False, True):
            if ranks.rank == 1:
                # The kernel's own refusal, in the middle of a file.
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            try:
                begin("behind", STEPS + 1, in_background=in_background).finish()
            except CheckpointError as error:
                said[f"no room, in background {in_background}"] = str(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
            ranks.barrier()
        said["left"] = ", ".join(sorted(path.name for path in (place / "behind").iterdir()))
        run.load(place / "behind" / f"step-{STEPS:06d}")
        return {"existed before": exists_before, "said": said, "changed": run.weights() != before}


def killed(folder: str, moment: str, in_background: bool = False) -> None:
    """Save step 1, then be killed in the middle of saving step 2."""
    from megatron_xalign.training import checkpoint as module

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    config = configure()
    with topology.start(config.parallel, seed=1) as ranks:
        run = Run(Path(folder), ranks, config)
        run.save(1)
        setattr(module, moment, die)
        if in_background:
            module.save_checkpoint = lambda *arguments: module.begin_save(*arguments).finish()  # type: ignore[assignment]
        run.save(2)


def after_kill(folders: list[str]) -> list[dict[str, Any]]:
    """What a restart finds in each folder, and what is there after its next save."""
    from megatron_xalign.training.checkpoint import latest_checkpoint

    config, found = configure(), []
    with topology.start(config.parallel, seed=1) as ranks:
        for folder in folders:
            before = sorted(path.name for path in Path(folder).iterdir())
            newest = latest_checkpoint(folder, ranks)
            assert newest is not None
            run = Run(Path(folder), ranks, config)
            step = run.load(newest)["step"]
            run.save(2)
            after = sorted(path.name for path in Path(folder).iterdir())
            found.append({"before": before, "step": step, "after": after})
        drawn = _draw()
        run.load(Path(folders[-1]) / "step-000002")
        found.append({"drawn": drawn, "drawn after loading": _draw()})
        try:
            run.load(Path(folders[0]) / "step-000077")
        except CheckpointError as error:
            found.append({"missing": str(error)})
    return found


def _draw() -> list[float]:
    """One number of every generator that a checkpoint keeps."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        of_megatron = torch.rand(1).item()
    return [torch.rand(1).item(), of_megatron, float(np.random.random()), random.random()]
