"""The index cache: content decides the name, files are whole, one process builds and others wait."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_xalign.data import index_cache
from megatron_xalign.data.index_cache import IndexCache
from megatron_xalign.errors import ConfigError

ARRAYS = {
    "starts": np.arange(1000, dtype=np.int64) ** 3,
    "none": np.zeros((0, 3), dtype=np.uint16),
    "small": np.array([[1, -2], [3, -4]], dtype=np.int8),
}


class Builder:
    """Counts how often it is called."""

    def __init__(self, arrays: dict[str, np.ndarray] | None = None) -> None:
        self.calls = 0
        self.arrays = ARRAYS if arrays is None else arrays

    def __call__(self) -> dict[str, np.ndarray]:
        self.calls += 1
        return self.arrays


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray] = ARRAYS) -> bool:
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
    return True


def is_mapped(array: np.ndarray) -> bool:
    base: object = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            return True
        base = base.base
    return False


def test_what_was_built_is_found_by_what_it_was_made_from(tmp_path: Path) -> None:
    build = Builder()
    made_from = {"name": "fin", "seed": 1, "file": {"sha256": "ab"}}
    first = IndexCache(tmp_path / "deep" / "cache").arrays("starts", made_from, build)
    assert same(first) and is_mapped(first["starts"])
    again = IndexCache(tmp_path / "deep" / "cache").arrays("starts", dict(reversed(made_from.items())), build)
    assert same(again) and build.calls == 1
    with pytest.raises(ValueError, match="read-only"):
        again["starts"][0] = 1
    for kind, other in (("starts", {**made_from, "seed": 2}), ("packing", made_from), ("starts", {"name": "fin"})):
        IndexCache(tmp_path / "deep" / "cache").arrays(kind, other, build)
    assert build.calls == 4
    assert not [path for path in (tmp_path / "deep" / "cache").iterdir() if path.name.startswith(".")]


def test_another_version_of_the_code_builds_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = Builder()
    IndexCache(tmp_path).arrays("starts", {}, build)
    monkeypatch.setattr(index_cache, "INDEX_VERSION", index_cache.INDEX_VERSION + 1)
    IndexCache(tmp_path).arrays("starts", {}, build)
    assert build.calls == 2


@pytest.mark.parametrize("where", ["magic", "header", "list", "length", "nothing", "swapped"])
def test_a_damaged_file_is_built_again(where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build = Builder()
    cache = IndexCache(tmp_path)
    cache.arrays("starts", {"a": 1}, build)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    if where == "swapped":
        # A file under another one's name.
        cache.arrays("starts", {"a": 2}, Builder({"starts": np.zeros(3)[:0].astype(np.int64)}))
        (other,) = set(tmp_path.iterdir()) - {path}
        content = bytearray(other.read_bytes())
    elif where in ("length", "nothing"):
        content = content[: len(content) // 2 if where == "length" else 0]
    else:
        content[{"magic": 0, "header": 12, "list": 60}[where]] ^= 1
    path.write_bytes(content)
    assert same(cache.arrays("starts", {"a": 1}, build))
    assert build.calls == 2
    assert "built again" in caplog.text
    assert same(cache.arrays("starts", {"a": 1}, build)) and build.calls == 2


def test_a_builder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, np.ndarray]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        IndexCache(tmp_path).arrays("starts", {}, fail)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="dtype float64 cannot be kept"):
        IndexCache(tmp_path).arrays("starts", {}, lambda: {"a": np.zeros(3)})
    assert not list(tmp_path.iterdir())


def test_settings_name_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert IndexCache.at("").folder == IndexCache.at(None).folder == tmp_path / "xdg" / "megatron-xalign" / "index"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert IndexCache.at("").folder == tmp_path / "home" / ".cache" / "megatron-xalign" / "index"
    assert IndexCache.at("~/index").folder == tmp_path / "home" / "index"
    assert IndexCache.at("none").folder is None
    assert IndexCache.at(tmp_path).folder == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data\.index_cache_dir=.*file is not a folder"):
        IndexCache.at(tmp_path / "file")
    restored = pickle.loads(pickle.dumps(IndexCache(tmp_path, 3.0)))
    assert (restored.folder, restored._wait_seconds) == (tmp_path, 3.0)


def test_without_a_folder_everything_is_built_each_time() -> None:
    build = Builder()
    cache = IndexCache.at("none")
    assert same(cache.arrays("starts", {}, build)) and same(cache.arrays("starts", {}, build))
    assert build.calls == 2
    with pytest.raises(ValueError, match="read-only"):
        cache.arrays("starts", {}, build)["small"][0, 0] = 5
    assert ARRAYS["small"][0, 0] == 1


@pytest.fixture(params=["a file where the folder should be", "a device that is full"])
def unwritable(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that nothing can be kept in, also by root."""
    if request.param == "a file where the folder should be":
        (tmp_path / "taken").write_text("")
        return tmp_path / "taken" / "cache"

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    return tmp_path / "cache"


def test_where_nothing_can_be_kept_it_is_said_once_and_memory_serves(
    unwritable: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build = Builder()
    cache = IndexCache(unwritable)
    for number in range(3):
        assert same(cache.arrays("starts", {"number": number}, build))
    assert build.calls == 3
    assert caplog.text.count("cannot be kept") == 1
    assert "data.index_cache_dir" in caplog.text
    folder = cache.folder_of("order", {}, lambda folder: (folder / "order.bin").write_bytes(b"1234"))
    assert (folder / "order.bin").read_bytes() == b"1234"
    assert not unwritable.exists() or not list(unwritable.iterdir())
    del cache
    assert not folder.exists()


def test_a_folder_that_can_only_be_read_still_serves(tmp_path: Path) -> None:
    build = Builder()
    made = IndexCache(tmp_path)
    made.arrays("starts", {}, build)
    code = f"""
        import mmap, os
        from pathlib import Path
        import numpy as np
        from megatron_xalign.data.index_cache import IndexCache
        os.setgid(65534); os.setuid(65534)
        cache = IndexCache(Path({str(tmp_path)!r}))
        def build():
            print("built")
            return {{"a": np.arange(3)}}
        print(cache.arrays("starts", {{}}, build)["starts"][2], cache.arrays("other", {{}}, build)["a"])
    """
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    tmp_path.chmod(0o555)
    for parent in tmp_path.parents[:3]:
        if parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o555)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["built", "8", "[0", "1", "2]"]


# --- processes

JOB = """
    import logging, os, sys, time
    from pathlib import Path
    import numpy as np
    from megatron_xalign.data.index_cache import IndexCache

    folder, seconds, wait = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    logging.basicConfig(level=logging.WARNING, stream=sys.stdout)

    def build():
        print("building", flush=True)
        # A negative time: until this process is asked to end.
        time.sleep(seconds) if seconds >= 0 else sys.stdin.read()
        return {"a": np.arange(100_000)}

    arrays = IndexCache(folder, wait).arrays("starts", {"seed": 1}, build)
    print("sum", int(arrays["a"].sum()), flush=True)
"""


def start(folder: Path, seconds: float, wait: float = 60.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(JOB), str(folder), str(seconds), str(wait)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(job: subprocess.Popen[str]) -> str:
    out, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors
    assert "sum 4999950000" in out
    return out


def test_of_many_processes_one_builds_and_the_others_wait(tmp_path: Path) -> None:
    jobs = [start(tmp_path, 0.5) for _ in range(5)]
    outputs = [finish(job) for job in jobs]
    assert sum("building" in output for output in outputs) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_on_disks_of_their_own_each_builds(tmp_path: Path) -> None:
    jobs = [start(tmp_path / name, 0.0) for name in ("one", "two")]
    assert all("building" in finish(job) for job in jobs)


def test_who_waited_too_long_builds_without_keeping(tmp_path: Path) -> None:
    first = start(tmp_path, -1)
    assert first.stdout is not None
    assert first.stdout.readline() == "building\n"
    second = finish(start(tmp_path, 0.0, wait=0.3))
    assert "building" in second and "another process has been building it for" in second
    finish(first)
    assert "building" not in finish(start(tmp_path, 0.0))


def test_a_killed_builder_holds_nobody_up_and_leaves_nothing(tmp_path: Path) -> None:
    first = start(tmp_path, 60.0)
    assert first.stdout is not None
    assert first.stdout.readline() == "building\n"
    waiting = start(tmp_path, 0.0)
    time.sleep(0.3)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=300)
    assert "building" in finish(waiting)
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["starts"]


def test_a_builder_killed_while_writing_leaves_what_the_next_one_removes(tmp_path: Path) -> None:
    code = f"""
        import os, signal
        from pathlib import Path
        import numpy as np
        from megatron_xalign.data.index_cache import IndexCache
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        IndexCache(Path({str(tmp_path)!r})).arrays("starts", {{"seed": 1}}, lambda: {{"a": np.arange(100_000)}})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert any(".partial-" in path.name for path in tmp_path.iterdir())
    assert "building" in finish(start(tmp_path, 0.0))
    assert [path.name.partition("-")[0] for path in tmp_path.iterdir()] == ["starts"]


# --- folders


def write_order(folder: Path) -> None:
    (folder / "order.bin").write_bytes(bytes(range(100)))


def test_folders_are_kept_whole(tmp_path: Path) -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        write_order(folder)

    cache = IndexCache(tmp_path)
    folder = cache.folder_of("order", {"seed": 1}, build)
    assert folder.parent == tmp_path and (folder / "order.bin").read_bytes() == bytes(range(100))
    assert IndexCache(tmp_path).folder_of("order", {"seed": 1}, build) == folder
    assert IndexCache(tmp_path).folder_of("order", {"seed": 2}, build) != folder
    assert len(calls) == 2
    (folder / index_cache._WANTED).write_text("[]")
    assert cache.folder_of("order", {"seed": 1}, build) == folder and len(calls) == 3

    def fail(folder: Path) -> None:
        write_order(folder)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cache.folder_of("order", {"seed": 3}, fail)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_was_not_opened_for_months_is_removed_by_whoever_builds_next(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path)
    build = Builder()
    cache.arrays("starts", {"number": 1}, build)
    cache.arrays("starts", {"number": 2}, build)
    cache.folder_of("order", {"number": 3}, write_order)
    cache.folder_of("order", {"number": 4}, write_order)
    (tmp_path / "notes").write_text("of the user")
    long_ago = time.time() - 100 * 86400
    for path in tmp_path.iterdir():
        os.utime(path, (long_ago, long_ago))
    # Opening is use.
    IndexCache(tmp_path).arrays("starts", {"number": 1}, build)
    IndexCache(tmp_path).folder_of("order", {"number": 3}, write_order)
    IndexCache(tmp_path).arrays("starts", {"number": 5}, build)
    assert build.calls == 3
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir()) == ["notes", "order", "starts", "starts"]
    IndexCache(tmp_path).arrays("starts", {"number": 1}, build)
    assert build.calls == 3


def test_a_file_system_without_locks_only_builds_more_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(index_cache.fcntl, "flock", no_locks)
    caplog.set_level(logging.WARNING)
    build = Builder()
    assert same(IndexCache(tmp_path).arrays("starts", {}, build))
    assert same(IndexCache(tmp_path).arrays("starts", {}, build))
    assert build.calls == 1
    assert not caplog.text
