"""One function per job, readable as a paragraph; the only place where rooms meet."""

from megatron_xalign.workflows.capturing import (
    capture,
    describe_capture,
)
from megatron_xalign.workflows.conversion import (
    CHECK_FILE,
    check_hf,
    convert_from_hf,
    convert_to_hf,
    is_converted,
)
from megatron_xalign.workflows.study import (
    analyze,
    outcome,
    report,
)
from megatron_xalign.workflows.tokens import (
    corpus_languages,
    join_tasks,
    make_corpus,
    make_pairing,
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
    "analyze",
    "audit_blend",
    "capture",
    "check_hf",
    "compare_series",
    "convert_from_hf",
    "convert_to_hf",
    "corpus_languages",
    "describe_capture",
    "describe_run",
    "is_converted",
    "is_trained",
    "join_tasks",
    "make_corpus",
    "make_pairing",
    "merge",
    "outcome",
    "plan_preprocessing",
    "preprocess",
    "preprocess_all",
    "preprocess_task",
    "preprocess_with_datatrove",
    "registry_packages",
    "report",
    "token_statistics",
    "train",
    "train_tokenizer",
    "train_tokenizer_on_files",
    "verify",
]
