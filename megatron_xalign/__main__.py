"""``python -m megatron_xalign VERB ...``: the ``xalign`` command, for ``torchrun -m``."""

from megatron_xalign.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
