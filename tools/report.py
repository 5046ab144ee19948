"""python tools/report.py ...: the same as ``xalign report ...``, for schedulers that want a script."""

from megatron_xalign.cli import main

if __name__ == "__main__":
    raise SystemExit(main(verb="report"))
