"""Which layouts fit, in which order, and why the others are out."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from megatron_bdpo.cli.main import main
from megatron_bdpo.planning.activations import Recompute, in_flight
from megatron_bdpo.planning.layout import Layout
from megatron_bdpo.planning.memory import GB, JobShape, fullest, stage_memory
from megatron_bdpo.planning.model import ModelShape, Split, stage_parameters
from megatron_bdpo.planning.search import Question, answer

LLAMA_70B = ModelShape(layers=80, hidden=8192, ffn=28672, heads=64, groups=8, head=128, vocab=128256)
LLAMA_8B = ModelShape(layers=32, hidden=4096, ffn=14336, heads=32, groups=8, head=128, vocab=128256)


def job(tensor: int, pipeline: int, ranks: int = 64, **settings: object) -> JobShape:
    split = Split(layout=Layout(tensor, pipeline, 1))
    return JobShape(**({"ranks": ranks, "split": split, "pack_length": 8192, "microbatches": 16} | settings))


def question(model: ModelShape, gpus: int, **settings: object) -> Question:
    values = {
        "model": model,
        "gpus": gpus,
        "gpus_per_node": 8,
        "gpu_memory": 80 * GB,
        "seq_length": 4096,
        "pairs_per_step": 128,
        "tokens_per_pair": 1000.0,
        "job": job(1, 1),
    }
    return Question(**(values | settings))


def test_70b_in_parts():
    """70.6 B parameters: 6 + 12 / d bytes each, 1 / 32 of them a GPU, and the embedding on the first stage."""
    memory = stage_memory(LLAMA_70B, job(8, 4, keys=1.0), 0)
    layers = 80 * (8192 * 128 * (64 + 2 * 8) + 8192 * 8192 + 3 * 8192 * 28672)
    own = layers / 32 + 20 * 2 * 8192 + 126 * 1024 * 8192 / 8  # the vocabulary in multiples of 128 x 8
    assert memory.parts["weights"] == 2 * own
    assert memory.parts["gradients"] == 4 * own
    assert memory.parts["optimizer"] == 6 * own
    assert memory.parts["reference"] == 0
    # 4 microbatches x 20 layers, 16 hidden sizes (1 of them per tensor-parallel rank): about 32 bytes s h / tp.
    per_layer = 2 * 8192 * 8192 / 8 * (4 + 3 + 2 * 8 / 64 + 3 * 3.5) + 4 * 8192 * 64 / 8
    assert memory.parts["activations"] == 4 * 20 * per_layer
    assert 33 < per_layer / (8192 * 8192 / 8) < 36


@pytest.mark.parametrize(
    ("tensor", "pipeline", "recompute", "expected_fits"),
    [
        (8, 4, Recompute(), True),
        (4, 4, Recompute(), False),
        (4, 4, Recompute(granularity="full"), True),
        (8, 1, Recompute(), False),
    ],
)
def test_70b_on_64_gpus_of_80_gb_with_packs_of_8192(tensor, pipeline, recompute, expected_fits):
    assert (fullest(LLAMA_70B, job(tensor, pipeline, recompute=recompute)).total < 80 * GB) == expected_fits


def test_a_resident_reference_is_a_second_copy_of_the_weights():
    own = 2 * stage_parameters(LLAMA_70B, job(8, 4).split, 0).total
    with_reference, without = (stage_memory(LLAMA_70B, job(8, 4, resident=resident), 0) for resident in (True, False))
    assert with_reference.parts["reference"] == own
    assert with_reference.total - without.total == pytest.approx(1.05 * own)  # and its share of the reserve


#: Bound of the kept softmax -> bytes of it, and of a chunk's logits; where they are made again, their gradient too.
LOGITS = 8192 * 128256 / 2
FUSED = {"kept": (2 * LOGITS, 2 * LOGITS + 64 * 2**20), "made again": (2 * LOGITS - 1, 1.5 * 64 * 2**20)}


@pytest.mark.parametrize("softmax", FUSED)
def test_plain_log_probs_hold_the_logits(softmax):
    """[N, V] in the weights' type and in fp32, and both gradients: 12 bytes; split over tensor-parallel ranks."""
    bound, expected = FUSED[softmax]
    plain, fused = (
        stage_memory(LLAMA_8B, job(2, 1, ranks=8, fused_log_probs=kind, kept_softmax_bytes=bound), 0)
        for kind in (False, True)
    )
    difference = plain.parts["log-probs"] - fused.parts["log-probs"]
    assert difference == pytest.approx(12 * LOGITS - 4 * 8192 * 4096 - expected)


def test_microbatches_in_flight():
    one_chunk, five = (Split(layout=Layout(8, 4, 1), chunks=chunks) for chunks in (1, 5))
    assert [in_flight(one_chunk, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(one_chunk, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    assert [in_flight(five, stage, 16) for stage in range(4)] == [23, 21, 19, 17]
    assert in_flight(five, 0, 4) == 20


def test_of_equals_the_one_with_less_memory():
    answers, _ = answer(question(LLAMA_8B, 8))
    first, second = next(
        pair for pair in itertools.pairwise(answers) if pair[0].time.seconds > pair[1].time.seconds
    )  # fmt: skip
    assert first.time.seconds < 1.01 * second.time.seconds
    assert first.memory.total < second.memory.total


def test_the_order_and_the_reasons():
    answers, refused = answer(question(LLAMA_70B, 64))
    layouts = [each.job.split.layout for each in answers]
    assert Layout(8, 4, 1) in layouts
    assert all(layout.tensor <= 8 for layout in layouts)
    tight = [each.memory.total > 72 * GB for each in answers]
    assert tight == sorted(tight)
    assert all(each.memory.total <= 80 * GB for each in answers)
    seconds = [each.time.seconds for each, is_tight in zip(answers, tight, strict=True) if not is_tight]
    assert all(before < 1.011 * after for before, after in itertools.pairwise(seconds))
    assert seconds[0] == pytest.approx(min(seconds), rel=0.01)
    reasons = {each.layout: each.reason for each in refused}
    assert "leave the node of 8" in reasons[Layout(16, 1, 1)]
    assert "GB, also with all layers recomputed" in reasons[Layout(4, 1, 1)]
    assert "80 layers cannot be split evenly over 32" in reasons[Layout(1, 32, 1)]
    assert not reasons.keys() & set(layouts)


def test_no_more_recomputation_than_needed():
    roomy, _ = answer(question(LLAMA_70B, 64, fixed={"tensor": 4, "pipeline": 4, "context": 1, "chunks": 1}))
    assert roomy[0].job.recompute == Recompute()
    tighter = question(LLAMA_70B, 64, seq_length=8192, fixed={"tensor": 4, "pipeline": 4, "context": 1, "chunks": 1})
    assert answer(tighter)[0][0].job.recompute.granularity == "selective"
    assert answer(replace(tighter, seq_length=16384, pairs_per_step=512))[0][0].job.recompute.granularity == "full"


def test_reasons_of_the_job():
    _, refused = answer(question(LLAMA_8B, 8, seq_length=1000, pairs_per_step=4))
    reasons = {each.layout: each.reason for each in refused}
    assert reasons[Layout(1, 1, 1)].startswith("4 pairs a step are fewer than 8 data-parallel ranks")
    assert reasons[Layout(2, 1, 1)].startswith("packs of 1000 positions are no multiple of 16")


def test_experts_are_divided_by_expert_parallelism():
    mixtral = replace(LLAMA_8B, experts=8, expert_ffn=14336, vocab=32000)
    answers, _ = answer(question(mixtral, 32, fixed={"tensor": 2, "pipeline": 2, "context": 1}))
    assert {each.job.split.layout.expert for each in answers} <= {1, 2, 4, 8}
    assert answers


# The program


def test_the_program(config, capsys):
    assert main(["plan", "--hf-model", config, "--gpus", "8", "--rows", "3"]) == 0
    text = capsys.readouterr().out
    for words in ("8 GPUs of 80 GB", "TP2 DP4", "fullest stage", "optimizer", "flags: ", "none of it measured"):
        assert words in text
    assert main(["plan", "--hf-model", config, "--gpus", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["feasible"][0]["bytes"]["total"] < 80e9
    assert main(["plan", "--hf-model", config, "--gpus", "8", "--markdown", "--rows", "2"]) == 0
    assert capsys.readouterr().out.count("\n| ") == 3


def test_nothing_fits(config, capsys):
    assert main(["plan", "--hf-model", config, "--gpus", "1"]) == 2
    output = capsys.readouterr()
    assert "no layout of this model fits 1 GPUs of 80 GB" in output.err
    assert "needs 1" in output.out


def recipes_plan(recipe: str) -> int:
    return main(["plan", "--recipe", recipe, "--gpus", "4", "--gpu-memory", "16"])


def test_a_recipe(ranks, tmp_path):
    from tests.unit.training.test_recipe import RECIPES

    assert ranks(1)(recipes_plan, str(RECIPES / "tiny.yaml")) == [0]


@pytest.mark.parametrize(
    ("document", "model", "flags"),
    [
        ("slurm/README.md", "LLAMA_70B", ["--gpus", "32", "64", "128", "--rows", "3"]),
        ("slurm/README.md", "LLAMA_8B", ["--gpus", "8", "--rows", "3"]),
        ("docs/layouts.md", "LLAMA_70B", ["--gpus", "8", "--lora-rank", "16", "--rows", "7"]),
    ],
)
def test_tables_in_documents_are_what_the_program_prints(document, model, flags, tmp_path, capsys):
    from tests.unit.training import test_dry_run

    (tmp_path / "config.json").write_text(json.dumps(getattr(test_dry_run, model)))
    assert main(["plan", "--hf-model", str(tmp_path), "--markdown", *flags]) == 0
    assert capsys.readouterr().out in (test_dry_run.ROOT / document).read_text("utf-8")
