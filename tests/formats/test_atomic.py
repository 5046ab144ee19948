"""Files that appear together or not at all, and what killed processes leave."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_xalign.errors import FormatError
from megatron_xalign.formats import atomic
from megatron_xalign.formats.atomic import (
    cannot_write,
    read_json,
    remove_abandoned,
    whole_file,
    whole_files,
    whole_folder,
    write_json,
)

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_files_appear_together_in_the_order_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / "one" / "b", tmp_path / "two" / "a"]
    seen, real = [], os.replace

    def replace(source, target) -> None:
        seen.append(Path(target).name)
        assert all(path.stat().st_size == 4 for path in tmp_path.rglob(".*"))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with whole_files(paths, before_naming=lambda: seen.append("before")) as files:
        for file in files:
            file.write(b"text")
        assert not any(path.exists() for path in paths)
    assert seen == ["before", "b", "a"] and all(path.read_text() == "text" for path in paths)
    assert names(tmp_path / "one") == {"b"} and names(tmp_path / "two") == {"a"}


@pytest.mark.parametrize("step", ["body", "fsync 0", "fsync 1", "before", "replace 0", "replace 1", "folder"])
def test_whatever_fails_nothing_is_left_and_what_was_there_stays_or_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    counts = {"fsync": 0, "replace": 0}

    def fail() -> None:
        raise OSError(errno.ENOSPC, "full")

    def counted(name: str):
        real = getattr(os, name)

        def call(*args):
            if step == f"{name} {counts[name]}" or (step == "folder" and name == "fsync" and counts[name] == 2):
                fail()
            counts[name] += 1
            return real(*args)

        return call

    for path in paths:
        path.write_text("old")
    for name in counts:
        monkeypatch.setattr(os, name, counted(name))
    with (
        pytest.raises(OSError, match="full"),
        whole_files(paths, before_naming=fail if step == "before" else None) as files,
    ):
        for file in files:
            file.write(b"new")
        if step == "body":
            fail()
    assert names(tmp_path) == {"replace 1": {"b"}, "folder": {"b"}}.get(step, {"a", "b"})
    assert all(path.read_text() == "old" for path in tmp_path.iterdir())


def test_json_is_refused_before_a_file_is_begun(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert names(tmp_path) == set()
    write_json(tmp_path / "x.json", {"code": "ไทย"})
    assert read_json(tmp_path / "x.json") == {"code": "ไทย"}
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(FormatError, match="is not a readable JSON file"):
        read_json(tmp_path / "deep.json")


WRITING = """
import sys, time
from megatron_xalign.formats.atomic import whole_files, whole_folder
place = sys.argv[1]
with whole_files([place + "/file", place + "/other"]) as files, whole_folder(place + "/folder") as folder:
    (folder / "inside").write_text("x")
    files[0].write(b"x")
    print("writing", flush=True)
    time.sleep(100)
"""


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITING, str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "writing\n"
        dead, alive = processes
        dead.send_signal(signal.SIGKILL)
        dead.wait(timeout=300)
        (tmp_path / "finished").write_text("")
        before = names(tmp_path)
        assert len(before) == 7
        with whole_file(tmp_path / "mine") as file:
            file.write(b"x")
            removed = remove_abandoned(tmp_path)
        assert {path.name for path in removed} == {name for name in before if name.endswith(f"-{dead.pid}")}
        assert len(removed) == 3
        assert names(tmp_path) == {name for name in before if name.endswith(f"-{alive.pid}")} | {"finished", "mine"}
        assert remove_abandoned(tmp_path) == [] == remove_abandoned(tmp_path / "nothing")
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=300)
    assert len(remove_abandoned(tmp_path, "file")) == 1
    assert len(remove_abandoned(tmp_path, "f")) == 1
    assert len(remove_abandoned(tmp_path)) == 1 and names(tmp_path) == {"finished", "mine"}


def gone() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=300)
    return process.pid


def test_only_what_can_be_told_to_be_abandoned_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = gone()
    host = atomic._host()
    mine = tmp_path / f".x.partial-{host}-{pid}"
    others = [
        tmp_path / name
        for name in (
            f".x.partial-{host}-{os.getpid()}",  # this process lives
            f".x.partial-abcdef-{pid}",  # another machine
            f".x.partial-{host}-",
            f".x.partial-{host}-12x",
            f".x.partial-{host}-{'9' * 30}",
            f"x.partial-{host}-{pid}",  # no file of ours
        )
    ]
    for path in (mine, *others):
        path.write_text("")
    (tmp_path / f".link.partial-{host}-{pid}").symlink_to(tmp_path / "target")
    (tmp_path / "target").write_text("")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.fcntl, "flock", no_locks)
        with whole_file(tmp_path / "written"):
            pass
        assert remove_abandoned(tmp_path) == []
    assert remove_abandoned(tmp_path) == [mine]
    assert names(tmp_path) >= {path.name for path in others} | {"target", "written"}


def test_the_lock_alone_keeps_what_another_container_writes(tmp_path: Path) -> None:
    """A process of another container has a number that nobody has here."""
    path = tmp_path / f".x.partial-{atomic._host()}-{gone()}"
    with path.open("wb") as file:
        atomic._hold(file.fileno())
        assert remove_abandoned(tmp_path) == []
    assert remove_abandoned(tmp_path) == [path]


def test_a_whole_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("x")
        raise RuntimeError
    assert names(tmp_path) == set()
    for text in ("old", "new"):
        with whole_folder(tmp_path / "f") as folder:
            (folder / text).write_text(text)
    assert names(tmp_path) == {"f"} and names(tmp_path / "f") == {"new"}


def test_every_error_of_the_system_has_a_way_out(tmp_path: Path) -> None:
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE, errno.EDQUOT, errno.EFBIG):
        text = str(cannot_write(tmp_path / "x", OSError(number, os.strerror(number))))
        assert text.startswith(f"{tmp_path / 'x'} cannot be written: ") and os.strerror(number) not in text
    assert "Text file busy" in str(cannot_write("x", OSError(errno.ETXTBSY, os.strerror(errno.ETXTBSY))))
    assert "odd" in str(cannot_write("x", OSError("odd")))
