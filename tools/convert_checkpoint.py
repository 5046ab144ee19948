"""python tools/convert_checkpoint.py to-hf CHECKPOINT OUT: the same as ``xalign convert``; CPU only."""

from megatron_xalign.cli import main

if __name__ == "__main__":
    raise SystemExit(main(verb="convert"))
