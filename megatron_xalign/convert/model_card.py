"""The README.md of a converted model: where it comes from, what it was trained on, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_xalign.config import RunConfig, to_yaml
from megatron_xalign.formats.atomic import read_json

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}, step {step}

`{architecture}` with {num_layers} layers of width {hidden_size} ({ffn_hidden_size} neurons each), a vocabulary of
{vocab_size} tokens and sequences of {seq_length} tokens, stored as {dtype}. Trained with Megatron-Core
{megatron_core} and converted by megatron_xalign {version} from `{checkpoint}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

Documents were separated by the end-of-document token, which is `eos` here; there is no `bos`. It is a base model: it
continues text and follows no instructions.

## Training data

{tokens:,} tokens in {steps} of {train_steps} steps. {mixture}
{sources}
## Configuration

```yaml
{config}```
"""


def model_card(
    checkpoint: Path, manifest: dict[str, Any], config: RunConfig, architecture: str, dtype: str
) -> str:
    """Markdown that describes a converted model.

    The mixture is the audited one if the checkpoint still lies in its run folder, else the one asked for.
    """
    audit_path = checkpoint.resolve().parent.parent / "audit.json"
    audit = read_json(audit_path) if audit_path.is_file() else None
    step = manifest["step"]
    return _CARD.format(
        name=config.name, step=step, architecture=architecture, num_layers=config.model.num_layers,
        hidden_size=config.model.hidden_size, ffn_hidden_size=config.model.ffn_hidden_size,
        vocab_size=manifest["extra"]["vocab_size"], seq_length=config.data.seq_length, dtype=dtype,
        megatron_core=manifest["versions"]["megatron_core"], version=manifest["versions"]["megatron_xalign"],
        checkpoint=f"{checkpoint.resolve().parent.parent.name}/checkpoints/{checkpoint.resolve().name}", folder=".",
        tokens=step * config.training.global_batch_size * config.data.seq_length, steps=step,
        train_steps=config.training.train_steps, mixture=_mixture(config, audit), sources=_sources(audit),
        config=to_yaml(config),
    )


def _mixture(config: RunConfig, audit: dict[str, Any] | None) -> str:
    asked = config.data.mixture.parallel_fraction
    sentence = f"Asked for: {asked:.2%} of them from parallel documents ({config.data.mixture.fraction_of} tokens)"
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
