"""The gate that stops a run whose policy is not its reference at the first step."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from tests.harness.jobs import last_stage, own_process, score, train

#: By precision: nats that rounding may move one token's log-prob by. An answer of n tokens: sqrt(n) times that.
ONE_TOKEN = {torch.float32: 5e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}

#: Answers in the pairs of a microbatch: (log pi_theta - log pi_ref, tokens), chosen and rejected alternating.
Answers = list[tuple[float, int]]


@contextlib.contextmanager
def process_groups() -> Iterator[None]:
    from megatron_bdpo.training import distributed

    with distributed.process_groups(own_process()):
        yield


def verdict(
    dtype: torch.dtype,
    microbatches_by_rank: list[list[Answers]],
    loss: str = "dpo",
    shift: float = 0.0,
    *,
    jumps: bool = False,
    **options: Any,
) -> str:
    """What the gate says on this rank; ``shift`` is what a loss of labelled answers has found for the step.

    With ``jumps`` the loss says of itself that it does.
    """
    from megatron_bdpo.errors import UserError
    from megatron_bdpo.losses import AnswerLogProbs, GroupLogProbs, LossFunction, PairLogProbs, registry
    from megatron_bdpo.model.precision import Precision
    from megatron_bdpo.training.step_zero import StepZeroGate

    spec = registry.get(loss)
    spec = dataclasses.replace(spec, jumps=jumps or spec.jumps)
    function = LossFunction(spec, registry.build_options(loss, options))
    with process_groups():
        gate = StepZeroGate(Precision(dtype))
        for answers in microbatches_by_rank[torch.distributed.get_rank()]:
            of_groups = function.spec.takes == "groups"  # all answers of a microbatch are one, every other scored alike
            shape = (1, -1, 2) if of_groups else (-1, 2, 2)
            off, tokens = torch.tensor(answers, dtype=torch.float64).reshape(shape).unbind(2)
            reference, safe = -3 * tokens, torch.zeros_like(tokens)
            if function.spec.takes == "answers":
                off, tokens, reference = (each.flatten() for each in (off, tokens, reference))
                desirable = torch.arange(len(tokens)) % 2 == 0
                found = torch.tensor(shift, dtype=torch.float64) if function.spec.step_shift else None
                answers = AnswerLogProbs(reference + off, tokens, desirable, reference=reference, shift=found)
                gate.observe(answers, function)
                continue
            given = (reference, reference - 0.5 * tokens)  # unconditional: the reference comprehends them alike
            if of_groups:
                score, present = torch.arange(tokens.shape[1]) % 2 == 0, torch.ones_like(tokens, dtype=torch.bool)
                groups = GroupLogProbs(reference + off, tokens, score[None].double(), present, *given)
                gate.observe(groups, function)
                continue
            gate.observe(PairLogProbs.of_pairs(tokens, reference + off, *given, safe), function)
        try:
            return gate.judge()
        except UserError as error:
            return f"stopped: {error}"


def verdicts(cases: list[dict[str, Any]]) -> list[str]:
    return [verdict(**case) for case in cases]


def adverse(dtype: torch.dtype, share: float, *lengths: int) -> list[list[Answers]]:
    """A microbatch whose answers are all off by that share of what rounding explains, chosen down and rejected up."""
    signs = (-share, share)
    return [[[(signs[i % 2] * ONE_TOKEN[dtype] * math.sqrt(n), n) for i, n in enumerate(lengths)]]]


#: Tokens of a pair's answers.
LENGTHS = [(1, 1), (1, 3), (3, 2), (40, 25), (1000, 2)]
EVERY_LENGTH = [(dtype, lengths) for dtype in ONE_TOKEN for lengths in LENGTHS]

#: Losses that read a reference, with the slopes that they come in: 1 / beta for IPO, beta for most others.
EVERY_LOSS = [
    {"loss": "ipo", "beta": 0.001},
    {"loss": "ipo", "beta": 0.01},
    {"loss": "ipo", "beta": 0.01, "ipo_length_normalized": False},
    {"loss": "ipo", "beta": 0.5},
    {"loss": "dpo", "beta": 0.01},
    {"loss": "dpo", "beta": 1.0, "nll_weight": 1.0},
    {"loss": "bdpo"},
    {"loss": "hinge"},
    {"loss": "robust"},
    {"loss": "safedpo"},
    *(
        {"loss": name}
        for name in (
            "aot",
            "aot_unpaired",
            "apo_down",
            "apo_zero",
            "bco_pair",
            "discopop",
            "dpop",
            "exo_pair",
            "nca_pair",
        )
    ),
    *({"loss": name} for name in ("sigmoid_norm", "sppo_hard")),
    *({"loss": name} for name in ("pl_dpo", "infonca", "nca", "bdpo_list")),
    {"loss": "bdpo_list", "bdpo_list_form": "all-pairs"},
    *({"loss": name} for name in ("apo_zero_unpaired", "bco", "kto")),
    *(
        {"loss": name, "f_divergence": divergence}
        for name in ("dpo", "ipo")
        for divergence in ("forward_kl", "js_divergence", "alpha_divergence")
    ),
]


def test_rounding_passes_and_more_does_not_at_every_length(ranks):
    for share, opening in ((0.95, "step 0: policy equals reference: "), (1.05, "stopped: ")):
        cases = [
            {"dtype": dtype, "microbatches_by_rank": adverse(dtype, share, *lengths)} for dtype, lengths in EVERY_LENGTH
        ]
        for case, found in zip(EVERY_LENGTH, ranks(1)(verdicts, cases)[0], strict=True):
            assert found.startswith(opening), (case, share, found)


def test_the_losss_tolerance_follows_its_slope(ranks):
    """Where every answer is off by 0.9 of its tolerance in the worse way, so is every loss, whatever its slope."""
    answers = adverse(torch.bfloat16, 0.9, 1, 3, 40, 25)
    cases = [{"dtype": torch.bfloat16, "microbatches_by_rank": answers, **each} for each in EVERY_LOSS]
    for case, found in zip(EVERY_LOSS, ranks(1)(verdicts, cases)[0], strict=True):
        share = re.search(r"policy equals reference: .*; loss off by \S+, (\S+) times", found)
        # Slopes that change within a twentieth of a nat, or within one.
        curved = case["loss"] in ("discopop", "dpop") or "f_divergence" in case
        assert share and float(share[1]) == pytest.approx(0.9, abs=0.08 if curved else 0.02), (case, found)


def losses_with_a_reference() -> set[str]:
    from megatron_bdpo.losses import registry

    return {spec.name for spec in registry.all_specs() if spec.requirements(spec.options()).reference}


def test_every_loss_with_a_reference_is_here(ranks):
    assert {case["loss"] for case in EVERY_LOSS} | {JUMPS} == ranks(1)(losses_with_a_reference)[0]


#: Its weights depend on the order of the rewards, which is rounding's where the policy is the reference.
JUMPS = "lipo_lambda"


@pytest.mark.parametrize("loss", [JUMPS, "dpo", "kto"])
def test_a_loss_that_jumps_is_judged_by_its_log_probs(ranks, loss):
    cases = [
        {"dtype": torch.bfloat16, "microbatches_by_rank": adverse(torch.bfloat16, share, 1, 3, 40, 25), "loss": loss}
        | {"jumps": loss != JUMPS}
        for share in (0.9, 1.1)
    ]
    within, beyond = ranks(1)(verdicts, cases)[0]
    assert (
        "loss off by 0.0e+00" in within and within.startswith("step 0: policy equals") and beyond.startswith("stopped")
    )


def test_what_a_step_has_found_is_judged_too(ranks):
    """It is 0 where policy and reference are one, after their own prompts and after others."""
    unlike = [[[(0.0, 3), (0.0, 5)]] * 2 + [[(0.0, 4), (5e-6, 2)]]]  # nothing that an answer's own log-probs show
    cases = [{"dtype": torch.float32, "microbatches_by_rank": unlike, "loss": "kto"}]
    found, right = ranks(1)(verdicts, [cases[0] | {"shift": shift} for shift in (0.3, 0.0)])[0]
    assert found.startswith("stopped: step 0: the policy is not its reference") and "loss off by" in found
    assert right.startswith("step 0: policy equals reference")


def test_nan_stops(ranks):
    (found,) = ranks(1)(verdict, torch.float32, [[[(math.nan, 4), (0.0, 4)]]])
    assert found.startswith("stopped: ")


def test_message_says_what_was_seen_and_the_ways_out(ranks):
    (found,) = ranks(1)(verdict, torch.float32, [[[(-1.0, 4), (0.0, 4), (-3.0, 4), (0.0, 9)]]])
    seen = "log-ratios off by 5.0e-01 nats per token, 2e+04 times what rounding explains; loss off by "
    assert f"stopped: step 0: the policy is not its reference: {seen}" in found
    assert "delete the reference cache" in found
    assert "--no-step-zero-check" in found


def test_every_pair_of_every_microbatch_and_rank_counts(ranks):
    """Three pairs on one rank, one on the other: a mean over pairs, not over packs or ranks, and the same on both."""
    one, other = [[(0.0, 1)] * 4, [(-4.0, 1), (0.0, 1)]], [[(0.0, 1)] * 2]
    found = ranks(2)(verdict, torch.float32, [one, other], loss="hinge", beta=1.0)
    assert found[0] == found[1]
    assert "log-ratios off by 1.0e+00 nats" in found[0]
    assert "loss off by 1.0e+00" in found[0]


def test_rank_that_saw_no_pair_takes_part(ranks):
    """Earlier pipeline stages compute no loss, and a pack may be empty."""
    found = ranks(2)(verdict, torch.float32, [[], [[], [(0.0, 5), (0.0, 7)]]])
    assert [message.startswith("step 0: policy equals reference") for message in found] == [True, True]


def beginnings_verdict(off: float) -> str:
    """On a pair whose log-probs are the reference's but for the beginning of the chosen answer."""
    from megatron_bdpo.errors import UserError
    from megatron_bdpo.losses import LossFunction, PairLogProbs, registry
    from megatron_bdpo.model.precision import Precision
    from megatron_bdpo.training.step_zero import StepZeroGate

    loss = LossFunction(registry.get("dpo"), registry.build_options("dpo", {"ld_alpha": 0.5}))
    tokens = torch.tensor([[8, 3], [5, 5]])
    whole, beginnings = -3.0 * tokens.double(), -3.0 * tokens.amin(1, keepdim=True).double().expand(-1, 2)
    policy = beginnings + torch.tensor([[off, 0], [0, 0]])
    pairs = PairLogProbs.of_pairs(tokens, whole, whole, policy_beginnings=policy, reference_beginnings=beginnings)
    with process_groups():
        gate = StepZeroGate(Precision(torch.float32))
        gate.observe(pairs, loss)
        try:
            return gate.judge()
        except UserError as error:
            return f"stopped: {error}"


def test_beginnings_are_judged_too(ranks):
    """Whose tolerance is that of their own length."""
    passed, also, stopped = (ranks(1)(beginnings_verdict, off)[0] for off in (0.0, 5e-5, 3e-4))
    assert passed.startswith("step 0: policy equals") and also.startswith("step 0: policy equals")
    assert stopped.startswith("stopped: step 0: the policy is not its reference: log-ratios off by 5.0e-05 nats")


# In a run


def train_with_other_reference(flags: list[str], cache: str) -> list[dict[str, float]] | str:
    """The tiny job with reference values that are off, as those of other weights would be: its steps, or why not."""
    from megatron_bdpo.errors import UserError
    from megatron_bdpo.training.reference.passes import ReferenceTable

    original = ReferenceTable.lookup

    def off(self, batch):
        found = original(self, batch)
        return found._replace(conditional=found.conditional - 0.01 * batch.answer_tokens[batch.pairs.answers])

    ReferenceTable.lookup = off
    try:
        return last_stage([train(flags, pair_cache_dir=cache, max_pairs=16, train_iters=1)]).steps
    except UserError as error:
        return str(error)
    finally:
        ReferenceTable.lookup = original


def test_run_with_another_reference_is_stopped(ranks, tmp_path):
    (message,) = ranks(1)(train_with_other_reference, [], str(tmp_path))
    assert re.search(r"the policy is not its reference: log-ratios off by 1\.0e-02 nats per token", message)


def test_check_can_be_switched_off(ranks, tmp_path):
    (steps,) = ranks(1)(train_with_other_reference, ["--no-step-zero-check"], str(tmp_path))
    assert steps[0]["rewards/chosen"] > 0.01


# In bf16, where rounding is seen: two tensor-parallel ranks add up otherwise than the one that has scored.

#: Weights of a size at which log-probs depend on what they should. IPO at this beta: 50 nats of loss per nat and token.
SENSITIVE = ["--bf16", "--init-method-std", "0.2"]
STEEP = [*SENSITIVE, "--preference-loss", "ipo", "--beta", "0.01"]


def positions_doubled(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.training import batches

    original = batches.to_batch

    def doubled(pack: Any, *others: Any) -> Any:
        pack.positions[:] *= 2
        return original(pack, *others)

    undo.enter_context(mock.patch.object(batches, "to_batch", doubled))


def another_attention_scale(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.model.attention import PairAttention

    original = PairAttention.forward

    def scaled(self: Any, query: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        return original(self, 1.5 * query, *others, **named)

    undo.enter_context(mock.patch.object(PairAttention, "forward", scaled))


def the_empty_prompt(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.training.reference.passes import ReferenceTable

    original = ReferenceTable.lookup

    def swapped(self: Any, batch: Any) -> Any:
        found = original(self, batch)
        return found._replace(conditional=found.unconditional)

    undo.enter_context(mock.patch.object(ReferenceTable, "lookup", swapped))


def first_step(flags: list[str], cache: str, mistake: Any = None) -> str:
    """What the gate says of the first step of a run; its reference has been scored before, without the mistake."""
    from megatron_bdpo.errors import UserError
    from megatron_bdpo.training.step_zero import StepZeroGate

    seen: list[str] = []
    judge = StepZeroGate.judge
    with contextlib.ExitStack() as undo:
        undo.enter_context(mock.patch.object(StepZeroGate, "judge", lambda gate: seen.append(judge(gate)) or seen[-1]))
        if mistake is not None:
            mistake(undo)
        try:
            train(flags, pair_cache_dir=cache, max_pairs=16, train_iters=1)
        except UserError as error:
            return str(error)
    return seen[0]


@pytest.fixture(scope="module")
def scored(ranks, tmp_path_factory) -> str:
    cache = str(tmp_path_factory.mktemp("scored"))
    ranks(1)(score, [*SENSITIVE, "--preference-loss", "bdpo"], pair_cache_dir=cache, max_pairs=16)
    return cache


def test_rounding_under_a_steep_loss_passes(ranks, scored):
    found = ranks(2)(first_step, [*STEEP, "--tensor-model-parallel-size", "2"], scored)[0]
    off = re.match(r"step 0: policy equals reference: log-ratios off by (\S+) nats .* loss off by (\S+),", found)
    assert off, found
    assert float(off[1]) > 1e-4, "this is rounding"
    assert float(off[2]) > 1e-3, "a loss of fixed tolerance would have to allow this for all"


@pytest.mark.parametrize("mistake", [positions_doubled, another_attention_scale])
def test_mistake_under_a_steep_loss_is_stopped(ranks, scored, mistake):
    assert ranks(1)(first_step, STEEP, scored, mistake)[0].startswith("step 0: the policy is not its reference: ")


def test_reference_of_another_prompt_is_stopped(ranks, scored):
    (found,) = ranks(1)(first_step, [*SENSITIVE, "--preference-loss", "bdpo"], scored, the_empty_prompt)
    assert found.startswith("step 0: the policy is not its reference: ")


def test_fp32_in_transformer_engines_layers_is_judged_as_tf32():
    """Seen on an H200: log-ratios off by 9.4e-6 nats per token, 1.1 times what fp32's own rounding explains."""
    from megatron_bdpo.model.precision import Precision
    from megatron_bdpo.training.step_zero import tolerance

    fp32, tf32 = tolerance(Precision(torch.float32)), tolerance(Precision(torch.float32, tf32=True))
    assert 100 * fp32 < tf32 <= tolerance(Precision(torch.float16)) < tolerance(Precision(torch.bfloat16))


def test_tf32_is_taken_from_the_layers():
    from megatron_bdpo.training.settings import _precision

    given = {"bf16": False, "fp16": False, "fp8": None, "fp8_recipe": "tensorwise"}
    assert _precision(given | {"transformer_impl": "transformer_engine"}).tf32
    assert not _precision(given | {"transformer_impl": "local"}).tf32
    assert not _precision(given | {"transformer_impl": "transformer_engine", "bf16": True}).tf32
