from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_xalign.errors import FormatError
from megatron_xalign.formats.neuron_stats import (
    ARRAYS,
    PROBE_ARRAYS,
    Shard,
    StatsIndex,
    begin_neuron_stats,
    finish_neuron_stats,
    list_neuron_stats,
    read_neuron_stats,
    stats_folder,
    write_shard,
)

# Pair "b" lacks its Finnish sentence and the Finnish of "c" comes first: alignment must go by pair id.
INDEX = StatsIndex(
    run_name="test", step=7, consumed_tokens=700, languages=("eng_Latn", "fin_Latn"), num_layers=4, ffn_hidden_size=6,
    hidden_size=5, document_ids=("a1", "a2", "b1", "c2", "c1"),
    document_languages=("eng_Latn", "fin_Latn", "eng_Latn", "fin_Latn", "eng_Latn"),
    document_pairs=("a", "a", "b", "c", "c"), probe_sha256="0" * 64, pooling="mean", counted_tokens="all",
    stream_first_step=1, stream_last_step=7, stream_interval_steps=1,
    stream_residual=True, stream_attention=True,
)
SIZES = {"D": 5, "K": 2, "L": 4, "F": 6, "M": 5, "H": 5}


def whole_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        name: rng.normal(0, 100, [SIZES[axis] for axis in axes]).astype(dtype) for name, (axes, dtype) in ARRAYS.items()
    }


def write(folder: Path, index: StatsIndex = INDEX, names: tuple[str, ...] = tuple(ARRAYS)) -> dict[str, np.ndarray]:
    """Two tensor ranks by two interleaved pipeline ranks, layers 0, 2 and 1, 3; hidden columns split 2 + 3."""
    whole = whole_arrays()
    begin_neuron_stats(folder)
    entries = []
    for tensor_rank, neurons, columns in ((0, (0, 3), (0, 2)), (1, (3, 6), (2, 5))):
        for pipeline_rank, layers, rows in ((0, (0, 2), (0, 1, 3)), (1, (1, 3), (2, 4))):
            held = {"L": layers, "F": range(*neurons), "M": rows, "H": range(*columns)}
            arrays = {}
            for name in names:
                axes = ARRAYS[name][0]
                if set(axes) & set(held) or (tensor_rank, pipeline_rank) == (0, 1):
                    arrays[name] = whole[name][np.ix_(*(list(held.get(axis, range(SIZES[axis]))) for axis in axes))]
            entries.append(
                write_shard(
                    folder,
                    Shard(
                        tensor_rank=tensor_rank, pipeline_rank=pipeline_rank, layers=layers, neurons=neurons,
                        residual_rows=rows, residual_columns=columns, arrays=arrays,
                    ),
                )
            )
    finish_neuron_stats(folder, index, entries)
    return whole


def test_shards_join_to_the_whole_arrays(tmp_path: Path) -> None:
    whole = write(tmp_path / "step-000007")
    stats = read_neuron_stats(tmp_path / "step-000007")
    assert stats.index == INDEX
    for name, array in whole.items():
        read = getattr(stats, name)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)


def test_one_layer_is_read_alone_and_minus_one_is_the_embedding_output(tmp_path: Path) -> None:
    whole = write(tmp_path / "step-000007")
    stats = read_neuron_stats(tmp_path / "step-000007")
    np.testing.assert_array_equal(stats.layer("probe_neuron_mean_DLF", 2), whole["probe_neuron_mean_DLF"][:, 2])
    np.testing.assert_array_equal(stats.layer("stream_max_KLF", 3), whole["stream_max_KLF"][:, 3])
    residual = whole["probe_residual_mean_DMH"]
    np.testing.assert_array_equal(stats.layer("probe_residual_mean_DMH", -1), residual[:, 0])
    assert stats.probe_residual_mean_DMH.shape == residual.shape
    np.testing.assert_array_equal(stats.layer("probe_residual_mean_DMH", 3), residual[:, 4])
    for layer in (-1, 4):
        with pytest.raises(ValueError, match="has no layer"):
            stats.layer("probe_neuron_mean_DLF", layer)


def test_some_layers_alone_are_joined_and_read_by_their_global_numbers(tmp_path: Path) -> None:
    """Of 9 layers 1, 4, 5 and 8 are captured: places 0, 2 of the axis on one pipeline rank, 1, 3 on the other."""
    index = dataclasses.replace(INDEX, num_layers=9, layers=(1, 4, 5, 8))
    whole = whole_arrays()
    folder = tmp_path / "step-000007"
    begin_neuron_stats(folder)
    entries = []
    for pipeline_rank, layers, rows, places in ((0, (1, 5), (0, 2, 6), (0, 2)), (1, (4, 8), (5, 9), (1, 3))):
        held = {"L": places, "M": [0, *(p + 1 for p in places)] if pipeline_rank == 0 else [p + 1 for p in places]}
        arrays = {
            name: whole[name][np.ix_(*(list(held.get(axis, range(SIZES[axis]))) for axis in axes))]
            for name, (axes, _) in ARRAYS.items()
            if set(axes) & {"L", "M"} or pipeline_rank == 0
        }
        entries.append(write_shard(folder, Shard(
            tensor_rank=0, pipeline_rank=pipeline_rank, layers=layers, neurons=(0, 6), residual_rows=rows,
            residual_columns=(0, 5), arrays=arrays,
        )))
    finish_neuron_stats(folder, index, entries)
    stats = read_neuron_stats(folder)
    assert (stats.layers, stats.num_layers) == ([1, 4, 5, 8], 9)
    for name, array in whole.items():
        np.testing.assert_array_equal(getattr(stats, name), array)
    stats = read_neuron_stats(folder)
    np.testing.assert_array_equal(stats.layer("stream_sum_KLF", 5), whole["stream_sum_KLF"][:, 2])
    np.testing.assert_array_equal(stats.layer("probe_residual_mean_DMH", 8), whole["probe_residual_mean_DMH"][:, 4])
    np.testing.assert_array_equal(stats.layer("probe_residual_mean_DMH", -1), whole["probe_residual_mean_DMH"][:, 0])
    with pytest.raises(ValueError, match="has no layer 2; the model has 9 layers, of which 4"):
        stats.layer("stream_sum_KLF", 2)
    for wrong in ((4, 1), (1, 9), (1, 1)):
        with pytest.raises(ValueError, match="not in order, or not among"):
            dataclasses.replace(index, layers=wrong)


def test_languages_are_aligned_by_pair_id_and_incomplete_pairs_left_out(tmp_path: Path) -> None:
    whole = write(tmp_path / "step-000007")
    stats = read_neuron_stats(tmp_path / "step-000007")
    assert stats.pair_ids == ["a", "c"]
    np.testing.assert_array_equal(stats.probe_neurons("eng_Latn"), whole["probe_neuron_mean_DLF"][[0, 4]])
    np.testing.assert_array_equal(stats.probe_residual("fin_Latn"), whole["probe_residual_mean_DMH"][[1, 3]])
    assert stats.document_language_ids.tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="deu_Latn"):
        stats.rows("deu_Latn")


def test_a_folder_without_stream_sums_reads_and_says_so(tmp_path: Path) -> None:
    index = dataclasses.replace(INDEX, stream_first_step=None, stream_last_step=None, stream_interval_steps=None)
    whole = write(tmp_path / "step-000000", index, PROBE_ARRAYS)
    stats = read_neuron_stats(tmp_path / "step-000000")
    assert stats.has_probe and not stats.has_stream
    np.testing.assert_array_equal(stats.probe_nll_D, whole["probe_nll_D"])
    with pytest.raises(FormatError, match="without sums from training batches"):
        _ = stats.stream_sum_KLF


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "step-000007"
    write(folder)
    shard = folder / "shard-tp1-pp0.safetensors"
    content = shard.read_bytes()
    if damage == "truncated":
        shard.write_bytes(content[:-1])
    elif damage == "changed":
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        shard.unlink()
    with pytest.raises(FormatError, match=r"shard-tp1-pp0\.safetensors"):
        read_neuron_stats(folder)


@pytest.mark.parametrize("fault", ["lost", "listed twice"])
def test_a_hole_and_an_overlap_between_shards_are_found(tmp_path: Path, fault: str) -> None:
    folder = tmp_path / "step-000007"
    write(folder)
    index = json.loads((folder / "index.json").read_text())
    if fault == "lost":
        index["shards"] = [entry for entry in index["shards"] if entry["file"] != "shard-tp1-pp0.safetensors"]
    else:
        index["shards"].append(next(entry for entry in index["shards"] if entry["file"] == "shard-tp1-pp0.safetensors"))
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"layer 0, neuron 3 is in (no shard|2 shards)"):
        read_neuron_stats(folder)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "step-000007"
    write(folder)
    path = folder / "index.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(FormatError, match="99"):
        read_neuron_stats(folder)


def test_a_shard_that_the_writer_of_the_index_cannot_see_stops_it(tmp_path: Path) -> None:
    folder = tmp_path / "step-000007"
    begin_neuron_stats(folder)
    entry = write_shard(
        folder,
        Shard(
            tensor_rank=0, pipeline_rank=0, layers=(), neurons=(0, 0), residual_rows=(),
            residual_columns=(0, 0), arrays={},
        ),
    )
    with pytest.raises(FormatError, match="share"):
        finish_neuron_stats(folder, INDEX, [entry, dataclasses.replace(entry, file="shard-tp1-pp0.safetensors")])
    assert not folder.exists()


def test_only_finished_folders_are_listed_in_step_order(tmp_path: Path) -> None:
    for step in (100, 7, 1_000_000):
        write(stats_folder(tmp_path, step))
    begin_neuron_stats(stats_folder(tmp_path, 200))
    (tmp_path / "neurons" / "step-000300").mkdir()
    assert [step for step, _ in list_neuron_stats(tmp_path)] == [7, 100, 1_000_000]
    assert list_neuron_stats(tmp_path / "nothing here") == []


def test_arrays_that_do_not_fit_the_shard_are_refused(tmp_path: Path) -> None:
    begin_neuron_stats(tmp_path / "step-000007")
    shard = Shard(
        tensor_rank=0, pipeline_rank=0, layers=(0,), neurons=(0, 3), residual_rows=(), residual_columns=(0, 0),
        arrays={"stream_sum_KLF": np.zeros((2, 1, 4))},
    )
    with pytest.raises(ValueError, match="4 entries along F"):
        write_shard(tmp_path / "step-000007", shard)
