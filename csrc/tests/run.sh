#!/usr/bin/env bash
# libxalign's own tests and fuzzers with nothing but a compiler:
#   csrc/tests/run.sh [--sanitize|--threads] [--out FOLDER] [--fuzz SECONDS] [NAME ...]
# --sanitize: address and undefined-behaviour sanitizers; --threads: the thread sanitizer. NAME: test_stream,
# fuzz_stream, ...; all of them if left out. Only what a program needs is compiled, MAX_JOBS files at a time. Objects
# stay in FOLDER (build/csrc-tests-*), so that a second run compiles what changed. CXX names the compiler, with words
# before it if need be ("ccache g++").
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
if ((${#names[@]} == 0)); then
  for source in "$here"/{test,fuzz}_*.cpp; do names+=("$(basename "$source" .cpp)"); done
fi
for name in "${names[@]}"; do
  [[ -e "$here/$name.cpp" ]] || { echo "run.sh: there is no $here/$name.cpp" >&2; exit 2; }
done
out="${out:-$root/build/csrc-tests-$mode}"
mkdir -p "$out"
flags="-std=c++17 -g1 -Wall -Wextra -Werror -DNDEBUG -pthread -I$root/csrc/include"
case "$mode" in
  # What a null or short object would do is seen by the address sanitizer too; these three take a third of compiling.
  sanitize) flags+=" -fsanitize=address,undefined -fno-sanitize=null,vptr,object-size -fno-sanitize-recover=all" ;;
  threads) flags+=" -fsanitize=thread" ;;
esac
# The programs themselves are compiled for the compiler's speed, the library for its own.
export CXX="${CXX:-g++}" flags here

# Sources of the library that a file needs: those of the headers it includes, and what they need in turn.
declare -A needed=()
find_needed() {
  local header file
  while read -r header; do
    [[ -n "${needed[$header]:-}" ]] && continue
    needed[$header]=1
    for file in "$root/csrc/include/$header" "$here/$header" "$root/csrc/src/$header" \
                "$root/csrc/src/$(basename "$header" .h).cpp"; do
      if [[ -e "$file" ]]; then find_needed "$file"; fi
    done
  done < <(sed -n 's/^#include "\(.*\)"$/\1/p' "$1")
}

newest_header="$(find "$root/csrc" -name '*.h' -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2-)"
declare -A objects=() to_compile=()
for name in "${names[@]}"; do
  needed=()
  find_needed "$here/$name.cpp"
  sources=("$here/$name.cpp")
  for header in "${!needed[@]}"; do
    source="$root/csrc/src/$(basename "$header" .h).cpp"
    if [[ -e "$source" ]]; then sources+=("$source"); fi
  done
  for source in "${sources[@]}"; do
    object="$out/$(basename "$source" .cpp).o"
    objects[$name]+=" $object"
    if [[ ! -e "$object" || "$source" -nt "$object" || "$newest_header" -nt "$object" || "$0" -nt "$object" ]]; then
      to_compile[$object]="$source"
    fi
  done
done
# The largest first, so that none is left alone at the end. xargs ends with 123 if one fails, and what it said was shown.
for object in "${!to_compile[@]}"; do
  printf '%s %s %s\n' "$(stat -c %s "${to_compile[$object]}")" "${to_compile[$object]}" "$object"
done | sort -rn | cut -d' ' -f2- | xargs -r -P "${MAX_JOBS:-$(nproc)}" -n 2 bash -c \
  '[[ "$0" == "$here"/* ]] && level=-O0 || level=-O1; $CXX $flags $level -c "$0" -o "$1.partial" && mv "$1.partial" "$1" || { echo "FAILED to compile $0" >&2; exit 255; }'

for name in "${names[@]}"; do
  # shellcheck disable=SC2086
  $CXX $flags ${objects[$name]} -o "$out/$name"
  arguments=()
  [[ "$name" == fuzz_* ]] && arguments=("$fuzz")
  "$out/$name" "${arguments[@]}" || { echo "FAILED: $name" >&2; exit 1; }
  echo "passed: $name"
done
