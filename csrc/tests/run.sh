#!/usr/bin/env bash
# libxalign's own tests and fuzzers with nothing but a compiler:
#   csrc/tests/run.sh [--sanitize|--threads] [--out FOLDER] [--fuzz SECONDS] [NAME ...]
# --sanitize: address and undefined-behaviour sanitizers; --threads: the thread sanitizer. NAME: test_stream,
# fuzz_stream, ...; all of them if left out. Objects stay in FOLDER (build/csrc-tests-*), so that a second run compiles
# what changed. CXX names the compiler.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
root="$(dirname "$(dirname "$here")")"
mode=plain out="" fuzz=2 names=()
while (($#)); do
  case "$1" in
    --sanitize) mode=sanitize ;;
    --threads) mode=threads ;;
    --out) out="$2"; shift ;;
    --fuzz) fuzz="$2"; shift ;;
    -*) echo "run.sh: unknown option $1" >&2; exit 2 ;;
    *) names+=("$1") ;;
  esac
  shift
done
out="${out:-$root/build/csrc-tests-$mode}"
mkdir -p "$out"
flags=(-std=c++17 -O1 -g -Wall -Wextra -Werror -DNDEBUG -pthread -I"$root/csrc/include")
case "$mode" in
  sanitize) flags+=(-fsanitize=address,undefined -fno-sanitize-recover=all) ;;
  threads) flags+=(-fsanitize=thread) ;;
esac
cxx="${CXX:-g++}"
newest_header="$(find "$root/csrc" -name '*.h' -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2-)"

compile() { # source object
  if [[ ! -e "$2" || "$1" -nt "$2" || "$newest_header" -nt "$2" ]]; then
    "$cxx" "${flags[@]}" -c "$1" -o "$2.partial" && mv "$2.partial" "$2"
  fi
}
export -f compile

objects=()
pids=()
for source in "$root"/csrc/src/*.cpp; do
  name="$(basename "$source" .cpp)"
  # These need Python.
  [[ "$name" == bindings* ]] && continue
  objects+=("$out/$name.o")
  compile "$source" "$out/$name.o" &
  pids+=($!)
  if ((${#pids[@]} >= $(nproc))); then wait "${pids[0]}"; pids=("${pids[@]:1}"); fi
done
for pid in "${pids[@]}"; do wait "$pid"; done

if ((${#names[@]} == 0)); then
  for source in "$here"/{test,fuzz}_*.cpp; do names+=("$(basename "$source" .cpp)"); done
fi
for name in "${names[@]}"; do
  compile "$here/$name.cpp" "$out/$name.o"
  "$cxx" "${flags[@]}" "$out/$name.o" "${objects[@]}" -o "$out/$name"
  arguments=()
  [[ "$name" == fuzz_* ]] && arguments=("$fuzz")
  "$out/$name" "${arguments[@]}" || { echo "FAILED: $name" >&2; exit 1; }
  echo "passed: $name"
done
