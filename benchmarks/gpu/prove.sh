#!/bin/sh
# Everything that can be proved on this machine's GPUs, in one long allocation:
#   benchmarks/gpu/prove.sh [FOLDER] [--gpus N]
# Run it again with the same folder to go on where an allocation ended. Each step takes at most 8 minutes.
set -eu
folder=xalign-proof
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
    folder=$1
    shift
fi
exec xalign doctor --prove --output "$folder" "$@"
