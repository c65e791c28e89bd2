"""Layouts that a model does not fit are refused with every reason, and with a layout near them that works."""

from __future__ import annotations

from typing import Any

import pytest

from tests.harness.jobs import refusals

TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
EP = "--expert-model-parallel-size"
EXPERTS = "--num-experts 4 --sequence-parallel"

#: Flags, ranks -> a reason, and the layout that is proposed. The model: 4 layers, 4 heads, 2 query groups, MLP 64.
REFUSED = {
    ("ranks", f"{TP} 2", 3): ("3 ranks cannot be split into model replicas of 2", "data parallelism alone"),
    ("heads", f"{TP} 8", 8): ("4 attention heads cannot be split over 8", f"{TP} 4"),
    ("groups", f"{TP} 2 --num-query-groups 3 --num-attention-heads 6", 2): ("3 query groups can neither", None),
    ("groups beside adapters", f"{TP} 4 --lora-rank 2", 4): (
        "2 query groups cannot be split over 4 tensor-parallel ranks, as adapters need it",
        f"{TP} 2",
    ),
    ("MLP", f"{TP} 4 --ffn-hidden-size 66", 4): ("an MLP of 66 cannot be split over 4", f"{TP} 2"),
    ("layers", f"{PP} 3", 3): ("4 layers cannot be split evenly over 3 pipeline stages", "data parallelism alone"),
    ("layers, more ranks", f"{PP} 3", 12): ("4 layers cannot be split evenly over 3 pipeline stages", f"{PP} 4"),
    ("chunks", f"{PP} 2 --num-layers-per-virtual-pipeline-stage 3", 2): ("2 layers of a stage cannot be split", None),
    ("chunks, one stage", "--num-layers-per-virtual-pipeline-stage 1", 2): (
        "need more than one pipeline stage",
        f"{PP} 2",
    ),
    ("context", f"{CP} 3", 4): ("4 ranks cannot be split into model replicas of 3", f"{CP} 4"),
    ("experts", f"{EXPERTS} {EP} 8", 8): ("4 experts cannot be split over 8", f"{EP} 4"),
    ("expert groups", f"{EXPERTS} {TP} 2 {EP} 4", 4): (
        "4 ranks cannot be split into groups of 8 for the experts",
        None,
    ),
    ("no experts", f"{EP} 2", 2): ("--expert-model-parallel-size is for models with --num-experts", None),
}

ALLOWED = {
    "one": ("", 1),
    "groups shared": (f"{TP} 4 --sequence-parallel", 4),
    "uneven stages": (f"{PP} 2 --decoder-first-pipeline-num-layers 1", 2),
    "stages by layout": (f"{PP} 2 --pipeline-model-parallel-layout Et|tttL", 2),
    "everything": (f"{TP} 2 {PP} 2 {CP} 2 --sequence-parallel --num-layers-per-virtual-pipeline-stage 1", 16),
    "experts that fit": (f"{EXPERTS} {TP} 2 {PP} 2 {EP} 2", 8),
    "experts whole": (f"{EXPERTS} {TP} 2 {EP} 2 --expert-tensor-parallel-size 1", 2),
}


CHECK = "megatron_bdpo.training.flags.layout_check.check_layout"


@pytest.fixture(scope="module")
def messages(ranks) -> dict[Any, str]:
    cases = [*((name, flags, count) for name, flags, count in REFUSED), *((n, *case) for n, case in ALLOWED.items())]
    (found,) = ranks(1)(refusals, CHECK, [(flags, count) for _, flags, count in cases])
    return dict(zip((name for name, *_ in cases), found, strict=True))


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case[0])
def test_refused_with_reason_and_way_out(messages, case):
    reason, nearest = REFUSED[case]
    assert reason in messages[case[0]]
    if nearest is not None:
        assert messages[case[0]].endswith(f"The nearest that works on {case[2]} ranks: {nearest}.")


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(messages, name):
    assert messages[name] == ""


def test_all_reasons_are_named(ranks):
    (message,) = ranks(1)(refusals, CHECK, [(f"{TP} 8 {PP} 3", 24)])[0]
    assert "4 attention heads" in message
    assert "4 layers cannot be split" in message


def test_experts_with_tensor_parallelism_need_sequence_parallelism(ranks):
    (message,) = ranks(1)(refusals, CHECK, [(f"--num-experts 4 {TP} 2", 2)])[0]
    assert "only under --sequence-parallel" in message


def test_large_jobs_are_answered_too(ranks):
    """512 ranks have 10^3 layouts without experts."""
    flags = f"--num-layers 80 --num-attention-heads 64 --num-query-groups 8 --ffn-hidden-size 28672 {TP} 8 {PP} 3"
    (message,) = ranks(1)(refusals, CHECK, [(flags, 512)])[0]
    assert message.endswith(f"The nearest that works on 512 ranks: {TP} 8 {PP} 4.")


def test_sizes_that_divide_the_model_are_named(ranks):
    """SmolLM2-135M's: nine would divide the heads, and not the MLP."""
    flags = f"--num-attention-heads 9 --num-query-groups 3 --hidden-size 576 --ffn-hidden-size 1536 {TP} 2"
    (message,) = ranks(1)(refusals, CHECK, [(flags, 2)])[0]
    assert "9 attention heads cannot be split over 2 tensor-parallel ranks" in message
    assert f"{TP} of this model: 1 or 3." in message
