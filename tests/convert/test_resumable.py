"""Conversions that are killed, that run out of disk, and that meet somebody else's files: whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_checkpoint import checkpoint_of, random_transformers_model, run_config
from safetensors.torch import load_file, save_file
from test_to_hf import assert_same_model, load

from megatron_xalign.convert.from_hf import from_hf
from megatron_xalign.convert.to_hf import to_hf
from megatron_xalign.errors import CheckpointError, ConfigError
from megatron_xalign.formats.checkpoint import CheckpointReader
from megatron_xalign.formats.checkpoint_folder import check_whole

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_xalign.formats import resumable
from megatron_xalign.convert import {module}
from megatron_xalign.formats import checkpoint_writer
from megatron_xalign.convert import stream

original, left = resumable.piece, [{whole}]

def piece(path):
    if path.suffix not in (".safetensors", ".distcp"):
        return original(path)
    left[0] -= 1
    if left[0] < 0:
        # In the middle of the next file.
        Path(str(path) + ".part").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    return original(path)

stream.piece = checkpoint_writer.piece = piece
{call}
"""


def killed(module: str, call: str, whole: int) -> None:
    """Run a conversion that gets SIGKILL when it has written so many files whole and half of another."""
    code = KILLED.format(module=module, call=call, whole=whole)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """A model, a checkpoint of it and its Hugging Face folder."""
    folder, config = tmp_path_factory.mktemp("llama"), run_config()
    model = random_transformers_model(config)
    model.save_pretrained(str(folder / "hf"))
    return model, checkpoint_of(folder / "c", model, config), folder / "hf"


def test_a_killed_export_keeps_its_whole_files_and_the_same_call_ends_it(
    llama: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "hf"
    killed("to_hf", f"to_hf.to_hf({str(llama[1])!r}, {str(out)!r}, max_shard_size='100KB')", whole=2)
    assert not out.exists()
    work = tmp_path / ".hf.converting"
    kept = sorted(work.glob("*.safetensors"))
    assert len(kept) == 2 and len(list(work.glob("*.part"))) == 1
    before = [(path.stat().st_ino, path.stat().st_mtime_ns) for path in kept]
    to_hf(llama[1], out, max_shard_size="100KB")
    after = [((out / path.name).stat().st_ino, (out / path.name).stat().st_mtime_ns) for path in kept]
    assert before == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"] and not list(out.glob("*.part"))
    assert not (out / "plan.json").exists()
    assert_same_model(load(out), llama[0])


def test_files_of_another_conversion_are_not_kept(llama: tuple[Any, Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "hf"
    killed("to_hf", f"to_hf.to_hf({str(llama[1])!r}, {str(out)!r}, max_shard_size='100KB')", whole=2)
    other = random_transformers_model(run_config(), seed=5)
    to_hf(checkpoint_of(tmp_path / "c", other, run_config()), out, max_shard_size="100KB")
    assert_same_model(load(out), other)


def test_a_killed_import_keeps_its_whole_files_and_the_same_call_ends_it(
    llama: tuple[Any, Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "checkpoint"
    killed("from_hf", f"from_hf.from_hf({str(llama[2])!r}, {str(out)!r}, file_bytes=50_000)", whole=2)
    assert not out.exists()
    kept = sorted((tmp_path / ".checkpoint.converting").glob("*.distcp"))
    before = [path.stat().st_ino for path in kept]
    assert len(kept) == 2
    from_hf(llama[2], out, file_bytes=50_000)
    assert [(out / path.name).stat().st_ino for path in kept] == before
    assert len(list(out.glob("*.distcp"))) > 3
    # Every file is listed with the hash that it has, and nothing else is there.
    assert set(check_whole(out)["files"]) == {path.name for path in out.iterdir()} - {"xalign.json"}
    whole = CheckpointReader(from_hf(llama[2], tmp_path / "undisturbed"))
    for name in whole.names():
        assert torch.equal(CheckpointReader(out).tensor(name), whole.tensor(name)), name


@pytest.mark.parametrize("direction", ["to-hf", "from-hf"])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    llama: tuple[Any, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    real = os.fsync

    def full(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 200_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device"):
        if direction == "to-hf":
            to_hf(llama[1], tmp_path / "out")
        else:
            from_hf(llama[2], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_into_one_folder_are_refused(llama: tuple[Any, Path, Path], tmp_path: Path) -> None:
    from megatron_xalign.formats.resumable import resumable_folder

    with resumable_folder(tmp_path / "hf", "other"), pytest.raises(ConfigError, match="by another process"):
        to_hf(llama[1], tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(file: Path, header: dict[str, Any], numbers: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + numbers)


def test_safetensors_whose_header_lies_are_refused(llama: tuple[Any, Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "hf" / "model.safetensors"
    file.parent.mkdir()
    (tmp_path / "hf" / "config.json").write_bytes((llama[2] / "config.json").read_bytes())
    whole, numbers = header_of(llama[2] / "model.safetensors")
    name = "model.norm.weight"
    start, stop = whole[name]["data_offsets"]
    for changed in (
        {"data_offsets": [start - 288, stop - 288]}, {"data_offsets": [start, stop + 4]}, {"dtype": "F8_E4M3"},
        {"shape": [-72]}, {"shape": [10**12]}, {"data_offsets": [10**15, 10**15 + 288]},
    ):
        with_header(file, whole | {name: whole[name] | changed}, numbers)
        with pytest.raises(CheckpointError, match="missing or damaged"):
            from_hf(tmp_path / "hf", tmp_path / "out")
    for content in (b"", b"\xff" * 8, struct.pack("<Q", 10**12) + b"{}", struct.pack("<Q", 2) + b"[]"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="missing or damaged"):
            from_hf(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "x.bin"])
def test_an_index_cannot_name_files_elsewhere_or_pickles(
    llama: tuple[Any, Path, Path], tmp_path: Path, name: str
) -> None:
    (tmp_path / "config.json").write_bytes((llama[2] / "config.json").read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match="not a file inside the folder"):
        from_hf(tmp_path, tmp_path / "out")


def test_a_shard_that_is_missing_is_named(llama: tuple[Any, Path, Path], tmp_path: Path) -> None:
    folder = to_hf(llama[1], tmp_path / "hf", max_shard_size="100KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        from_hf(folder, tmp_path / "out")


def test_code_of_a_folder_is_not_run(llama: tuple[Any, Path, Path], tmp_path: Path) -> None:
    tensors = load_file(llama[2] / "model.safetensors")
    (tmp_path / "hf").mkdir()
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((llama[2] / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(settings))
    (tmp_path / "hf" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(CheckpointError, match="not a config transformers can read"):
        from_hf(tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


MEMORY = """
from pathlib import Path
from megatron_xalign.convert.to_hf import to_hf
from megatron_xalign.convert.from_hf import from_hf
{work}
for line in Path("/proc/self/status").read_text().splitlines():
    if line.startswith("VmHWM"):
        print(line.split()[1])
"""


def peak_bytes(work: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.format(work=work)], cwd=ROOT, capture_output=True, timeout=500, check=True,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "XALIGN_PROGRESS": "0"},
    )
    return int(done.stdout.split()[-1]) * 1024


def test_memory_is_bounded_by_the_largest_tensor_not_by_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from made_checkpoints import write_hollow

    from megatron_xalign.config import DataConfig, ModelConfig, RunConfig

    # The largest tensor has 3 MB.
    model = ModelConfig(num_layers=24, hidden_size=512, ffn_hidden_size=1408, num_attention_heads=8)
    config = RunConfig(model=model, data=DataConfig(seq_length=64))
    num_bytes = write_hollow(tmp_path / "c", config, 2000, 2048, torch.bfloat16)
    assert num_bytes > 150_000_000
    imports = "from transformers import AutoConfig, LlamaConfig"
    for before, work in (
        ("", f"to_hf({str(tmp_path / 'c')!r}, {str(tmp_path / 'hf')!r})"),
        (imports, f"from_hf({str(tmp_path / 'hf')!r}, {str(tmp_path / 'back')!r})"),
    ):
        # Three of the largest, and what libraries load as they are used.
        assert peak_bytes(work) < peak_bytes(before) + 3 * 3_000_000 + 50_000_000
