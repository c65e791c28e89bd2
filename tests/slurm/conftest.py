"""A real SLURM cluster of three nodes for the tests of ``slurm/``, where this machine can have one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, Job

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"needs a SLURM to try things on ({', '.join(missing)} missing): make slurm-lab, as root on Debian")
    if os.geteuid() != 0:
        pytest.skip("starting a SLURM cluster in namespaces needs root")
    allowed = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True)
    if allowed.returncode:
        pytest.skip(f"namespaces are not allowed here: {allowed.stderr.decode().strip()}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.lab("up")
        yield cluster
    finally:
        cluster.lab("down")


@pytest.fixture(scope="session")
def jobs(cluster: Cluster) -> dict[str, Job]:
    """All cases of ``test_matrix``, submitted."""
    from tests.slurm.test_matrix import CASES

    return {name: cluster.submit_case(name, case) for name, case in CASES.items()}


@pytest.fixture(scope="session")
def trainings(cluster: Cluster, request: pytest.FixtureRequest) -> dict[str, Job]:
    """Those of ``test_launch`` that the chosen tests name (``uses``), submitted in the tests' order."""
    from tests.slurm.test_launch import TRAININGS

    names = (name for item in request.session.items for name in getattr(item.function, "trainings", ()))  # type: ignore[attr-defined]
    return {name: cluster.submit_case(name, TRAININGS[name]) for name in dict.fromkeys(names)}


@pytest.fixture(autouse=True)
def begin_with_all_jobs(request: pytest.FixtureRequest) -> None:
    """The first test that needs a cluster submits what all chosen tests want: it runs beside them."""
    if "cluster" in request.fixturenames:
        for name in ("trainings", "jobs"):
            if any(name in item.fixturenames for item in request.session.items):  # type: ignore[attr-defined]
                request.getfixturevalue(name)
