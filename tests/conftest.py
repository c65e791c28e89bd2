"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.harness.flags import remember_descriptions_of_flags
from tests.harness.ranks import RankPool, start_server


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int], RankPool]]:
    """``ranks(n)`` is a warm pool of n gloo ranks."""
    start_server()  # here and not at the first job: a test that changes the environment would do so for all ranks
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size, tmp_path_factory.mktemp(f"ranks{world_size}"))
        return pools[world_size]

    yield pool
    for each in pools.values():
        each.close()


def pytest_runtest_setup() -> None:
    remember_descriptions_of_flags()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-matrix", action="store_true", help="compare every layout with every loss and every optimizer"
    )
    parser.addoption(
        "--write-parity-table", action="store_true", help="write docs/parity.md from what --full-matrix has seen"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not asked for, and skip what this machine cannot run."""
    if not config.getoption("--full-matrix"):
        left_out = [item for item in items if "full_matrix" in item.keywords]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if "full_matrix" not in item.keywords]
    skip_gpu_tests_without_a_gpu(items)


def skip_gpu_tests_without_a_gpu(items: list[pytest.Item]) -> None:
    """What is marked gpu runs CUDA kernels, for which a CPU has no stand-in: ``tests/gpu/run_all.sh`` runs all of it.

    torch is imported only if there is such a test.
    """
    gpu_items = [item for item in items if "gpu" in item.keywords]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: see tests/gpu/run_all.sh"))
