"""Arrows point down: what each room may import, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_xalign"
ROOMS = ("data", "training", "capture", "analysis", "steering", "report", "convert", "evaluation")
FLOOR = (
    "errors", "config", "batch", "batch_sizes", "progress", "signals", "names", "residual", "topology",
    "platform",
    "formats",
    "_native",
    "__version__",
)
MEGATRON_ALLOWED = ("platform.py", "topology.py", "training/", "convert/", "capture/recorder.py")
HEAVY = ("torch", "megatron", "transformers", "matplotlib", "sklearn")


def imports_of(path: Path) -> Iterator[str]:
    """Every module a file imports, at any depth of indentation."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_files() -> list[Path]:
    return [path for path in source_files() if path.relative_to(PACKAGE).parts[0] in ROOMS]


def own_part(module: str) -> str | None:
    """``megatron_xalign.data.blend.Blend`` -> ``data``; None for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "megatron_xalign" and len(parts) > 1 else None


@pytest.mark.parametrize("path", room_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_do_not_import_one_another(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    for module in imports_of(path):
        part = own_part(module)
        assert part in (None, room, *FLOOR), f"{path.name} imports {module}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "formats").glob("*.py")), ids=lambda path: path.name)
def test_formats_rest_on_the_floor_only(path: Path) -> None:
    allowed = (None, "formats", "errors", "config", "names", "progress", "__version__")
    for module in imports_of(path):
        assert own_part(module) in allowed, module


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_megatron_core_appears_only_where_a_model_is_built_or_run(path: Path) -> None:
    place = path.relative_to(PACKAGE).as_posix()
    if not any(place.startswith(allowed) for allowed in MEGATRON_ALLOWED):
        assert not [module for module in imports_of(path) if module.split(".")[0] == "megatron"]


def test_the_only_argument_parser_is_the_command_line() -> None:
    users = [path for path in source_files() if "argparse" in {m.split(".")[0] for m in imports_of(path)}]
    assert {path.relative_to(PACKAGE).parts[0] for path in users} == {"cli"}


def test_analysis_and_the_command_line_load_neither_torch_nor_megatron() -> None:
    modules = ("cli", "config", "formats.token_file", "data", "analysis.neurons", "analysis.similarity", "report.page")
    imports = "; ".join(f"import megatron_xalign.{module}" for module in modules)
    code = f"import sys; {imports}; print([module for module in {HEAVY!r} if module in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
