"""Words of launch scripts against what bash itself makes of them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_xalign.shell_script import commands_of

SCRIPTS = {
    "variables": 'A=3\nB="two words"\nC=\'$A\'\nx $A "$B" $B $C ${A}4 "a${A}b"',
    "defaults": 'A=5\nx ${N:-7} ${M:-"$A"x} ${K-none}\nN=2\nx ${N:-7}',
    "arrays": 'ARGS=(\n  --num-layers 24 # depth\n  --name "a b"\n)\nARGS+=(--lr 1e-4)\nx "${ARGS[@]}" end',
    "continued": "x --a 1 \\\n  --b 2 \\\n  --c '3 4'",
    "string of flags": 'G="--a 1 \\\n --b 2"\nH="$G --c 3"\nx $H',
    "arithmetic": "N=4\nG=8\nW=$(($N * G))\nx $W $((W / 3 - 1)) $(( -7 / 2 ))",
    "export": "export A=5 B=6\nx $A",
    "redirections": "x --a 1 > out 2>&1\nx --b 2 2>/dev/null | cat\nx c &> log",
    "escapes": 'x a\\ b "say \\"hi\\"" \\$A',
    "here-document": "cat > f <<EOF\nx --not me\nEOF\nx --me 1",
    "empty": 'E=""\nx $E "$E" --a',
    "chain": "cd . && x --a 1; x --b || true",
    "appended": 'A="--a"\nA+=" --b"\nx $A',
    "assigned default": ": ${Q:=9}\nx $Q",
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("name", SCRIPTS)
def test_words_are_those_of_bash(name: str, tmp_path: Path) -> None:
    script = "x() { printf '%s\\0' \"$@\" >> words; printf '\\n\\0' >> words; }\n" + SCRIPTS[name]
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    expected: list[list[str]] = [[]]
    for word in (tmp_path / "words").read_text(encoding="utf-8").split("\0")[:-1]:
        if word == "\n":
            expected.append([])
        else:
            expected[-1].append(word)
    ours = [words[1:] for words in commands_of(SCRIPTS[name]) if words[0] == "x"]
    assert ours == expected[:-1]


def test_what_only_a_run_could_tell_stays_as_it_is_written_and_nothing_is_run(tmp_path: Path) -> None:
    script = f"NODE=$(touch {tmp_path}/ran; hostname)\nx --node $NODE --home $UNSET --first $1 `date`"
    ((_, *words),) = [words for words in commands_of(script) if words[0] == "x"]
    assert words[1].startswith("$(") and words[3] == "$UNSET" and words[5] == "$1"
    assert not (tmp_path / "ran").exists()


def test_both_branches_are_read_and_variables_from_outside_win() -> None:
    script = "if [ $SIZE = big ]; then\n  L=24\nelse\n  L=12\nfi\nx --num-layers $L --size $SIZE"
    assert commands_of(script)[-1] == ["x", "--num-layers", "12", "--size", "$SIZE"]
    assert commands_of(script, {"L": "36", "SIZE": "s"})[-1] == ["x", "--num-layers", "36", "--size", "s"]


@pytest.mark.parametrize("script", ["x '", 'x "a', "x ${", "x $(", "A=(", "x $((1", "x `", "x <<", "$", "x \\"])
def test_broken_scripts_end(script: str) -> None:
    commands_of(script)
