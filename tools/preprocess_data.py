"""python tools/preprocess_data.py --input ... --output-prefix ...: takes the flags of Megatron-LM's tool so called."""

from megatron_xalign.cli import main

if __name__ == "__main__":
    raise SystemExit(main(verb="preprocess_data"))
