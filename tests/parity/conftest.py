"""Recorded jobs as wholes, those on one rank once each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.jobs import TINY_MODEL
from tests.harness.recording import Mistake, Recording, WholeTensors, merge, train_and_record

Run = Callable[..., Recording[WholeTensors]]

#: Adam divides by the root of the second moment plus adam_eps. With one as small as usual an element whose gradient is
#: nothing but rounding moves by the whole learning rate in either direction; with this one it hardly moves.
WELL_CONDITIONED = {"adam_eps": 1e-2, "lr": 1e-2}

#: Megatron's 0.02 is for wide models: this narrow one would attend to everything alike, and mistakes would not show.
TELLING = {"init_method_std": 0.1}


@pytest.fixture(scope="session")
def run(ranks, tmp_path_factory) -> Run:
    """``run(world_size, flags, overrides)``: the tiny job on that many ranks, which score their own reference."""
    directory = tmp_path_factory.mktemp("parity")

    def run(
        world_size: int, flags: list[str], overrides: dict[str, Any], mistake: Mistake | None = None
    ) -> Recording[WholeTensors]:
        caches = {"pair_cache_dir": str(directory / "tokens")}
        if not {"resident", "columns"} & set(flags):
            caches["reference_cache"] = str(Path(tempfile.mkdtemp(dir=directory)) / "reference")
        job = TINY_MODEL | WELL_CONDITIONED | TELLING | overrides | caches
        return merge(ranks(world_size)(train_and_record, flags, mistake=mistake, **job))

    return run


@pytest.fixture(scope="session")
def one_process(run) -> Run:
    """``one_process(flags, overrides)``: the same on one rank; a second call with the same arguments is free."""
    known: dict[Any, Recording[WholeTensors]] = {}

    def one_process(flags: list[str], overrides: dict[str, Any]) -> Recording[WholeTensors]:
        key = (*flags, *sorted(overrides.items()))
        if key not in known:
            known[key] = run(1, flags, overrides)
        return known[key]

    return one_process
