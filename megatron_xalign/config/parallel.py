"""How a model lies on its processes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_xalign.config.checks import require


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How one model is laid over processes; what is left of the world size is data-parallel."""

    tensor_model_parallel_size: int = 1
    """Processes that share every layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Processes that hold consecutive blocks of layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Blocks of layers each of those holds instead of one (interleaved schedule); Megatron-LM's
    ``--num-layers-per-virtual-pipeline-stage`` is ``num_layers`` over pipeline size over this."""
    context_parallel_size: int = 1
    """Processes that share every sequence; each holds two of its ``2 * context_parallel_size`` chunks."""
    sequence_parallel: bool = False
    """Split norms and dropout along the sequence inside a tensor-parallel group."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks."""
    use_megatron_fsdp: bool = False
    """Not supported; here so that asking for it is answered."""
    distributed_timeout_seconds: int = 300
    """How long a collective may wait for a rank before the job stops."""
    heartbeat_interval_seconds: float = 5.0
    """How often every process says where it is, so that one that hangs or falls behind by four fifths of
    ``distributed_timeout_seconds`` is named when the job ends; 0 turns that off."""

    def __post_init__(self) -> None:
        require(
            self.heartbeat_interval_seconds >= 0,
            f"heartbeat_interval_seconds={self.heartbeat_interval_seconds} is negative; 0 turns it off.",
        )
        for name in (
            "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
            "distributed_timeout_seconds",
        ):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive.")
        require(
            not self.use_megatron_fsdp,
            "use_megatron_fsdp=true is not supported: Megatron-FSDP writes checkpoints of its own (fsdp_dtensor), "
            "which no other layout could go on from and no converter here reads. use_distributed_optimizer=true shards "
            "optimizer state, tensor_model_parallel_size and pipeline_model_parallel_size the model; --dry-run says "
            "what a process then needs.",
        )
        virtual = self.virtual_pipeline_model_parallel_size
        require(
            virtual is None or (virtual > 1 and self.pipeline_model_parallel_size > 1),
            f"virtual_pipeline_model_parallel_size={virtual} with pipeline_model_parallel_size="
            f"{self.pipeline_model_parallel_size}; an interleaved pipeline needs at least 2 of both. Leave it out for "
            "one block of layers a stage.",
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "sequence_parallel=true needs tensor_model_parallel_size above 1.",
        )

    @property
    def model_parallel_size(self) -> int:
        """Processes one copy of the model needs."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def virtual_size(self) -> int:
        """Blocks of layers each pipeline stage holds."""
        return self.virtual_pipeline_model_parallel_size or 1
