"""Version checks, the CPU emulation and the seams: what ties us to one Megatron."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bdpo.errors import UserError
from megatron_bdpo.platform import cpu, installation

needs_emulation = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is emulated")

# Versions


@pytest.fixture
def installed(monkeypatch):
    """``installed(megatron="0.19.2", pytorch="2.13.0", ...)``: pretend that these packages are here."""

    def pretend(megatron: str | None = "0.19.2", modules: tuple[str, ...] = (), pytorch: str = "2.13.0") -> None:
        def version(name: str) -> str:
            assert name == "megatron-core"
            if megatron is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return megatron

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(torch, "__version__", pytorch)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in modules else None)

    return pretend


@pytest.mark.parametrize("version", ["0.19.2", "0.19.3", "0.19.10", "0.19.2.post1", "0.19.2+cu130"])
def test_supported_versions(installed, version):
    installed(megatron=version)
    installation.check_environment()


@pytest.mark.parametrize("version", ["0.16.1", "0.19.1", "0.19.2rc1", "0.20.0", "0.20", "1.0"])
def test_other_versions_are_refused_with_what_to_install(installed, version):
    installed(megatron=version)
    with pytest.raises(UserError, match=r"written for >=0\.19\.2,<0\.20") as refusal:
        installation.check_environment()
    assert f"megatron-core {version} is installed" in str(refusal.value)
    assert "pip install 'megatron-core>=0.19.2,<0.20'" in str(refusal.value)


def test_missing_megatron_is_refused_with_what_to_install(installed):
    installed(megatron=None)
    with pytest.raises(UserError, match=r"megatron-core is not installed. Install it with: pip install 'megatron-core"):
        installation.check_environment()


@pytest.mark.parametrize("version", ["2.8.0", "2.8.0a0+34c6371d24.nv25.08", "2.11.0+cu130", "2.15.0+cpu", "3.0"])
def test_supported_torch(installed, version):
    installed(pytorch=version)
    installation.check_environment()


@pytest.mark.parametrize("version", ["2.6.0", "2.7.1+cu128", "2.7.0a0+79aa17489c.nv25.04"])
def test_an_older_torch_is_refused_with_what_to_install(installed, version):
    installed(pytorch=version)
    with pytest.raises(UserError, match=r"needs 2\.8\.0 or newer.*pip install 'torch>=2\.8\.0'") as refusal:
        installation.check_environment()
    assert f"torch {version} is installed" in str(refusal.value)


def test_apex_that_is_not_nvidias_is_refused(installed):
    installed(modules=("apex", "apex.optimizers"))
    installation.check_environment()
    installed(modules=("apex",))
    with pytest.raises(UserError, match="pip uninstall apex"):
        installation.check_environment()


def test_this_environment_passes():
    installation.check_environment()


# Emulation


def test_emulation_never_hides_a_gpu(monkeypatch):
    before = torch.cuda.current_device
    monkeypatch.setattr(cpu, "_active", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="must not be installed where a GPU is usable"):
        cpu.emulate_cuda_on_cpu()
    assert not cpu.is_active()
    assert torch.cuda.current_device is before


@needs_emulation
def test_packages_for_gpus_are_left_out(tmp_path):
    """As on a login node, where Transformer Engine does not find the driver's library."""
    no_driver = "raise OSError('libcuda.so.1: cannot open shared object file')"
    for module, content in {"transformer_engine": no_driver, "apex": "", "apex/optimizers": no_driver}.items():
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text(content)
    program = (
        "from megatron_bdpo.platform.boot import prepare_platform\n"
        "prepare_platform()\n"
        "import megatron.core.transformer.attention\n"
        "from megatron_bdpo.training.flags.arguments import Arguments\n"
        "print(Arguments.parse([]).settings.architecture.implementation)"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[3])])
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.split()[-1:] == ["local"], done.stderr


def test_tests_run_without_the_emulation():
    """It lasts as long as a process, so it belongs to the ranks and not to this one."""
    assert not cpu.is_active()


def emulated() -> dict[str, Any]:
    """What a rank gets when it asks for CUDA."""
    import megatron.core.tensor_parallel.random as megatron_random

    mode = cpu._active
    cpu.emulate_cuda_on_cpu()  # again
    torch.manual_seed(1)
    kept = torch.cuda.get_rng_state()
    first = torch.rand(3)
    megatron_random._set_cuda_rng_state(kept)
    again = torch.rand(3)
    stream, event = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.current_stream())
        event.record()
    torch.cuda.synchronize()
    module = torch.nn.Linear(2, 2)
    devices = {
        "by name": torch.zeros(1, device="cuda"),
        "by index": torch.zeros(1, device=0),
        "by name and index": torch.zeros(1, device="cuda:3"),
        "by object": torch.zeros(1, device=torch.device("cuda", 1)),
        "current": torch.zeros(1, device=torch.cuda.current_device()),
        "moved": torch.zeros(1).cuda(),
        "moved to": torch.zeros(1).to("cuda"),
        "moved to with a type": torch.zeros(1).to("cuda", torch.float64),
        "moved module": module.cuda().weight,
        "pinned": torch.zeros(1).pin_memory(),
        "meta stays": torch.zeros(1, device="meta"),
    }
    return {
        "installed once": mode is not None and cpu._active is mode,
        "is_available": torch.cuda.is_available(),
        "devices": {name: tensor.device.type for name, tensor in devices.items()},
        "count": torch.cuda.device_count(),
        "types": [torch.zeros(1).type(), torch.zeros(1).bfloat16().type()],
        "cast": torch.zeros(1).type(torch.float64).dtype,
        "same draws": torch.equal(first, again),
        "elapsed": event.elapsed_time(event),
        "memory": set(torch.cuda.memory_stats().values()),
    }


@needs_emulation
def test_cuda_calls_are_answered_by_the_cpu(ranks):
    (found,) = ranks(1)(emulated)
    assert found.pop("devices") == {
        **dict.fromkeys(["by name", "by index", "by name and index", "by object", "current"], "cpu"),
        **dict.fromkeys(["moved", "moved to", "moved to with a type", "moved module", "pinned"], "cpu"),
        "meta stays": "meta",
    }
    assert found == {
        "installed once": True,
        "is_available": False,
        "count": 1,
        "types": ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"],
        "cast": torch.float64,
        "same draws": True,
        "elapsed": 0.0,
        "memory": {0},
    }


# Seams

SEAMS = (
    "initialize_megatron",
    "load_checkpoint",
    "get_optimizer_param_scheduler",
    "setup_model_and_optimizer",
    "train",
    "get_forward_backward_func",
    "consume_seqlen_stats_in_iteration",
    "training_log",
    "evaluate",
)


def seams() -> dict[str, list[bool]]:
    """For every name, whether it is replaced within the block and the original after it: left normally, by an error."""
    import megatron.training.training as trainer

    from megatron_bdpo.platform.seams import trainer_seams

    originals = {name: getattr(trainer, name) for name in SEAMS}
    replaced: dict[str, list[bool]] = {name: [] for name in SEAMS}
    for error in (None, KeyError):
        try:
            with trainer_seams(types.SimpleNamespace(), types.SimpleNamespace(wants_digests=True)):
                for name, original in originals.items():
                    replaced[name].append(getattr(trainer, name) is not original)
                if error:
                    raise error
        except KeyError:
            pass
        for name, original in originals.items():
            replaced[name].append(getattr(trainer, name) is original)
    return replaced


def test_trainer_is_put_back_after_a_run(ranks):
    (replaced,) = ranks(1)(seams)
    assert replaced == {name: [True] * 4 for name in SEAMS}


def _copied_by_the_writer() -> list[bool]:
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    live = torch.ones(3)
    ((_, _, (_, [(item, copied)])),) = FileSystemWriterAsync.preload_tensors([("file", "key", ([], [("item", live)]))])
    live.zero_()
    return [item == "item", bool((copied == 1).all())]


@needs_emulation
def test_the_checkpoint_writer_does_not_share_weights_with_the_next_step(ranks):
    """On a GPU they are copied to the host."""
    assert ranks(1)(_copied_by_the_writer) == [[True, True]]
