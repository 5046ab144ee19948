"""Many tasks make what one machine makes, bit for bit: plain tasks, datatrove's executors, kills and repeats."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_xalign.data import cluster
from megatron_xalign.data.cluster import Task, datatrove_executor, join_tasks, plan_tasks, run_datatrove, run_task
from megatron_xalign.data.inputs import Fields
from megatron_xalign.data.job import Job
from megatron_xalign.data.job_settings import JobSettings
from megatron_xalign.data.preprocess import finish_job, preprocess
from megatron_xalign.data.work_folder import WorkFolder
from megatron_xalign.errors import ConfigError, CorpusError, FormatError
from megatron_xalign.formats.token_file import verify_token_file

WORDS = [
    "talo", "hus", "house", "дом", "家", "بيت", "σπίτι", "maison", "Haus", "दुकान", "집", "kuća", "ház", "bāṛī", "nhà",
]
FILES = ("bin", "idx", "spans")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE trained on the words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    engine.save(str(path))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents in two files, one of them empty, with texts that come again."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(7)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 300))) for _ in range(1500)]
    texts[700:720] = texts[:20]
    for name, part in (("a", texts[:900]), ("b", texts[900:])):
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "empty.jsonl").write_text("", encoding="utf-8")
    return folder


@pytest.fixture
def settings(tmp_path: Path, corpus: Path, tokenizer: Path) -> JobSettings:
    """A job of about twenty parts."""
    return JobSettings(
        inputs=(str(corpus),), output_prefix=str(tmp_path / "tasks" / "text"), tokenizer=str(tokenizer),
        fields=Fields(kind="monolingual", language="und"), duplicates="exact", part_bytes=70_000, workers=1,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: Path) -> Path:
    """What one process made of the same corpus, in parts of another size."""
    prefix = tmp_path_factory.mktemp("alone") / "text"
    preprocess(
        JobSettings(
            inputs=(str(corpus),), output_prefix=str(prefix), tokenizer=str(tokenizer),
            fields=Fields(kind="monolingual", language="und"), duplicates="exact", workers=1,
        )
    )
    return prefix


def assert_same(prefix: str | Path, other: str | Path) -> None:
    for kind in FILES:
        assert Path(f"{prefix}.{kind}").read_bytes() == Path(f"{other}.{kind}").read_bytes(), kind
    verify_token_file(Path(prefix))


@pytest.mark.parametrize(("text", "index", "num_tasks"), [("0/1", 0, 1), ("3/16", 3, 16), (" 15/16 ", 15, 16)])
def test_a_task_is_written_index_of_number(text: str, index: int, num_tasks: int) -> None:
    assert Task.parse(text) == Task(index, num_tasks)


@pytest.mark.parametrize("text", ["16/16", "1/0", "-1/4", "1", "1/4/2", "a/b", "", "٣/١٦"])
def test_what_is_no_task_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="task"):
        Task.parse(text)


@pytest.mark.parametrize("num_tasks", [1, 3, 40])
def test_tasks_in_any_order_make_what_one_machine_makes(settings: JobSettings, alone: Path, num_tasks: int) -> None:
    order = list(range(num_tasks))
    random.Random(num_tasks).shuffle(order)
    parts = sum(run_task(settings, Task(index, num_tasks))["parts"] for index in order)
    assert parts > 10
    outcome = join_tasks(settings)
    assert list(outcome.manifests) == [settings.output_prefix]
    assert sum(outcome.manifests[settings.output_prefix]["counts"]["duplicates"].values()) == 20
    assert_same(settings.output_prefix, alone)
    assert not settings.work_folder.exists()


def test_pairs_with_near_duplicates_and_a_control_and_their_manifest(
    settings: JobSettings, tmp_path: Path, corpus: Path
) -> None:
    rng = random.Random(3)
    lines = []
    for number, line in enumerate((corpus / "a.jsonl").read_text(encoding="utf-8").splitlines()):
        text = json.loads(line)["text"]
        pair = {"eng_Latn": text, "fin_Latn": " ".join(rng.sample(text.split(), len(text.split())))}
        lines.append(json.dumps({"id": f"p{number}", "texts": pair}, ensure_ascii=False) + "\n")
        if number % 10 == 0:
            near = {code: side + " x" for code, side in pair.items()}
            lines.append(json.dumps({"id": f"q{number}", "texts": near}, ensure_ascii=False) + "\n")
    (tmp_path / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = dataclasses.replace(
        settings, inputs=(str(tmp_path / "pairs.jsonl"),), duplicates="near", pairing="shuffled", workers=2,
        fields=Fields(kind="pairs", languages=("eng_Latn", "fin_Latn")),
    )
    for index in (1, 0):
        assert run_task(settings, Task(index, 2))["parts"] > 5
    join_tasks(settings)
    alone = dataclasses.replace(settings, output_prefix=str(tmp_path / "alone" / "text"), workers=1)
    manifest = preprocess(alone)
    assert manifest["counts"]["duplicates"]["near duplicate"] > 30
    assert_same(settings.output_prefix, alone.output_prefix)
    made = (Path(f"{prefix}.manifest.json").read_bytes() for prefix in (settings.output_prefix, alone.output_prefix))
    assert next(made) == next(made)


def test_tasks_of_different_numbers_complete_one_another(settings: JobSettings, alone: Path) -> None:
    run_task(settings, Task(0, 3))
    run_task(settings, Task(1, 2))
    # The parts 2, 4, 8, 10, ... of the two schemes are missing.
    with pytest.raises(CorpusError, match="parts are not done"):
        join_tasks(settings)
    run_task(settings, Task(0, 2))
    join_tasks(settings)
    assert_same(settings.output_prefix, alone)


def test_what_was_joined_is_kept_by_tasks_and_joins_that_run_again(settings: JobSettings) -> None:
    run_task(settings, Task(0, 1))
    manifest = join_tasks(settings).manifests[settings.output_prefix]
    before = {kind: Path(f"{settings.output_prefix}.{kind}").stat().st_mtime_ns for kind in FILES}
    assert run_task(settings, Task(0, 2))["parts"] == 0
    assert join_tasks(settings).manifests[settings.output_prefix] == manifest
    assert {kind: Path(f"{settings.output_prefix}.{kind}").stat().st_mtime_ns for kind in FILES} == before


def test_a_join_before_any_task_says_so(settings: JobSettings) -> None:
    with pytest.raises(FormatError, match="no plan"):
        join_tasks(settings)


def test_tasks_of_other_settings_are_not_mixed_up(settings: JobSettings, alone: Path) -> None:
    other = dataclasses.replace(settings, duplicates="keep")
    run_task(other, Task(0, 2))
    with pytest.raises(FormatError, match="no plan"):
        join_tasks(settings)
    # The plan is made anew, and the parts of the other recipe with it.
    run_task(settings, Task(0, 1))
    join_tasks(settings)
    assert_same(settings.output_prefix, alone)


def test_input_that_changed_after_the_plan_is_planned_anew(settings: JobSettings, tmp_path: Path, corpus: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "a.jsonl").write_bytes((corpus / "b.jsonl").read_bytes())
    settings = dataclasses.replace(settings, inputs=(str(own),))
    run_task(settings, Task(0, 2))
    with (own / "a.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more"}\n')
    run_task(settings, Task(0, 1))
    manifest = join_tasks(settings).manifests[settings.output_prefix]
    assert manifest["counts"]["read"] == 601


def test_while_another_job_writes_there_a_task_waits_and_then_says_so(settings: JobSettings) -> None:
    with WorkFolder(settings.work_folder).hold():
        begin = time.monotonic()
        with pytest.raises(ConfigError, match="another job"):
            plan_tasks(settings, longest_wait_seconds=1.5)
        assert time.monotonic() - begin >= 1.5


def test_a_task_waits_for_another_that_has_the_folder_for_a_moment(settings: JobSettings, alone: Path) -> None:
    """Tasks that ask for the plan while it is made each have the folder alone for a moment when it is there."""
    job = plan_tasks(settings)
    with ThreadPoolExecutor(1) as pool:
        with WorkFolder(settings.work_folder).hold():
            task = pool.submit(run_task, settings, Task(0, 1))
            with pytest.raises(TimeoutError):
                task.result(0.5)
        assert task.result(120)["parts"] == job.num_parts
    join_tasks(settings)
    assert_same(settings.output_prefix, alone)


def test_a_task_that_waited_while_the_parts_were_joined_does_nothing(settings: JobSettings, alone: Path) -> None:
    run_task(settings, Task(0, 1))
    with ThreadPoolExecutor(1) as pool:
        with WorkFolder(settings.work_folder).hold():
            task = pool.submit(run_task, settings, Task(0, 1))
            with pytest.raises(TimeoutError):
                task.result(0.5)
            finish_job(Job.load(settings.work_folder), {})
        assert task.result(120)["parts"] == 0
    assert not settings.work_folder.exists()
    assert_same(settings.output_prefix, alone)


def test_two_joins_at_the_same_time_find_the_same(settings: JobSettings, alone: Path) -> None:
    run_task(settings, Task(0, 1))
    with ThreadPoolExecutor(2) as pool:
        with WorkFolder(settings.work_folder).hold():
            joins = [pool.submit(join_tasks, settings) for _ in range(2)]
            with pytest.raises(TimeoutError):
                joins[0].result(0.5)
        first, second = (join.result(120) for join in joins)
    assert first.manifests == second.manifests
    assert not settings.work_folder.exists()
    assert_same(settings.output_prefix, alone)


def process_of(settings: JobSettings, call: str) -> subprocess.Popen[bytes]:
    """A process of its own group that does something with the settings."""
    code = (
        "import json, sys; from megatron_xalign.data.cluster import *; "
        "from megatron_xalign.data.job_settings import JobSettings; "
        f"settings = JobSettings.from_tree(json.loads(sys.argv[1])); {call}"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(settings.to_tree())], start_new_session=True,
        env={**os.environ, "XALIGN_PROGRESS": "0"}, stderr=subprocess.PIPE,
    )


def wait_for_a_part(settings: JobSettings, process: subprocess.Popen[bytes]) -> None:
    """Wait until a part is done, or all."""
    deadline = time.monotonic() + 300
    while process.poll() is None and not list(settings.work_folder.glob("part-?????.json")):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode in (0, -signal.SIGKILL), errors.decode()


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def test_tasks_at_the_same_time_one_of_them_killed_and_run_again(settings: JobSettings, alone: Path) -> None:
    tasks = [process_of(settings, f"run_task(settings, Task({index}, 3))") for index in range(3)]
    wait_for_a_part(settings, tasks[1])
    kill_group(tasks[1])
    finish(tasks[0])
    finish(tasks[2])
    finish(process_of(settings, "run_task(settings, Task(1, 3))"))
    join_tasks(settings)
    assert_same(settings.output_prefix, alone)
    assert not settings.work_folder.exists()


def test_an_error_in_a_task_names_file_and_line(settings: JobSettings, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n', encoding="utf-8")
    settings = dataclasses.replace(settings, inputs=(str(tmp_path / "bad.jsonl"),))
    with pytest.raises(CorpusError, match=r"bad\.jsonl:2"):
        run_task(settings, Task(0, 1))


# --- datatrove --------------------------------------------------------------------------------------------------------


@pytest.fixture
def datatrove() -> Iterator[None]:
    pytest.importorskip("datatrove")
    yield


@pytest.mark.usefixtures("datatrove")
def test_the_local_executor_makes_what_one_machine_makes(settings: JobSettings, alone: Path) -> None:
    outcome = run_datatrove(settings, "local", 3, options={"workers": 2})
    assert outcome is not None
    assert outcome.manifests[settings.output_prefix]["documents"] == 1480
    assert_same(settings.output_prefix, alone)
    # And once more, when there is nothing left to do.
    again = run_datatrove(settings, "local", 3, options={"workers": 2})
    assert again is not None
    assert again.manifests == outcome.manifests


@pytest.mark.usefixtures("datatrove")
def test_the_local_executor_killed_in_the_middle_goes_on(settings: JobSettings, alone: Path) -> None:
    for attempt in range(20):
        settings = dataclasses.replace(settings, output_prefix=f"{settings.output_prefix}-{attempt}")
        process = process_of(settings, "run_datatrove(settings, 'local', 2, options={'workers': 2})")
        wait_for_a_part(settings, process)
        kill_group(process)
        # If not, this process was away for so long that the job came to its end.
        if not Path(f"{settings.output_prefix}.manifest.json").exists():
            break
    assert settings.work_folder.exists()
    # The pool's processes are in the group; nobody holds the folder any more.
    finish(process_of(settings, "run_datatrove(settings, 'local', 2, options={'workers': 2})"))
    assert_same(settings.output_prefix, alone)


@pytest.mark.usefixtures("datatrove")
def test_the_local_executor_hands_on_an_error_of_a_task(settings: JobSettings, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": \n', encoding="utf-8")
    settings = dataclasses.replace(settings, inputs=(str(tmp_path / "bad.jsonl"),))
    with pytest.raises(CorpusError, match=r"bad\.jsonl:2"):
        run_datatrove(settings, "local", 1, options={"workers": 1})


FAKE_SBATCH = """#!/bin/bash
# Keeps what it is given, numbered, as a queue would.
number=$(( $(ls "$FAKE_SLURM" | grep -c '\\.sh$') + 100 ))
cp "${@: -1}" "$FAKE_SLURM/$number.sh"
echo "$@" > "$FAKE_SLURM/$number.arguments"
echo "Submitted batch job $number"
"""
FAKE_SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do if [[ "$1" == -n ]]; then shift; fi; shift; done
exec "$@"
"""
FAKE_SCONTROL = """#!/bin/bash
echo "$SLURM_NODELIST"
"""


@pytest.mark.usefixtures("datatrove")
def test_the_slurm_script_is_an_array_that_the_join_waits_for_and_it_runs(
    settings: JobSettings, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, commands = tmp_path / "queue", tmp_path / "commands"
    queue.mkdir()
    commands.mkdir()
    for name, text in (("sbatch", FAKE_SBATCH), ("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (commands / name).write_text(text, encoding="utf-8")
        (commands / name).chmod(0o755)
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("FAKE_SLURM", str(queue))
    options = {"partition": "cpu", "time": "02:00:00", "cpus_per_task": 2, "sbatch_args": {"account": "project_1"}}

    assert run_datatrove(settings, "slurm", 3, options=options) is None

    submitted = {path.stem: path.read_text(encoding="utf-8") for path in sorted(queue.glob("*.sh"))}
    arguments = {path.stem: path.read_text(encoding="utf-8") for path in sorted(queue.glob("*.arguments"))}
    jobs = {name: text for name, text in submitted.items() if "launch_pickled_pipeline" in text}
    # datatrove adds a job to each that adds up its statistics.
    statistics = [name for name in submitted if name not in jobs]
    (parts, parts_text), (join, join_text) = jobs.items()
    for line in ("partition=cpu", "time=02:00:00", "cpus-per-task=2", "account=project_1", "array=0-2", "nodes=1"):
        assert re.search(f"^#SBATCH --{line}$", parts_text, re.MULTILINE), line
    assert re.search("^#SBATCH --array=0-0$", join_text, re.MULTILINE)
    assert f"--dependency=afterok:{parts}" in arguments[join]
    assert "--dependency" not in arguments[parts]

    # What the cluster would do: every index of the array in its own process, then the join.
    for name, indices in ((parts, (2, 0, 1)), (join, (0,)), *((name, (0,)) for name in statistics)):
        for index in indices:
            done = subprocess.run(
                ["bash", str(queue / f"{name}.sh")], capture_output=True, text=True, timeout=300, check=False,
                env={**os.environ, "SLURM_ARRAY_TASK_ID": str(index), "RUN_OFFSET": "0", "SLURM_NODELIST": "node1"},
            )
            assert done.returncode == 0, done.stdout + done.stderr
    assert_same(settings.output_prefix, alone)


@pytest.mark.usefixtures("datatrove")
def test_an_option_that_datatrove_does_not_know_is_named(settings: JobSettings) -> None:
    with pytest.raises(ConfigError, match="colour"):
        datatrove_executor(settings, "local", 2, options={"colour": "red"})
    with pytest.raises(ConfigError, match="partition"):
        datatrove_executor(settings, "slurm", 2)


def test_without_datatrove_the_error_says_how_to_get_it_and_how_to_do_without(
    settings: JobSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datatrove", None)
    with pytest.raises(ConfigError, match=r"megatron-xalign\[datatrove\].*--task"):
        datatrove_executor(settings, "local", 2)


def test_an_executor_that_is_none_is_named(settings: JobSettings) -> None:
    pytest.importorskip("datatrove")
    with pytest.raises(ConfigError, match="pbs"):
        datatrove_executor(settings, "pbs", 2)  # type: ignore[arg-type]


def test_the_steps_carry_plain_data(settings: JobSettings) -> None:
    for step in (cluster.PartsStep(settings.to_tree()), cluster.JoinStep(settings.to_tree())):
        assert JobSettings.from_tree(json.loads(json.dumps(step.settings))) == settings
