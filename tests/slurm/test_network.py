"""Which interface gloo is given on a node, and what is said of one that the node has not. On this machine's own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.slurm.cluster import ROOT

LOOPBACK = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "")


def network(**environment: str) -> tuple[int, str]:
    """How `network` of slurm/lib.sh ends, and the interface it has chosen or what it said last."""
    settings = {"BDPO_PYTHON": sys.executable, "SLURM_NNODES": "2", "BDPO_HEAD": "127.0.0.1", "BDPO_TAIL": "127.0.0.1"}
    cleared = {name: value for name, value in os.environ.items() if not name.endswith("_SOCKET_IFNAME")}
    script = '. "$1"; network && echo "${GLOO_SOCKET_IFNAME:-none}"'
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(ROOT / "slurm" / "lib.sh")],
        env=cleared | settings | environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()[-1]


def test_the_one_that_leads_to_the_first_node():
    """From the first node, to the last one. Of a single node gloo needs none."""
    assert network() == (0, LOOPBACK)
    assert network(SLURM_NODEID="1", BDPO_TAIL="no-such-node") == (0, LOOPBACK)
    assert network(SLURM_NNODES="1", BDPO_HEAD="no-such-node") == (0, "none")


def test_what_the_site_has_set_is_kept():
    assert network(GLOO_SOCKET_IFNAME=LOOPBACK, BDPO_TAIL="no-such-node") == (0, LOOPBACK)


@pytest.mark.parametrize("value", [LOOPBACK, LOOPBACK[0], f"={LOOPBACK}", f"none,{LOOPBACK}", "^docker", "^=docker0"])
def test_what_nccl_takes(value):
    assert network(NCCL_SOCKET_IFNAME=value) == (0, LOOPBACK)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GLOO_SOCKET_IFNAME", "bond77"),
        ("GLOO_SOCKET_IFNAME", LOOPBACK[0]),  # gloo takes whole names only
        ("GLOO_SOCKET_IFNAME", f"{LOOPBACK},bond77"),
        ("NCCL_SOCKET_IFNAME", "bond77"),
        ("NCCL_SOCKET_IFNAME", f"={LOOPBACK[0]}"),
    ],
)
def test_what_is_not_there_is_said(name, value):
    code, said = network(**{name: value})
    assert code == 2
    assert said.startswith(f"bdpo: {name}=")
    assert "no such interface; there are" in said and LOOPBACK in said


def test_a_node_that_cannot_be_reached_is_said():
    code, said = network(BDPO_TAIL="no-such-node.invalid")
    assert code == 2
    assert "there is no way to no-such-node.invalid" in said and "Set GLOO_SOCKET_IFNAME in slurm/site.sh" in said
