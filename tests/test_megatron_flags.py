"""Launch scripts in the style of Megatron-LM's examples, and the table the docs print."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_xalign.cli import main
from megatron_xalign.config import RunConfig, read_config
from megatron_xalign.config.tree import from_tree
from megatron_xalign.errors import ConfigError
from megatron_xalign.megatron_flags import FLAGS, IMPLIED, flag_table, settings_of, translate

DOCS = Path(__file__).resolve().parents[1] / "docs" / "megatron-lm-flags.md"
ARRAYS = r"""#!/bin/bash
# Llama-style, 8 GPUs
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8
NUM_NODES=${NUM_NODES:-4}
MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)
TP=2; PP=2
GBS=$((16 * NUM_NODES))
CHECKPOINT_PATH=$1

DISTRIBUTED_ARGS=(--nproc_per_node $GPUS_PER_NODE --nnodes $NUM_NODES --master_addr $MASTER_ADDR)
MODEL_ARGS=(
    --num-layers 24        # depth
    --hidden-size 2048
    --num-attention-heads 16
    --num-query-groups 4 --group-query-attention
    --seq-length 4096 --max-position-embeddings 4096
    --position-embedding-type rope --rotary-base 500000
    --normalization RMSNorm --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0.0 --hidden-dropout 0.0
    --use-mcore-models
)
TRAINING_ARGS=(
    --micro-batch-size 1
    --global-batch-size ${GBS}
    --train-samples 6400
    --lr-warmup-samples 640
    --lr 3.0e-4 --min-lr 3e-5 --lr-decay-style cosine
    --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
    --bf16
    --exotic-thing 7
)
MODEL_PARALLEL_ARGS=(--tensor-model-parallel-size $TP --pipeline-model-parallel-size $PP --sequence-parallel
                     --use-distributed-optimizer)
DATA_ARGS=(--data-path 0.7 /data/en_text_document 0.3 /data/fi_text_document
           --tokenizer-type HuggingFaceTokenizer --tokenizer-model /data/tok --split 99,1,0)
LOG_ARGS=(--save-interval 500 --eval-interval 250 --save "$CHECKPOINT_PATH" --log-interval 10
          --wandb-project ${WANDB_PROJECT:-"study"})

torchrun ${DISTRIBUTED_ARGS[@]} pretrain_gpt.py \
    ${MODEL_ARGS[@]} \
    ${TRAINING_ARGS[@]} \
    "${MODEL_PARALLEL_ARGS[@]}" \
    ${DATA_ARGS[@]} ${LOG_ARGS[@]} 2>&1 | tee log.txt
"""
STRINGS = r"""
GPT_ARGS="
    --num-layers 12 \
    --hidden-size 768 \
    --num-attention-heads 12 \
    --seq-length 1024 \
    --micro-batch-size 4 --global-batch-size 8 \
    --lr 0.00015 --train-iters 500000 --lr-decay-iters 320000 --lr-warmup-fraction .01 \
    --fp16
"
CMD="pretrain_gpt.py $GPT_ARGS --data-path my-gpt2_text_document --vocab-file gpt2-vocab.json"
srun -l bash -c "torchrun --nproc-per-node 1 $CMD"
"""


@pytest.mark.parametrize(
    ("given", "split"), [("99,1,0", "99,1,0"), ("'99,1,0'", "99,1,0"), ("90,10", "90,10,0"), ("100", "100,0,0")]
)
def test_proportions_are_read_as_megatron_reads_them(given: str, split: str) -> None:
    words = f"torchrun pretrain_gpt.py --num-layers 2 --hidden-size 8 --num-attention-heads 1 --split \"{given}\""
    assert translate(words).tree["data"]["split"] == split


def test_arrays_and_arithmetic_become_settings() -> None:
    done = translate(ARRAYS, {"1": "runs/llama"})
    tree = done.tree
    assert tree["model"] == {
        "num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "num_query_groups": 4,
        "rotary_base": 500_000, "untie_embeddings_and_output_weights": True,
        # 8/3 of 2048 in steps of 64.
        "ffn_hidden_size": 5440,
    }
    assert tree["parallel"] == {
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True,
        "use_distributed_optimizer": True, "distributed_timeout_seconds": 600,
    }
    assert tree["optimizer"] | {"adam_beta2": 0.95, "lr_decay_style": "cosine"} == tree["optimizer"]
    # 64 a batch: 6400 samples are 100 steps, of which 10 warm up.
    assert (tree["training"]["train_steps"], tree["training"]["global_batch_size"]) == (100, 64)
    assert tree["optimizer"]["lr_warmup_steps"] == 10
    assert (tree["logging"]["wandb_project"], tree["data"]["split"]) == ("study", "99,1,0")
    assert [source["prefix"] for source in tree["data"]["sources"]] == [
        "/data/en_text_document", "/data/fi_text_document"
    ]
    assert done.processes == "8 x 4"
    config = from_tree(RunConfig, tree)
    assert config.training.save_interval_steps == 500


def test_megatron_s_defaults_are_written_where_ours_are_others() -> None:
    tree = translate(STRINGS).tree
    assert tree["optimizer"]["adam_beta2"] == 0.999
    assert tree["optimizer"]["lr_decay_style"] == "linear"
    assert tree["optimizer"]["min_lr"] == 0.0
    assert tree["model"]["untie_embeddings_and_output_weights"] is False
    assert tree["model"]["ffn_hidden_size"] == 4 * 768
    assert tree["optimizer"]["lr_warmup_steps"] == 3200


@pytest.mark.parametrize(
    "named",
    ["--exotic-thing 7: has no counterpart", "--save $1: only a run", "weights 0.7 0.3", "HuggingFaceTokenizer"],
)
def test_what_is_not_carried_is_named(named: str) -> None:
    assert any(line.startswith(named) for line in translate(ARRAYS).left)


@pytest.mark.parametrize(
    "named", ["--swiglu is not given", "--disable-bias-linear is not given", "--position-embedding-type is not rope",
              "--normalization is not given", "--hidden-dropout is not given", "the learning rate decays over 320000"],
)
def test_what_megatron_would_do_without_a_flag_is_named(named: str) -> None:
    assert any(line.startswith(named) for line in translate(STRINGS).left)


def test_ramp_up_and_recomputation_are_carried() -> None:
    more = "--fp16 --rampup-batch-size 2 2 1000 --recompute-granularity full --recompute-method block "
    script = STRINGS.replace("--fp16", more + "--recompute-num-layers 3")
    training = translate(script).tree["training"]
    assert training["rampup_batch_size"] == [2, 2, 1000]
    assert [training[f"recompute{rest}"] for rest in ("", "_method", "_num_layers")] == ["full", "block", 3]
    assert from_tree(RunConfig, translate(script).tree).training.rampup_batch_size == (2, 2, 1000)
    some = STRINGS.replace("--fp16", "--fp16 --recompute-activations --recompute-modules core_attn mlp moe_act")
    done = translate(some)
    assert done.tree["training"]["recompute"] == "selective"
    assert done.tree["training"]["recompute_modules"] == ["core_attn", "mlp"]
    assert "--recompute-modules moe_act: here it is core_attn, mlp, layernorm." in done.left
    odd = translate(STRINGS.replace("--fp16", "--fp16 --rampup-batch-size a 2 3 --use-megatron-fsdp"))
    assert any(line.startswith("--rampup-batch-size a 2 3: 'a', '2', '3' is not a number") for line in odd.left)
    assert any("parallel.use_distributed_optimizer shards optimizer state" in line for line in odd.left)


def test_another_value_of_what_is_always_so_is_named() -> None:
    script = ARRAYS.replace("--normalization RMSNorm", "--normalization LayerNorm").replace(
        "--attention-dropout 0.0", "--attention-dropout 0.1"
    )
    left = translate(script).left
    assert any(line.startswith("--normalization LayerNorm: here it is always") for line in left)
    assert any(line.startswith("--attention-dropout 0.1: here it is always") for line in left)


def test_a_script_without_such_a_command_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no command with --num-layers"):
        translate("echo hello")


def test_the_yaml_is_read_back_and_says_what_was_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.sh").write_text(ARRAYS)
    assert main(argv=["import-args", str(tmp_path / "train.sh"), "--out", str(tmp_path / "run.yaml")]) == 0
    text = (tmp_path / "run.yaml").read_text()
    assert "#   --exotic-thing 7: has no counterpart here." in text
    assert "--exotic-thing 7" in capsys.readouterr().out
    assert read_config(tmp_path / "run.yaml", (), RunConfig).model.num_layers == 24
    assert yaml.safe_load(text)["data"]["tokenizer"] == "/data/tok"


def test_the_docs_have_the_table_of_the_code() -> None:
    assert flag_table() in DOCS.read_text(encoding="utf-8")


def test_no_flag_is_in_the_table_twice() -> None:
    names = [flag.name for flag in FLAGS] + list(IMPLIED)
    assert len(names) == len(set(names))


def test_settings_in_the_table_are_ours_or_of_groups_still_to_come() -> None:
    known, coming = settings_of(RunConfig), ("precision", "parallel.context", "parallel.virtual")
    assert [flag.setting for flag in FLAGS if flag.setting not in known and not flag.setting.startswith(coming)] == []
