"""Observers of the user's own: found, built, and their state taken, or a message that says what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_xalign.config import ObserverConfig, RunConfig
from megatron_xalign.config.tree import from_tree, to_tree
from megatron_xalign.errors import ConfigError, XAlignError
from megatron_xalign.formats.run_folder import differing_settings
from megatron_xalign.topology import LocalPart
from megatron_xalign.training.observers import build_observers, find_factories, parts_of, take_state

SOURCE = """
from dataclasses import dataclass, field

@dataclass
class Counter:
    run: object
    every: int = 1
    heard: list = field(default_factory=list)

    def before_step(self, step): pass
    def after_step(self, step, metrics): self.heard.append(step)
    def after_save(self, step, path): pass
    def close(self): pass

def made(run):
    return Counter(run, every=7)

number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def find(factory: str, **options: Any) -> Any:
    return find_factories([ObserverConfig(factory=factory, options=options)])[0]


def test_classes_and_functions_of_files_and_modules(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find(f"{file}:Counter", every=2)("run").every == 2
    assert find(f"{file}:made")("run").every == 7
    monkeypatch.chdir(file.parent)
    assert find("mine.py:Counter")("run").run == "run"
    monkeypatch.syspath_prepend(str(file.parent))
    assert find("mine:Counter")("run").every == 1


def test_the_same_file_is_loaded_once(file: Path) -> None:
    one, other = find(f"{file}:Counter"), find(f"{file}:Counter")
    assert type(one("run")) is type(other("run"))


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        ("nothing.py:Counter", {}, "there is no file nothing.py in"),
        ("no_such_module:Counter", {}, r"ModuleNotFoundError.* a file is given as no_such_module\.py:NAME"),
        ("FILE:Countre", {}, r"has no class or function Countre\. Did you mean .*:Counter\?"),
        ("builtins:dict", {}, "is no class or function written in Python"),
        ("FILE:number", {}, "has no class or function number"),
        ("FILE:Counter", {"evry": 2}, r"observers\.0\.factory=.*'evry'.* options that it takes: every, heard"),
        ("FILE:made", {"every": 2}, "options that it takes: none"),
    ],
)
def test_what_cannot_be_found_is_told(file: Path, factory: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find(factory.replace("FILE", str(file)), **options)


def test_an_error_in_the_file_is_told_with_its_line(file: Path) -> None:
    file.write_text("import os\n\nvalue = {}['nothing']\n", encoding="utf-8")
    for _ in range(2):  # what could not be imported is not kept
        with pytest.raises(ConfigError, match=r"cannot be imported: KeyError at .*mine\.py:3: 'nothing'"):
            find(f"{file}:Counter")
    file.write_text("import no_such_neighbour\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.py:1: No module named 'no_such_neighbour'\. Modules are"):
        find(f"{file}:Counter")
    file.write_text("def broken(:\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"SyntaxError.*mine\.py"):
        find(f"{file}:Counter")


@pytest.mark.parametrize("factory", ["mine.py", "mine:", ":Counter", "mine.py:a b", ""])
def test_a_factory_is_a_place_and_a_name(factory: str) -> None:
    with pytest.raises(ConfigError, match=r"should be FILE\.py:NAME"):
        ObserverConfig(factory=factory)


def test_the_config_carries_them_and_they_make_no_other_run() -> None:
    tree = {"observers": [{"factory": "mine.py:Counter", "options": {"every": 2, "of": ["a", {"b": None}]}}]}
    config = from_tree(RunConfig, tree)
    assert from_tree(RunConfig, to_tree(config)) == config
    assert config.observers[0].options == tree["observers"][0]["options"]
    assert differing_settings(config, RunConfig()) == []
    with pytest.raises(ConfigError, match=r"observers\.0\.options=.* should be of numbers"):
        from_tree(RunConfig, {"observers": [{"factory": "mine.py:Counter", "options": {"when": object()}}]})


class Quiet:
    def before_step(self, step: int) -> None: ...
    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None: ...
    def after_save(self, step: int, path: Path) -> None: ...
    def close(self) -> None: ...


class Stateful(Quiet):
    def __init__(self, state: Any, name: Any = "mine") -> None:
        self.name, self._state = name, state

    def state(self) -> Any:
        return self._state

    def restore(self, state: Any) -> None:
        self._state = state


def build(*observers: Any) -> list[Any]:
    return build_observers([lambda run, one=one: one for one in observers], None)  # type: ignore[misc, arg-type]


def test_what_is_no_observer_is_told() -> None:
    quiet, stateful = Quiet(), Stateful(({}, {}))
    assert build(quiet, stateful) == [quiet, stateful]

    class Half:
        def before_step(self, step: int) -> None: ...
        def close(self) -> None: ...

    with pytest.raises(ConfigError, match="Half lacks after_step, after_save"):
        build(Half())
    for name in ("neurons", "loss_guard", "", 3, "mine"):
        with pytest.raises(ConfigError, match="must be a text that no other observer has"):
            build(stateful, Stateful(({}, {}), name))

    class Forgetful(Quiet):
        def state(self) -> Any: ...

    with pytest.raises(ConfigError, match="all three"):
        build(Forgetful())


def test_a_state_is_what_a_checkpoint_will_give_back() -> None:
    part = LocalPart(tensor=torch.ones(2))
    values, parts = take_state(Stateful(({"steps": (1, 2), "by": {3: 0.1}}, {})))
    assert values == {"steps": [1, 2], "by": {"3": 0.1}} and parts == {}
    with pytest.raises(XAlignError, match=r"state\(\) of Stateful \(mine\).*parts_of"):
        take_state(Stateful(({}, {"sums": part})))
    for wrong, message in (
        (None, "two mappings"),
        (({"sums": torch.ones(2)}, {}), "not JSON-able"),
        (({"sums": {1, 2}}, {}), "not JSON-able"),
        (([1], {}), "two mappings"),
        (({}, None), "two mappings"),
        (({}, {"sums": torch.ones(2)}), "topology.LocalPart"),
    ):
        with pytest.raises(XAlignError, match=message):
            take_state(Stateful(wrong))

    class Broken(Stateful):
        def state(self) -> Any:
            raise ValueError("its own fault")

    with pytest.raises(ValueError, match="its own fault"):
        take_state(Broken(None))

    class WithArrays(Stateful):
        def parts_of(self, values: Mapping[str, Any]) -> dict[str, LocalPart]:
            return {"sums": part}

    assert take_state(WithArrays(({}, {"sums": part})))[1] == {"sums": part}
    assert parts_of(WithArrays(None))({}) == {"sums": part} and parts_of(Stateful(None))({}) == {}
