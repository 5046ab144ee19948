"""Compiles ``csrc/`` into ``megatron_xalign/_native``; everything else about the package stands in pyproject.toml."""

import os
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import pybind11
except ModuleNotFoundError:
    # Only where build isolation is off or setup.py is called by hand; pip installs it from pyproject.toml otherwise.
    raise SystemExit(
        "error: pybind11 is needed to build megatron_xalign/_native. Run: pip install 'pybind11>=2.13'"
    ) from None

ROOT = Path(__file__).resolve().parent
FLAGS = ["-std=c++17", "-O3", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden"]
WHAT_TO_INSTALL = (
    "A C++17 compiler and Python's headers are needed: g++ 9 or newer (apt-get install g++ python3-dev; "
    "dnf install gcc-c++ python3-devel; conda install gxx_linux-64), or name another compiler with CXX=..."
)


def sources() -> list[str]:
    """C++ files, relative to this file as setuptools wants them, in an order that does not depend on the disk."""
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "src").glob("*.cpp"))


class BuildNative(build_ext):
    """Compiles file by file, several at a time, and turns a failure into one message that can be acted on."""

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one extension; SystemExit with what failed, why, and what to install."""
        compiler = shlex.split(os.environ.get("CXX") or "g++")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp)
        work.mkdir(parents=True, exist_ok=True)
        headers = [*ext.include_dirs, sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
        includes = [flag for folder in dict.fromkeys(headers) for flag in system_or_own(folder)]
        own_flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        objects = {source: str(work / f"{Path(source).stem}.o") for source in ext.sources}
        run_all(
            {
                f"compiling {source}": [*compiler, *FLAGS, "-fPIC", *own_flags, *includes, "-c", source, "-o", made]
                for source, made in objects.items()
            }
        )
        # Linked beside and renamed: an interrupted link leaves nothing that a later build or copy takes for a library.
        beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
        own_link_flags = shlex.split(os.environ.get("LDFLAGS", ""))
        try:
            linking = [*compiler, "-shared", *objects.values(), *own_link_flags, "-o", str(beside)]
            run_all({f"linking {target.name}": linking})
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


def system_or_own(folder: str) -> list[str]:
    """Include flags; warnings are errors in our own headers only."""
    own = Path(folder).resolve().is_relative_to(ROOT / "csrc")
    return ["-I", folder] if own else ["-isystem", folder]


def num_jobs() -> int:
    """How many compilers run at a time: MAX_JOBS, or one for every core this process may use."""
    given = os.environ.get("MAX_JOBS", "").strip()
    if not given:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not given.isdecimal() or int(given) < 1:
        raise SystemExit(f"error: MAX_JOBS={given} is not a number of compilers to run at a time; 1 or more.")
    return int(given)


def run_all(commands: dict[str, list[str]]) -> None:
    """Run compilers side by side, the largest files first; SystemExit with what failed and why if one does."""
    with ThreadPoolExecutor(num_jobs()) as pool:
        running = {pool.submit(run, command): what for what, command in by_size(commands)}
        for done in as_completed(running):
            problem = done.result()
            if problem is not None:
                # Those that run come to their end; no other one starts.
                pool.shutdown(cancel_futures=True)
                reason, output = problem
                stop(f"{running[done]} failed{reason}", output)


def by_size(commands: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """The command of the largest source first, so that none of them is left to run alone at the end."""

    def size(item: tuple[str, list[str]]) -> int:
        return -sum(Path(word).stat().st_size for word in item[1] if word.endswith(".cpp"))

    return sorted(commands.items(), key=size)


def run(command: list[str]) -> tuple[str, list[str]] | None:
    """Run the compiler; None, or why it failed and what it said."""
    print(shlex.join(command), flush=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        return f": the compiler {command[0]!r} cannot be run ({error.strerror}).", []
    if done.returncode:
        return f" ({command[0]} exited with {done.returncode}).", (done.stderr or done.stdout).splitlines()
    return None


def stop(what: str, output: list[str]) -> None:
    """End the build; the compiler's first errors are worth more than its last lines."""
    errors = [line for line in output if "error" in line.lower()] or output
    shown = "".join(f"\n    {line}" for line in errors[:8])
    print(f"\nerror: megatron_xalign: {what}{shown}\n{WHAT_TO_INSTALL}", file=sys.stderr, flush=True)
    raise SystemExit(1)


setup(
    ext_modules=[
        Extension(
            "megatron_xalign._native",
            sources=sources(),
            include_dirs=["csrc/include", pybind11.get_include()],
            depends=sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.h")),
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
