"""MLflow: a run of an experiment, wherever ``MLFLOW_TRACKING_URI`` says that it keeps them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Literal

from megatron_bdpo.training.reporting.loggers.logger import LoggedRun
from megatron_bdpo.training.reporting.loggers.optional import load

FLAG = "--mlflow-experiment"

#: Of a parameter's value; MLflow's own limit in its servers is 6000 characters.
_LONGEST = 500


class MlflowLogger:
    """See ``Logger``. MLflow's client is used, and not its run of the process, which a user's program may have."""

    name = "MLflow"
    gets_all = True

    def __init__(self, experiment: str, run: LoggedRun) -> None:
        """
        Args:
            experiment: by name; made where there is none.

        Raises:
            UserError: MLflow is not installed.
            Exception: of MLflow: it cannot reach where it keeps runs.
        """
        self._mlflow = load("mlflow", FLAG)
        self._client: Any = self._mlflow.MlflowClient()
        before = run.id_there(self.name)
        self._id = before or self._begin(experiment, run)
        if before:
            self._client.update_run(before, status="RUNNING")
        run.keep_id(self.name, self._id)

    def _begin(self, experiment: str, run: LoggedRun) -> str:
        known = self._client.get_experiment_by_name(experiment)
        where = known.experiment_id if known else self._client.create_experiment(experiment)
        id_there = str(self._client.create_run(where, run_name=run.name or None).info.run_id)
        parameters = [self._mlflow.entities.Param(flag, str(value)[:_LONGEST]) for flag, value in run.flags.items()]
        self._client.log_batch(id_there, params=parameters)
        return id_there

    def log(self, values: Mapping[str, float], step: int) -> None:
        now, metric = int(1000 * time.time()), self._mlflow.entities.Metric
        metrics = [metric(name, value, now, step) for name, value in values.items() if math.isfinite(value)]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, state: Literal["finished", "stopped"]) -> None:
        self._client.set_terminated(self._id, "FINISHED" if state == "finished" else "KILLED")
