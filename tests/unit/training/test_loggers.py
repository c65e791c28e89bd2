"""What MLflow and SwanLab are asked to do, by stubs of their modules; and MLflow's own store of files, where it is."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.reporting.loggers.logger import LoggedRun
from megatron_bdpo.training.reporting.loggers.mlflow_logger import MlflowLogger
from megatron_bdpo.training.reporting.loggers.optional import is_installed, load
from megatron_bdpo.training.reporting.loggers.swanlab_logger import SwanlabLogger
from megatron_bdpo.training.reporting.loggers.tensorboard_logger import TensorBoardLogger
from megatron_bdpo.training.reporting.loggers.wandb_logger import WandbLogger

FLAGS = {"lr": "1e-6", "pair-data": ["2", "a.jsonl"]}
VALUES = {"loss": 0.5, "rewards/margins validation": 0.1, "scale": float("nan")}
FINITE = {name: VALUES[name] for name in ("loss", "rewards/margins validation")}


class Asked:
    """Stands in for a module or an object: keeps every call with its arguments."""

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            self.calls.append((name, args, keywords))
            return self._answers.get(name)

        return call


@dataclass
class Param:
    key: str
    value: str


@dataclass
class Metric:
    key: str
    value: float
    timestamp: int
    step: int


@pytest.fixture
def mlflow(monkeypatch):
    """The client of a stub of MLflow."""
    client = Asked(create_experiment="7", create_run=SimpleNamespace(info=SimpleNamespace(run_id="abc")))
    entities = SimpleNamespace(Param=Param, Metric=Metric)
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=lambda: client, entities=entities))
    return client


@pytest.fixture
def run(tmp_path):
    def of(*, resumed: bool) -> LoggedRun:
        return LoggedRun("aligned", FLAGS, tmp_path, resumed)

    return of


def test_a_run_of_mlflow(mlflow, run, tmp_path):
    logger = MlflowLogger("preferences", run(resumed=False))
    logger.log(VALUES, 3)
    logger.close("finished")
    names = [name for name, _, _ in mlflow.calls]
    assert names == [
        "get_experiment_by_name", "create_experiment", "create_run", "log_batch", "log_batch", "set_terminated",
    ]  # fmt: skip
    assert mlflow.calls[2][1:] == (("7",), {"run_name": "aligned"})
    assert mlflow.calls[3][2]["params"] == [Param("lr", "1e-6"), Param("pair-data", "['2', 'a.jsonl']")]
    found = mlflow.calls[4][2]["metrics"]
    assert {(metric.key, metric.value, metric.step) for metric in found} == {(*item, 3) for item in FINITE.items()}
    assert mlflow.calls[5][1] == ("abc", "FINISHED")
    assert json.loads((tmp_path / "loggers.json").read_text()) == {"MLflow": "abc"}


def test_a_run_that_goes_on_is_one_run_of_mlflow(mlflow, run):
    MlflowLogger("preferences", run(resumed=False)).close("stopped")
    assert mlflow.calls[-1][1] == ("abc", "KILLED")
    mlflow.calls.clear()
    MlflowLogger("preferences", run(resumed=True)).log(VALUES, 4)
    assert [name for name, _, _ in mlflow.calls] == ["update_run", "log_batch"]
    mlflow.calls.clear()
    MlflowLogger("preferences", run(resumed=False))
    assert "create_run" in [name for name, _, _ in mlflow.calls], "one that begins again is another one"


def test_an_experiment_of_swanlab(monkeypatch, run):
    swanlab = Asked(init=SimpleNamespace(id="xyz"))
    monkeypatch.setitem(sys.modules, "swanlab", swanlab)
    logger = SwanlabLogger("preferences", run(resumed=False))
    logger.log(VALUES, 3)
    logger.close("stopped")
    SwanlabLogger("preferences", run(resumed=True))
    told = {"project": "preferences", "name": "aligned", "config": FLAGS}
    assert swanlab.calls == [
        ("init", (), told),
        ("log", (FINITE,), {"step": 3}),
        ("finish", (), {"state": "aborted"}),
        ("init", (), {**told, "id": "xyz", "resume": "allow"}),
    ]


def test_megatrons_writers():
    tensorboard, wandb = Asked(), Asked()
    TensorBoardLogger(tensorboard).log(VALUES, 3)
    WandbLogger(wandb).log({"loss": 0.5}, 3)
    assert tensorboard.calls == [("add_scalar", (*item, 3), {}) for item in FINITE.items()], "what is finite"
    assert wandb.calls == [("log", ({"loss": 0.5}, 3), {})]


def test_a_package_that_is_not_there():
    assert not is_installed("no_such_package_of_metrics")
    with pytest.raises(UserError, match=r"--flag needs no_such_package_of_metrics, .* pip install no_such_pack"):
        load("no_such_package_of_metrics", "--flag")


def test_a_file_of_ids_that_is_damaged(run, tmp_path):
    (tmp_path / "loggers.json").write_text("[")
    assert run(resumed=True).id_there("MLflow") is None


def test_mlflow_itself(monkeypatch, run, tmp_path):
    """Its store of files, or of SQLite: whatever it has by default in a directory of one's own."""
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(None)
    first = MlflowLogger("preferences", run(resumed=False))
    first.log(VALUES, 3)
    first.close("stopped")
    again = MlflowLogger("preferences", run(resumed=True))
    again.log({"loss": 0.25}, 4)
    again.close("finished")
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("preferences").experiment_id])
    assert found.info.status == "FINISHED" and found.data.params["lr"] == "1e-6"
    assert [(each.step, each.value) for each in client.get_metric_history(found.info.run_id, "loss")] == [
        (3, 0.5),
        (4, 0.25),
    ]
