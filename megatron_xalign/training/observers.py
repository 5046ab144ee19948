"""What watches a run: the four moments, state that travels in checkpoints, and observers of the user's own."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast, runtime_checkable

from megatron_xalign.batch import CurrentBatch
from megatron_xalign.config import ObserverConfig, RunConfig
from megatron_xalign.errors import ConfigError, XAlignError
from megatron_xalign.topology import LocalPart, ObserverState, Ranks
from megatron_xalign.training.forward import ForwardOnly

_MOMENTS = ("before_step", "after_step", "after_save", "close")


class Observer(Protocol):
    """Something that watches training. ``step`` counts finished optimizer steps.

    Every process has its observers and all of them are called at the same moments, so they may use collectives. As
    with blocks inside one another, the first that hears of ``before_step`` is the last that hears of ``after_step``:
    what runs the model itself goes before what listens to it. One of the user's own goes before, unless it has
    ``listens = True``. An observer that raises stops the run. One that has to go on from a checkpoint has two methods
    more, ``state`` and ``restore`` (``StatefulObserver``).
    """

    def before_step(self, step: int) -> None:
        """Called before the forward passes that lead to ``step + 1``; 0 is before the first."""

    def after_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Called after the weights have moved.

        ``metrics`` always has step, consumed_tokens, grad_norm and lr, and at logged steps the whole line of
        ``metrics.jsonl``. Where the guard left a step's update out it has ``passed_over``, and grad_norm is None.
        """

    def after_save(self, step: int, path: Path) -> None:
        """Called when the checkpoint of ``step`` is complete at ``path``."""

    def close(self) -> None:
        """Called once, however the run ends."""


@runtime_checkable
class StatefulObserver(Protocol):
    """An observer whose state travels in checkpoints.

    One whose state has arrays has ``parts_of(values)`` too: from the values to such arrays, to be filled.
    """

    name: str
    """Its name there."""

    def state(self) -> ObserverState:
        """What it needs to go on; arrays are the same on all data-parallel ranks. Every process calls it."""

    def restore(self, state: ObserverState) -> None:
        """Go on from a state. Also called after every save with what was saved: a resumed run goes on from sums over
        all ranks, and so must this one, to end with the same last bits. And in the middle of a step, where the guard
        sends the run back to its last checkpoint."""


def take_state(observer: StatefulObserver) -> ObserverState:
    """An observer's state as a checkpoint gives it back: through JSON, so that one that goes on sees the same.

    Raises:
        XAlignError: it is not of that form.
    """
    who = f"state() of {type(observer).__name__} ({observer.name})"
    state: Any = observer.state()
    if not (isinstance(state, tuple) and len(state) == 2 and all(isinstance(part, Mapping) for part in state)):
        raise XAlignError(f"{who} returned {state!r}; it should be two mappings by name, JSON-able values and arrays.")
    values, parts = state
    try:
        stored = json.loads(json.dumps(values))
    except (TypeError, ValueError) as error:
        raise XAlignError(f"{who}: the values are not JSON-able ({error}); tensors go among the arrays.") from error
    if wrong := [name for name, part in parts.items() if not isinstance(part, LocalPart)]:
        raise XAlignError(f"{who}: {', '.join(map(str, wrong))} should be of topology.LocalPart, as all arrays.")
    if parts and not hasattr(observer, "parts_of"):
        raise XAlignError(
            f"{who} has the arrays {', '.join(parts)}; reading them again takes a method parts_of(values) that returns "
            "such arrays, of the same shapes, to be filled."
        )
    return stored, dict(parts)


def listens(observer: Observer) -> bool:
    """Whether it is to hear training batches only, and so comes after all that run the model themselves."""
    return bool(getattr(observer, "listens", False))


def parts_of(observer: StatefulObserver) -> Callable[[dict[str, Any]], Mapping[str, LocalPart]]:
    """From an observer's stored values to the arrays that go with them."""
    found = getattr(observer, "parts_of", None)
    return cast(Callable[[dict[str, Any]], Mapping[str, LocalPart]], found) if found is not None else lambda values: {}


# --- the user's own ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What an observer of the user's own is built with."""

    config: RunConfig
    """The resolved config."""
    run_folder: Path
    """Where files go; seen by every process, written by ``ranks.rank == 0`` alone."""
    ranks: Ranks
    """This process among the others, and sums over them."""
    model_chunks: Sequence[Any]
    """Megatron's model, one chunk for every block of layers that this process has, wrapped for data parallelism."""
    forward_only: ForwardOnly
    """Runs micro-batches through the pipeline without a backward pass: losses of tokens, float32 [B, S], on the last
    stage. Every process calls it, in ``before_step`` or ``after_step``, where nobody listens to the model."""
    current_batch: CurrentBatch
    """For hooks: which micro-batch is running."""
    languages: Sequence[str]
    """What language ids in batches count."""
    source_names: Sequence[str]
    """What source ids in batches count."""
    train_steps: int
    """Steps of the whole run."""
    start_step: int
    """Steps done before this start."""


ObserverFactory = Callable[[RunContext], Observer]
"""A class, or a function, that gives an observer of a run."""


def find_factories(wanted: Sequence[ObserverConfig]) -> list[ObserverFactory]:
    """Import what ``observers`` in the config names, and bind the options; nothing is built yet.

    Raises:
        ConfigError: it cannot be found or imported, or does not take these options.
    """
    return [_find(one, f"observers.{number}.factory={one.factory}") for number, one in enumerate(wanted)]


def build_observers(factories: Sequence[ObserverFactory], context: RunContext) -> list[Observer]:
    """Build the user's observers.

    Raises:
        ConfigError: what was built does not have the four moments, or the names of two states are the same.
    """
    found: list[Observer] = []
    names = {"neurons", "loss_guard"}  # ours
    for factory in factories:
        observer = factory(context)
        who = type(observer).__name__
        if missing := [name for name in _MOMENTS if not callable(getattr(observer, name, None))]:
            raise ConfigError(
                f"an observer has {', '.join(_MOMENTS)}; {who} lacks {', '.join(missing)}. Write one that does nothing."
            )
        if isinstance(observer, StatefulObserver):
            if not isinstance(observer.name, str) or not observer.name or observer.name in names:
                raise ConfigError(
                    f"{who}: name={observer.name!r} must be a text that no other observer has; taken: "
                    f"{', '.join(sorted(names))}."
                )
            names.add(observer.name)
        elif any(callable(getattr(observer, name, None)) for name in ("state", "restore")):
            raise ConfigError(f"{who}: one whose state is saved has name, state() and restore(state), all three.")
        found.append(observer)
    return found


def _find(wanted: ObserverConfig, setting: str) -> ObserverFactory:
    place, _, name = wanted.factory.rpartition(":")
    module = _import(place, setting)
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [own for own, value in vars(module).items() if callable(value) and not own.startswith("_")]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {place}:{near[0]}?" if near else ""
        raise ConfigError(f"{setting}: {place} has no class or function {name}.{hint}")
    try:
        signature = inspect.signature(factory)
    except ValueError:
        raise ConfigError(f"{setting}: {name} is no class or function written in Python.") from None
    try:
        signature.bind(None, **wanted.options)
    except TypeError as error:
        taken = ", ".join(list(signature.parameters)[1:]) or "none"
        raise ConfigError(
            f"{setting}: it is called with the run and options {wanted.options}, which does not fit ({error}); "
            f"options that it takes: {taken}."
        ) from None
    return partial(factory, **wanted.options)


def _import(place: str, setting: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).resolve()
        if not path.is_file():
            raise ConfigError(f"{setting}: there is no file {place} in {Path.cwd()}.")
        name = f"xalign_observers_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
        if name in sys.modules:
            return sys.modules[name]
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Known before it runs: dataclasses look themselves up.
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        return module
    except ConfigError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if "importlib" in last.filename else f" at {last.filename}:{last.lineno}"
        hint = ""
        if isinstance(error, ModuleNotFoundError):
            file = "" if place.endswith(".py") else f"; a file is given as {place.replace('.', '/')}.py:NAME"
            hint = f". Modules are looked for in PYTHONPATH{file}."
        raise ConfigError(
            f"{setting} cannot be imported: {type(error).__name__}{where}: {error}{hint}"
        ) from error
