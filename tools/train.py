"""torchrun --nproc-per-node 8 tools/train.py CONFIG [--set KEY=VALUE] [--dry-run]: the same as ``xalign train``."""

from megatron_xalign.cli import main

if __name__ == "__main__":
    raise SystemExit(main(verb="train"))
