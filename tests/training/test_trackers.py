"""Trackers send what metrics.jsonl has, survive their service, and name a package that is missing."""

from __future__ import annotations

import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megatron_xalign.config import LoggingConfig, RunConfig
from megatron_xalign.errors import ConfigError
from megatron_xalign.training.trackers import Tracker, build_trackers, flat

LINE = {
    "step": 10, "loss": 2.5, "loss_by_language": {"eng_Latn": 2.0, "fin_Latn": 3.0}, "grad_norm": float("inf"),
    "lr": 1e-3,
}


def test_a_line_is_flattened_by_name_and_what_is_not_finite_is_left_out() -> None:
    assert dict(flat(LINE)) == {
        "loss": 2.5, "loss_by_language/eng_Latn": 2.0, "loss_by_language/fin_Latn": 3.0, "lr": 1e-3
    }


def test_only_logged_steps_are_sent() -> None:
    sent: list[Any] = []
    tracker = Tracker("x", lambda step, numbers: sent.append((step, numbers["loss"])), lambda: sent.append("end"))
    tracker.after_step(9, {"step": 9, "lr": 1e-3})
    tracker.after_step(10, LINE)
    tracker.close()
    assert sent == [(10, 2.5), "end"]


def test_a_service_that_fails_is_given_up_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []

    def send(step: int, numbers: dict[str, float]) -> None:
        tries.append(step)
        raise ConnectionError("no route to host")

    tracker = Tracker("Weights & Biases", send, lambda: tries.append(-1))
    logging.getLogger("megatron_xalign").propagate = True
    with caplog.at_level(logging.WARNING):
        tracker.after_step(10, LINE)
        tracker.after_step(20, LINE)
        tracker.close()
    assert tries == [10]
    assert "no route to host" in caplog.text


def test_tensorboard_is_on_by_default_and_the_others_are_off(tmp_path: Path) -> None:
    (tracker,) = build_trackers(RunConfig(), tmp_path, start_step=0)
    tracker.after_step(10, LINE)
    tracker.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"loss_by_language/fin_Latn" in file.read_bytes()
    assert build_trackers(RunConfig(logging=LoggingConfig(tensorboard=False)), tmp_path, 0) == []


@pytest.mark.parametrize("setting", ["wandb_project", "mlflow_experiment"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, setting.split("_")[0], None)
    config = RunConfig(logging=LoggingConfig(**{setting: "study", "tensorboard": False}))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"pip install 'megatron-xalign\["):
        build_trackers(config, tmp_path, 0)


def test_wandb_gets_the_run_under_the_same_id_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    module = types.ModuleType("wandb")

    class Run:
        def log(self, numbers: dict[str, float], step: int) -> None:
            calls.append((step, numbers["loss"]))

        def finish(self) -> None:
            calls.append("finish")

    def init(**options: Any) -> Run:
        calls.append(options)
        return Run()

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = RunConfig(name="p0.05", logging=LoggingConfig(tensorboard=False, wandb_project="s", wandb_mode="offline"))
    for _ in range(2):
        (tracker,) = build_trackers(config, tmp_path, 0)
        tracker.after_step(10, LINE)
        tracker.close()
    first, *_, second, _, _ = calls
    assert calls[1:3] == [(10, 2.5), "finish"]
    assert first["id"] == second["id"] and len(first["id"]) == 16
    assert (first["project"], first["name"], first["mode"], first["resume"]) == ("s", "p0.05", "offline", "allow")
    assert first["config"]["optimizer"]["lr"] == RunConfig().optimizer.lr


def test_a_service_that_cannot_be_reached_at_the_start_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("wandb")

    def init(**_: Any) -> None:
        raise TimeoutError("no network")

    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = RunConfig(logging=LoggingConfig(tensorboard=False, wandb_project="study"))
    assert build_trackers(config, tmp_path, 0) == []


def test_mlflow_goes_on_with_the_run_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    module = types.ModuleType("mlflow")
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))
    for name in ("set_tracking_uri", "set_experiment", "log_params", "log_metrics", "start_run", "end_run"):
        def note(*given: Any, _name: str = name, **options: Any) -> Any:
            calls.append((_name, given, options))
            return run

        setattr(module, name, note)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = RunConfig(logging=LoggingConfig(tensorboard=False, mlflow_experiment="study"))
    for _ in range(2):
        (tracker,) = build_trackers(config, tmp_path, 0)
        tracker.after_step(10, LINE)
        tracker.close()
    started = [options["run_id"] for name, _, options in calls if name == "start_run"]
    assert started == [None, "abc"]
    assert [options["step"] for name, _, options in calls if name == "log_metrics"] == [10, 10]
    (parameters,) = [given[0] for name, given, _ in calls if name == "log_params"]
    assert parameters["optimizer.adam_beta2"] == "0.95"
    assert calls[0][1][0].startswith("file://")
