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


@pytest.fixture(autouse=True)
def begin_with_the_cases(request: pytest.FixtureRequest) -> None:
    """The first test that needs a cluster submits them, if any of their tests comes later: they run beside it."""
    if "cluster" in request.fixturenames and any("jobs" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("jobs")
