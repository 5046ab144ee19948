"""The README.md of a converted model: where it comes from, what it was trained on, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_xalign import __version__
from megatron_xalign.config import RunConfig
from megatron_xalign.config.tree import to_yaml
from megatron_xalign.convert.source import Source
from megatron_xalign.formats.atomic import read_json

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}, step {step}

`{architecture}` with {num_layers} layers of width {hidden_size} ({ffn_hidden_size} neurons each), a vocabulary of
{vocab_size} tokens and sequences of {seq_length} tokens, stored as {dtype}. Trained with Megatron-Core
({trained_with}) and converted by megatron_xalign {version} from `{checkpoint}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

{special} It is a base model: it continues text and follows no instructions.

## Training data

{tokens:,} tokens in {steps} steps. {mixture}
{sources}
## Configuration

```yaml
{config}```
"""


def model_card(source: Source, dtype: str) -> str:
    """Markdown that describes a converted model.

    The mixture is the audited one if the checkpoint still lies in its run folder, else the one asked for.
    """
    config = source.config
    audit = _read_if_there(_run_folder(source) / "audit.json")
    return _CARD.format(
        name=config.name, step=source.step, architecture=source.architecture, num_layers=config.model.num_layers,
        hidden_size=config.model.hidden_size, ffn_hidden_size=config.model.ffn_hidden_size,
        vocab_size=source.vocab_size, seq_length=config.data.seq_length, dtype=dtype,
        trained_with=source.trained_with, version=__version__,
        checkpoint=f"{_run_folder(source).name}/checkpoints/{source.folder.resolve().name}", folder=".",
        special=_special(source.special_ids), tokens=source.consumed_tokens, steps=source.step,
        mixture=_mixture(config, audit), sources=_sources(audit), config=to_yaml(config),
    )


def run_files(source: Source) -> dict[str, Any]:
    """What the run's folder tells of the run, as files of the converted model: facts, audited mixture, token files.

    Only what still lies where the checkpoint and its config say.
    """
    run = _run_folder(source)
    found = {f"xalign-{name}.json": _read_if_there(run / f"{name}.json") for name in ("run", "audit")}
    manifests = {
        Path(item.prefix).name: content
        for item in source.config.data.sources
        if (content := _read_if_there(Path(f"{item.prefix}.manifest.json"))) is not None
    }
    return {name: content for name, content in found.items() if content is not None} | (
        {"xalign-data.json": manifests} if manifests else {}
    )


def _run_folder(source: Source) -> Path:
    return source.folder.resolve().parent.parent


def _read_if_there(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _special(special_ids: dict[str, Any]) -> str:
    named = [f"`{role}` is {value}" for role, value in special_ids.items() if value is not None]
    if not named:
        return "No tokenizer came with it."
    return f"Of the special tokens {', '.join(named)}; documents were separated by the end-of-document token (`eos`)."


def _mixture(config: RunConfig, audit: dict[str, Any] | None) -> str:
    mixture, average = config.data.mixture, " on average" if config.data.mixture.schedule else ""
    asked = f"{config.parallel_fraction:.2%} of them{average}"
    sentence = f"Asked for: {asked} from parallel documents ({mixture.fraction_of} tokens)"
    achieved = (audit or {}).get("achieved", {}).get("parallel_fraction")
    return f"{sentence}." if achieved is None else f"{sentence}; audited over the whole run: {achieved:.2%}."


def _sources(audit: dict[str, Any] | None) -> str:
    if not audit or not audit.get("sources"):
        return ""
    lines = ["", "| source | origin | languages | tokens | times seen |", "|---|---|---|---:|---:|"]
    for source in audit["sources"]:
        languages = ", ".join(source.get("languages", []))
        lines.append(
            f"| {source['name']} | {source['origin']} | {languages} | {source['tokens']:,} | {source['repeats']:.2f} |"
        )
    return "\n".join([*lines, ""])
