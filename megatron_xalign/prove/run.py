"""Run the steps of a proof, each in processes of its own under a time limit, and write what came out.

A step that is done is not run again: ``steps/STEP.json`` holds it, and names the versions it was done with. So a
proof goes on where an allocation ended.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_xalign.formats.atomic import write_json, write_text
from megatron_xalign.prove.steps import MINUTES_PER_STEP, Machine, Run, Step, Verdict, steps_for


def prove(
    folder: Path, found: dict[str, Any], *, cpu: bool, gpus: int | None, only: str | None = None
) -> dict[str, Any]:
    """Run every step that is not done, and write ``results.json`` and ``results.md``.

    Args:
        folder: where everything lies; a folder of an earlier proof is gone on with.
        found: what ``doctor.examine`` found.
        cpu: prove what can be proved without a GPU.
        gpus: how many to use; all if left out.
        only: the name of one step.

    Returns:
        ``{"machine", "versions", "steps": [...], "passed"}``, JSON-able.
    """
    machine = machine_of(found, gpus)
    versions = {name: version for name, version in found["versions"].items() if version}
    results = []
    for step in steps_for(machine, cpu):
        if only is not None and step.name != only:
            continue
        path = folder / "steps" / f"{_file_name(step.name)}.json"
        done = _read(path)
        same = done is not None and done["versions"] == versions and done["kind"] == ("cpu" if cpu else "gpu")
        if done is None or not same or done["state"] == "failed":
            done = {
                "name": step.name, "claim": step.claim, "kind": "cpu" if cpu else "gpu", "versions": versions,
                **_try(step, folder / "runs" / _file_name(step.name)),
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, done)
        results.append(done)
    summary = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "on": "CPU" if cpu else "GPU",
        "devices": found["devices"], "machine": found["machine"], "versions": versions,
        "command": " ".join(["xalign", *sys.argv[1:]]), "steps": results,
        "passed": all(result["state"] != "failed" for result in results),
    }
    write_json(folder / "results.json", summary)
    write_text(folder / "results.md", as_markdown(summary))
    return summary


def machine_of(found: dict[str, Any], gpus: int | None) -> Machine:
    """What the doctor found, as far as steps ask for it."""
    names = {"Transformer Engine": "te", "flash-attn": "flash", "apex": "apex"}
    works = tuple(names[item["name"]] for item in found["optional"] if item["works"] and item["name"] in names)
    devices = found["devices"][:gpus]
    recipes = tuple(devices[0]["fp8_recipes"]) if devices else ()
    return Machine(gpus=len(devices), recipes=recipes, libraries=works if devices else ())


def as_table(summary: dict[str, Any]) -> str:
    """One line for each step."""
    words = {"passed": "ok", "failed": "FAILED", "skipped": "skipped"}
    width = max((len(step["name"]) for step in summary["steps"]), default=4)
    return "\n".join(
        f"{step['name']:{width}s}  {words[step['state']]:8s} {step['seconds']:6.0f} s  {step['said']}"
        for step in summary["steps"]
    )


def as_markdown(summary: dict[str, Any]) -> str:
    """The page that goes into a repository."""
    devices = ", ".join(f"{item['name']} ({item['memory_gib']} GiB)" for item in summary["devices"]) or "no GPU"
    wanted = ("torch", "megatron-core", "transformer-engine", "flash-attn", "apex", "python")
    versions = ", ".join(f"{name} {summary['versions'][name]}" for name in wanted if name in summary["versions"])
    rows = "\n".join(
        f"| {step['name']} | {step['claim']} | {step['state']} | {step['seconds']:.0f} s | {step['said']} |"
        for step in summary["steps"]
    )
    return (
        f"# What was proved on {summary['on']}\n\n{summary['when']}, {devices}; {versions}.\n"
        f"Command: `{summary['command']}`\n\n"
        f"| step | claim | result | time | figures |\n|---|---|---|---|---|\n{rows}\n"
    )


def _try(step: Step, folder: Path) -> dict[str, Any]:
    if step.skipped is not None:
        return {"state": "skipped", "said": step.skipped, "seconds": 0.0, "figures": {}}
    began = time.monotonic()
    deadline = began + 60 * MINUTES_PER_STEP
    runs: dict[str, Any] = {}
    verdict = Verdict(False, "")
    try:
        for name, run in step.runs.items():
            runs[name] = _run(name, run, folder, step, deadline)
        verdict = step.judge(runs)
    except _FailedError as error:
        verdict = Verdict(False, str(error))
    return {
        "state": "passed" if verdict.passed else "failed", "said": verdict.said, "figures": verdict.figures,
        "seconds": time.monotonic() - began,
        "runs": {
            name: {key: value for key, value in result.items() if key not in ("losses", "grad_norms")}
            for name, result in runs.items()
        },
    }


class _FailedError(Exception):
    """A run ended badly; the message is for the table."""


def _run(name: str, run: Run, step_folder: Path, step: Step, deadline: float) -> dict[str, Any]:
    folder = step_folder / _file_name(name)
    folder.mkdir(parents=True, exist_ok=True)
    given = {**run.settings, "folder": str(folder)}
    if run.exports is not None:
        given["checkpoint"] = str(_checkpoints(step_folder, run.exports)[-1])
    if run.resumes is not None:
        given["resume"] = str(_checkpoints(step_folder, run.resumes)[0])
    settings = folder / "settings.json"
    write_json(settings, given)
    processes = []
    environment = _environment(run)
    for rank in range(run.processes):
        ranked = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if run.processes > 1 else {})
        with (folder / f"log-{rank}.txt").open("wb") as log:
            processes.append(subprocess.Popen(
                [sys.executable, "-m", "megatron_xalign.prove.job", str(settings), str(folder / f"result-{rank}.json")],
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=ranked,
            ))
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() not in (None, 0) for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        codes = [process.poll() for process in processes]
        for process in processes:
            process.kill()
            process.wait()
    for rank, code in enumerate(codes):
        if code is None:
            raise _FailedError(f"{name} did not end within {MINUTES_PER_STEP} minutes of {step.name}")
        if code:
            lines = (folder / f"log-{rank}.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise _FailedError(f"{name} ended with code {code}: {lines[-1] if lines else ''} ({folder}/log-{rank}.txt)")
    results = [
        json.loads((folder / f"result-{rank}.json").read_text(encoding="utf-8")) for rank in range(run.processes)
    ]
    # Every process logs to the file of the first; the last stage has the loss of what was evaluated.
    return {**results[0], **{key: value for key, value in results[-1].items() if key == "evaluated"}}


def _environment(run: Run) -> dict[str, str]:
    settings = {**os.environ, "XALIGN_PROGRESS": "0"}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        settings.pop(name, None)
    if run.on_cpu:
        settings["CUDA_VISIBLE_DEVICES"] = ""
    if run.processes > 1:
        with socket.socket() as port:
            port.bind(("localhost", 0))
            settings["MASTER_PORT"] = str(port.getsockname()[1])
        settings |= {"MASTER_ADDR": "localhost", "WORLD_SIZE": str(run.processes)}
    # Megatron's tensor parallelism relies on the order of kernels in one queue.
    settings.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return settings


def _checkpoints(step_folder: Path, name: str) -> list[Path]:
    return sorted((step_folder / _file_name(name) / "checkpoints").glob("step-*"))


def _file_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if {"versions", "kind", "state", "seconds", "said"} <= found.keys() else None
