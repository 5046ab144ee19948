"""Reading torch_dist folders: what torch's own writer wrote, any chunks, and folders that are damaged or malicious."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch_dist_folder import stacked, write_torch_dist

from megatron_xalign.errors import CheckpointError
from megatron_xalign.formats.checkpoint import CheckpointReader

LAYERS = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(0))


def test_tensors_read_as_torchs_own_writer_wrote_them(tmp_path: Path) -> None:
    from torch.distributed import checkpoint

    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.tensor(3)}
    checkpoint.save(dict(state), checkpoint_id=str(tmp_path / "x"), no_dist=True)
    reader = CheckpointReader(tmp_path / "x")
    assert reader.names() == ["a", "b", "c"]
    for name, tensor in state.items():
        assert reader.shape(name) == tuple(tensor.shape)
        assert torch.equal(reader.tensor(name), tensor)
        assert reader.tensor(name).dtype == reader.dtype(name) == tensor.dtype


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("axis", [0, 1])
def test_layers_are_put_together_from_chunks_of_any_tensor_parallel_size(
    tmp_path: Path, pieces: int, axis: int
) -> None:
    write_torch_dist(tmp_path, {"decoder.layers.w": stacked(LAYERS, pieces, axis)})
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.tensor("decoder.layers.w"), LAYERS)
    for layer in range(3):
        assert torch.equal(reader.tensor("decoder.layers.w", layer), LAYERS[layer])


def test_numbered_layers_read_like_stacked_ones(tmp_path: Path) -> None:
    whole = (10, 4)
    chunks = [[((0, 0), layer[:6]), ((6, 0), layer[6:])] for layer in LAYERS]
    write_torch_dist(tmp_path, {f"decoder.layers.{i}.w": (whole, chunks[i]) for i in range(3)})
    reader = CheckpointReader(tmp_path)
    assert reader.names() == ["decoder.layers.w"]
    assert reader.shape("decoder.layers.w") == (3, 10, 4)
    assert torch.equal(reader.tensor("decoder.layers.w", 2), LAYERS[2])


def test_asking_for_what_is_not_there_is_a_misuse(tmp_path: Path) -> None:
    write_torch_dist(tmp_path, {"w": stacked(LAYERS)})
    with pytest.raises(ValueError, match="no tensor v"):
        CheckpointReader(tmp_path).tensor("v")
    with pytest.raises(ValueError, match="no layer 3"):
        CheckpointReader(tmp_path).tensor("w", 3)


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_malicious_index_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"asks for posix.mkdir"):
        CheckpointReader(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("module_and_name", ["builtins\neval", "torch\nload", "torch.serialization\nload"])
def test_an_index_cannot_reach_functions_through_allowed_modules(tmp_path: Path, module_and_name: str) -> None:
    (tmp_path / ".metadata").write_bytes(f"c{module_and_name}\n(S'x'\ntR.".encode())
    with pytest.raises(CheckpointError, match="asks for"):
        CheckpointReader(tmp_path)


def test_a_malicious_chunk_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    metadata = write_torch_dist(tmp_path, {"w": ((3,), [((0,), torch.ones(3))])}, num_files=1)
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "__0_0.distcp")
    next(iter(metadata.storage_data.values())).length = (tmp_path / "__0_0.distcp").stat().st_size
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"__0_0.distcp.*more than tensors"):
        CheckpointReader(tmp_path).tensor("w")
    assert not (tmp_path / "ran").exists()


def test_a_malicious_common_state_is_found_before_anyone_loads_it(tmp_path: Path) -> None:
    write_torch_dist(tmp_path, {"w": stacked(LAYERS)})
    torch.save({"step": 1}, tmp_path / "common.pt")
    CheckpointReader(tmp_path).check_plain()
    torch.save({"step": Bomb(tmp_path / "ran")}, tmp_path / "common.pt")
    with pytest.raises(CheckpointError, match=r"common.pt"):
        CheckpointReader(tmp_path).check_plain()
    assert not (tmp_path / "ran").exists()


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_torch_dist(tmp_path, {"w": stacked(LAYERS)})
    os.truncate(tmp_path / "__1_0.distcp", (tmp_path / "__1_0.distcp").stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"__1_0.distcp is truncated"):
        CheckpointReader(tmp_path).tensor("w")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_torch_dist(tmp_path, {"w": stacked(LAYERS)})
    (tmp_path / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__1_0.distcp is missing"):
        CheckpointReader(tmp_path).tensor("w")


def test_overwritten_bytes_are_found(tmp_path: Path) -> None:
    write_torch_dist(tmp_path, {"w": ((3,), [((0,), torch.ones(3))])}, num_files=1)
    file = tmp_path / "__0_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp.*damaged"):
        CheckpointReader(tmp_path).tensor("w")


def test_a_chunk_of_another_shape_than_announced_is_found(tmp_path: Path) -> None:
    metadata = write_torch_dist(tmp_path, {"w": ((3,), [((0,), torch.ones(3))])})
    metadata.state_dict_metadata["w"].size = torch.Size([4])
    metadata.state_dict_metadata["w"].chunks[0].sizes = torch.Size([4])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"not the torch.float32 tensor of shape \[4\]"):
        CheckpointReader(tmp_path).tensor("w")


@pytest.mark.parametrize("rows", [range(2), (0, 1, 1)])
def test_chunks_that_leave_a_hole_or_overlap_are_found(tmp_path: Path, rows: object) -> None:
    write_torch_dist(tmp_path, {"w": ((3, 2), [((row, 0), torch.ones(1, 2)) for row in rows])})  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="do not cover"):
        CheckpointReader(tmp_path).tensor("w")


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/b", ".."])
def test_an_index_cannot_point_outside_its_folder(tmp_path: Path, path: str) -> None:
    metadata = write_torch_dist(tmp_path, {"w": stacked(LAYERS)})
    next(iter(metadata.storage_data.values())).relative_path = path
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="not a file inside the folder"):
        CheckpointReader(tmp_path)


def test_half_an_index_is_an_error_at_every_length(tmp_path: Path) -> None:
    write_torch_dist(tmp_path, {"w": ((3,), [((0,), torch.ones(3))])})
    content = (tmp_path / ".metadata").read_bytes()
    for length in range(0, len(content), 7):
        (tmp_path / ".metadata").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"\.metadata"):
            CheckpointReader(tmp_path)


def test_any_flipped_byte_of_an_index_is_an_error_or_harmless(tmp_path: Path) -> None:
    write_torch_dist(tmp_path, {"w": ((3,), [((0,), torch.ones(3))])})
    content = bytearray((tmp_path / ".metadata").read_bytes())
    for place in range(0, len(content), 3):
        changed = bytearray(content)
        changed[place] ^= 0x5A
        (tmp_path / ".metadata").write_bytes(changed)
        try:
            reader = CheckpointReader(tmp_path)
            for name in reader.names():
                reader.tensor(name)
        except CheckpointError:
            pass


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a torch_dist checkpoint"):
        CheckpointReader(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        CheckpointReader(tmp_path / "missing")
