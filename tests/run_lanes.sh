#!/usr/bin/env bash
# Runs the distributed tests with several installations, one after another, and says at the end how each did.
#
#   tests/run_lanes.sh PYTHON... [-- PYTEST_ARGUMENT...]
#   tests/run_lanes.sh .venv/bin/python .venv312/bin/python -- tests/distributed/test_layouts.py
#
# Each PYTHON is the interpreter of an environment with the package's training and test extras installed: Python 3.11
# with megatron-core 0.16.1, Python 3.12 with 0.19.2. The native library is built for each in place.
set -uo pipefail
cd "$(dirname "$0")/.."

pythons=()
while (($#)) && [[ $1 != -- ]]; do
  pythons+=("$1")
  shift
done
(($#)) && shift
tests=("$@")
((${#tests[@]})) || tests=(tests/distributed)
if ((!${#pythons[@]})); then
  echo "give at least one python: $0 .venv/bin/python .venv312/bin/python" >&2
  exit 2
fi

failed=0
report=()
for python in "${pythons[@]}"; do
  if ! lane=$("$python" -c '
import importlib.metadata as installed, platform
versions = [f"{name} {installed.version(name)}" for name in ("megatron-core", "torch")]
print(", ".join([f"Python {platform.python_version()}", *versions]))'); then
    report+=("$python: it has no megatron-core or torch")
    failed=1
    continue
  fi
  echo "=== $lane"
  log=$(mktemp)
  if "$python" setup.py -q build_ext --inplace && PYTHONPATH=$PWD "$python" -m pytest -q "${tests[@]}" | tee "$log"; then
    report+=("$lane: $(tail -n 1 "$log")")
  else
    report+=("$lane: FAILED, $(tail -n 1 "$log")")
    failed=1
  fi
  rm -f "$log"
done
printf '%s\n' "${report[@]}"
exit $failed
