#!/bin/bash
# The study as one series: four runs of examples/study_1.4b.yaml that differ in their share of parallel text only.
# Needs: Slurm, and what examples/study_1.4b.yaml needs. Prove first that the runs differ in nothing else:
#          xalign blend examples/study_1.4b.yaml --series 0,0.01,0.02,0.05
# Run:   examples/study_series.sh --account ACCOUNT [--nodes 4] [--dry-run]     further options go to `xalign launch slurm`
# Vary:  the fractions; --nodes. Without Slurm: `xalign launch local` takes the same --series and does one after the other.
# Then:  xalign analyze runs/p*; xalign report runs/p0 runs/p0.01 runs/p0.02 runs/p0.05 --out report
set -euo pipefail
xalign launch slurm "${CONFIG:-examples/study_1.4b.yaml}" --series 0,0.01,0.02,0.05 --nproc-per-node 8 "$@"
