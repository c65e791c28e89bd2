"""Every loss against a plain-Python fp64 closed form with hand-derived gradients."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from megatron_bdpo import losses
from megatron_bdpo.losses import PairLogProbs
from tests.harness.closed_forms import CASES, CLOSED_FORMS, STEP_FORMS, Pair, expected_rewards, softplus
from tests.harness.loss_cases import EXTREME, MODIFIERS, PAIRS, evaluate, expected, inputs, random_pairs, with_targets

every_case = pytest.mark.parametrize(("name", "given"), CASES, ids=str)
every_loss = pytest.mark.parametrize("name", sorted([*CLOSED_FORMS, *STEP_FORMS]))

# Log-ratios reach 1e4 and round at 1e4 eps; times beta that is the absolute error of z, and so the relative error of
# sigmoid(-z) far from 0: 1e3 eps. A few operations more, and it is within 1e4 eps in both dtypes.
TOLERANCE = {torch.float64: {"rtol": 2e-12, "atol": 2e-12}, torch.float32: {"rtol": 1e-3, "atol": 1e-5}}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_case
def test_loss_and_gradient_match_the_closed_form(name, given, dtype):
    pairs = PAIRS[: -len(EXTREME)] if name == "alphapo" else PAIRS  # its reward overflows there
    actual, out = evaluate(name, given, inputs(pairs, dtype))
    for got, want in zip(actual, expected(name, given, pairs), strict=True):
        torch.testing.assert_close(got.double(), want, **TOLERANCE[dtype])
    for tensor in (*actual, out.chosen_reward, out.rejected_reward, *out.metrics.values()):
        assert tensor.dtype == dtype and tensor.shape == (len(pairs),)


@every_case
def test_gradcheck(name, given):
    """Where the pairs are not at a corner: hinge's, dpop's."""
    if name == "aot_unpaired":
        pytest.skip("a pair's rejected answer has the gradient of another pair's loss: the closed form has it")
    if "use_weighting" in given:
        pytest.skip("its weights change with the policy, and count as constants: the closed form has the gradient")
    function, options = losses.get(name).function, losses.build_options(name, given)
    full = with_targets(losses.get(name), inputs(random_pairs(6, seed=3), torch.float64), options)

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return function(replace(full, policy_chosen=chosen, policy_rejected=rejected), options).loss

    assert torch.autograd.gradcheck(loss, (full.policy_chosen, full.policy_rejected))


@every_case
def test_inputs_stay_and_only_the_loss_carries_a_gradient(name, given):
    pairs, expected_pairs = inputs(PAIRS, torch.float32), inputs(PAIRS, torch.float32)
    _, out = evaluate(name, given, pairs)
    for f in fields(PairLogProbs):
        value, expected_value = getattr(pairs, f.name), getattr(expected_pairs, f.name)
        assert value is expected_value is None or torch.equal(value, expected_value)
    assert not any(t.requires_grad for t in (out.chosen_reward, out.rejected_reward, *out.metrics.values()))


@every_case
def test_no_pairs(name, given):
    actual, out = evaluate(name, given, inputs([], torch.float32))
    assert {t.shape for t in (*actual, out.chosen_reward, out.rejected_reward, *out.metrics.values())} == {(0,)}


@pytest.mark.parametrize("name", ["bdpo", "dpo", "robust"])
def test_loss_is_ln_2_where_policy_equals_reference(name):
    pairs = [p._replace(l_w=p.r_w, l_l=p.r_l) for p in PAIRS]
    actual, out = evaluate(name, {}, inputs(pairs, torch.float64))
    torch.testing.assert_close(actual.loss, torch.full_like(actual.loss, math.log(2)), rtol=1e-15, atol=0)
    assert not out.chosen_reward.any() and not out.rejected_reward.any()


# --- B-DPO ---


@hypothesis.settings(deadline=None)
@hypothesis.given(
    margins=st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)),
    informations=st.tuples(st.floats(-20, 20), st.floats(-20, 20)),
    beta=st.floats(1e-3, 1),
)
def test_bdpo_gradient_has_the_norm_of_dpo_at_the_same_z(margins, informations, beta):
    pair = Pair(margins[0], margins[1], 1, 1, 0.0, 0.0, -informations[0], -informations[1])
    actual, _ = evaluate("bdpo", {"beta": beta}, inputs([pair], torch.float64))

    sigmoid_minus_z = -math.expm1(-actual.loss.item())  # L = -log sigmoid(z), so 1 - e^-L = sigmoid(-z)
    expected_norm = math.sqrt(2) * beta * sigmoid_minus_z

    norm = math.hypot(actual.grad_w.item(), actual.grad_l.item())
    assert norm == pytest.approx(expected_norm, rel=1e-11, abs=1e-15)  # |z| eps in the exponent of sigmoid


def assert_bitwise_dpo(pairs: list[Pair], given: dict[str, object], dtype: torch.dtype) -> None:
    expected_result, expected_out = evaluate("dpo", {"nll_weight": given.get("nll_weight", 0.0)}, inputs(pairs, dtype))
    actual, out = evaluate("bdpo", given, inputs(pairs, dtype))
    for got, want in zip(actual, expected_result, strict=True):
        assert torch.equal(got, want)
    assert torch.equal(out.chosen_reward, expected_out.chosen_reward)
    assert torch.equal(out.rejected_reward, expected_out.rejected_reward)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "given",
    [
        {"bdpo_temperature": math.inf, "bdpo_scale": False},
        {"bdpo_temperature": math.inf},
        {"bdpo_weights": False, "bdpo_scale": False},
        {"bdpo_temperature": math.inf, "bdpo_scale": False, "nll_weight": 0.7},
    ],
    ids=str,
)
def test_bdpo_without_balance_is_dpo_to_the_bit(given, dtype):
    assert_bitwise_dpo(PAIRS, given, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_bdpo_of_equally_comprehended_responses_is_dpo_to_the_bit(dtype):
    assert_bitwise_dpo([p._replace(u_w=p.r_w - p.n_w / 2, u_l=p.r_l - p.n_l / 2) for p in PAIRS], {}, dtype)


@pytest.mark.parametrize(
    ("weights", "scale", "expected_weights", "expected_scale"),
    [
        (False, False, (1.0, 1.0), 1.0),  # DPO
        (True, False, (0.5, 1.5), 1.0),  # DPO + BW
        (False, True, (1.0, 1.0), math.sqrt(0.8)),  # DPO + SF
        (True, True, (0.5, 1.5), math.sqrt(0.8)),  # B-DPO
    ],
)
def test_bdpo_ablation_rows(weights, scale, expected_weights, expected_scale):
    i_w, i_l = 2 * math.log(3), math.log(3)  # the weights' ratio is 1 : 3
    pair = Pair(-5.0, -9.0, 2, 4, -6.0, -7.0, -6.0 - 2 * i_w, -7.0 - 4 * i_l)
    actual, out = evaluate("bdpo", {"bdpo_weights": weights, "bdpo_scale": scale}, inputs([pair], torch.float64))

    w_w, w_l = expected_weights
    expected_loss = softplus(-0.1 * expected_scale * (w_w * 1.0 + w_l * 2.0))
    expected_metrics = {"weights/chosen": w_w, "weights/rejected": w_l, "scale": expected_scale}
    if weights or scale:
        expected_metrics |= {
            "comprehension/chosen": i_w,
            "comprehension/rejected": i_l,
            "comprehension/imbalance": math.log(3),
        }

    assert actual.loss.item() == pytest.approx(expected_loss, rel=1e-14)
    assert {key: value.item() for key, value in out.metrics.items()} == pytest.approx(expected_metrics, rel=1e-14)


def test_bdpo_without_weights_and_scale_needs_no_unconditional_log_probs():
    given = {"bdpo_weights": False, "bdpo_scale": False}
    full = inputs(PAIRS, torch.float32)
    known = {f.name: getattr(full, f.name) for f in fields(full) if not f.name.startswith("unconditional")}
    expected_result, _ = evaluate("dpo", {}, full)
    actual, _ = evaluate("bdpo", given, PairLogProbs(**known))
    assert torch.equal(actual.loss, expected_result.loss)
    with pytest.raises(AssertionError, match="unconditional_chosen"):
        evaluate("bdpo", {}, PairLogProbs(**known))


# --- AOT ---


@pytest.mark.parametrize("name", sorted(STEP_FORMS))
def test_aot_of_an_evaluation_is_dpo(name):
    """No step is looked at."""
    pairs, others = inputs(PAIRS, torch.float64), inputs(PAIRS, torch.float64)
    given = {"beta": 0.3, "label_smoothing": 0.1}
    found = losses.get(name).function(pairs, losses.build_options(name, given))
    expected_one, _ = evaluate("dpo", given, others)
    torch.testing.assert_close(found.loss, expected_one.loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(STEP_FORMS))
def test_the_order_of_a_steps_pairs_does_not_matter(name):
    drawn = enumerate(random_pairs(50, seed=7))
    pairs = [p._replace(l_w=p.l_w - row / 1000, l_l=p.l_l - row / 997) for row, p in drawn]  # no two are alike
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    (found, _), (moved, _) = (
        evaluate(name, {}, inputs(each, torch.float64)) for each in (pairs, [pairs[i] for i in order.tolist()])
    )
    for one, other in zip(found, moved, strict=True):
        torch.testing.assert_close(one[order], other, rtol=1e-12, atol=1e-12)


# --- ORPO, rewards, metrics ---


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_orpo_stays_finite_where_the_odds_do_not(dtype):
    certain = [Pair(l_w, l_l, 1, 1, 0, 0, 0, 0) for l_w in (0.0, 1e-8, -1e-9, -5.0) for l_l in (0.0, 1e-8, -1e4)]
    actual, _ = evaluate("orpo", {}, inputs(certain, dtype))
    assert all(torch.isfinite(tensor).all() for tensor in actual)


@every_case
def test_rewards(name, given):
    if MODIFIERS & given.keys():
        pytest.skip("test_modifiers has them")
    _, out = evaluate(name, given, inputs(PAIRS[:100], torch.float64))
    options = asdict(losses.build_options(name, given))
    expected_ones = [expected_rewards(name, p, options) for p in PAIRS[:100]]
    found = torch.stack([out.chosen_reward, out.rejected_reward], 1)
    torch.testing.assert_close(found, torch.tensor(expected_ones, dtype=torch.float64), rtol=1e-14, atol=0)


@every_loss
def test_the_nll_is_a_metric_exactly_where_it_is_in_the_loss(name):
    pairs = inputs(PAIRS, torch.float32)
    on_by_default = name in ("cpo", "orpo", "sft")
    assert ("nll" in evaluate(name, {}, pairs)[1].metrics) == on_by_default
    if name not in ("orpo", "sft"):  # the NLL is not optional there
        assert "nll" not in evaluate(name, {"nll_weight": 0.0}, pairs)[1].metrics
        nll = evaluate(name, {"nll_weight": 0.5}, pairs)[1].metrics["nll"]
        assert torch.equal(nll, -pairs.policy_chosen.detach() / pairs.chosen_tokens)
