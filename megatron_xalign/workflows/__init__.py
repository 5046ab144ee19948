"""One function per job, readable as a paragraph; the only place where rooms meet."""

from megatron_xalign.workflows.ablation import (
    AblateOptions,
    ablate,
)
from megatron_xalign.workflows.capturing import (
    capture,
    describe_capture,
    look_at_neurons,
)
from megatron_xalign.workflows.conversion import (
    CHECK_FILE,
    check_hf,
    convert_from_hf,
    convert_to_hf,
    is_converted,
)
from megatron_xalign.workflows.steering import (
    SteerOptions,
    plan_steering,
    steer,
)
from megatron_xalign.workflows.study import (
    analyze,
    is_analysed,
    outcome,
    report,
)
from megatron_xalign.workflows.tokens import (
    corpus_files,
    corpus_languages,
    input_files,
    join_tasks,
    make_corpus,
    make_pairing,
    measure_fertility,
    merge,
    plan_preprocessing,
    preprocess,
    preprocess_all,
    preprocess_task,
    preprocess_with_datatrove,
    registry_packages,
    token_statistics,
    train_tokenizer,
    train_tokenizer_on_files,
    verify,
)
from megatron_xalign.workflows.training import (
    audit_blend,
    compare_series,
    describe_run,
    is_trained,
    train,
)

__all__ = [
    "CHECK_FILE",
    "AblateOptions",
    "SteerOptions",
    "ablate",
    "analyze",
    "audit_blend",
    "capture",
    "check_hf",
    "compare_series",
    "convert_from_hf",
    "convert_to_hf",
    "corpus_files",
    "corpus_languages",
    "describe_capture",
    "describe_run",
    "input_files",
    "is_analysed",
    "is_converted",
    "is_trained",
    "join_tasks",
    "look_at_neurons",
    "make_corpus",
    "make_pairing",
    "measure_fertility",
    "merge",
    "outcome",
    "plan_preprocessing",
    "plan_steering",
    "preprocess",
    "preprocess_all",
    "preprocess_task",
    "preprocess_with_datatrove",
    "registry_packages",
    "report",
    "steer",
    "token_statistics",
    "train",
    "train_tokenizer",
    "train_tokenizer_on_files",
    "verify",
]
