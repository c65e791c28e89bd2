"""A real SLURM cluster of three nodes for the tests of ``slurm/``, where this machine can have one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster

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
