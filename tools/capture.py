"""torchrun --nproc-per-node 2 tools/capture.py CHECKPOINT --probe FILE --out DIR: the same as ``xalign capture``."""

from megatron_xalign.cli import main

if __name__ == "__main__":
    raise SystemExit(main(verb="capture"))
