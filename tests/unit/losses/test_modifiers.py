"""Options that go with many losses: where they are, where they are refused, and that they change nothing by default.

Their values and gradients are compared with closed forms beside the losses' own (`test_losses`).
"""

from __future__ import annotations

import importlib
import pickle
from dataclasses import dataclass, replace

import pytest
import torch

from megatron_bdpo import losses
from megatron_bdpo.errors import UserError
from megatron_bdpo.losses import LossFunction, LossOptions, LossSpec, Requirements, option
from megatron_bdpo.losses.modifiers import ScoreOptions, modified, scored
from tests.harness.closed_forms import CASES
from tests.harness.loss_cases import PAIRS, evaluate, inputs, of_beginnings, random_pairs, with_targets

#: Losses that compare the two answers' scores.
OF_DIFFERENCE = ("discopop", "dpo", "exo_pair", "hinge", "ipo", "robust", "safedpo", "sigmoid_norm")
OF_PAIRS = tuple(each.name for each in losses.all_specs() if each.takes == "pairs")


def as_written(name: str) -> LossSpec:
    """A loss before the registry has given it modifiers."""
    module = importlib.import_module(losses.get(name).function.__module__)
    (spec,) = (each for each in vars(module).values() if isinstance(each, LossSpec) and each.name == name)
    return spec


def test_which_losses_have_them():
    fields = losses.option_fields()
    for name in ("f_divergence", "f_alpha_divergence_coef", "reference_free", "ld_alpha"):
        assert tuple(fields[name].defaults) == OF_DIFFERENCE and fields[name].is_modifier
    assert [each.name for each in losses.all_specs() if each.of_difference] == list(OF_DIFFERENCE)
    assert tuple(fields["use_weighting"].defaults) == OF_PAIRS and fields["use_weighting"].is_modifier


@pytest.mark.parametrize("name", OF_PAIRS)
def test_options_are_sent_between_ranks(name):
    options = losses.build_options(name, {"use_weighting": True})
    assert pickle.loads(pickle.dumps(options)) == options


@pytest.mark.parametrize("name", OF_PAIRS)
def test_by_default_they_change_no_bit(name):
    found, out = evaluate(name, {}, inputs(random_pairs(100), torch.float32))
    spec, pairs = as_written(name), inputs(random_pairs(100), torch.float32)
    expected = spec.function(with_targets(spec, pairs, spec.options()), spec.options())
    expected.loss.sum().backward()
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.grad_w, pairs.policy_chosen.grad)
    assert torch.equal(found.grad_l, pairs.policy_rejected.grad)
    assert torch.equal(out.chosen_reward, expected.chosen_reward)


@pytest.mark.parametrize("name", OF_DIFFERENCE)
def test_what_compares_scores_reads_nothing_else_of_the_reference(name):
    spec, full = as_written(name), inputs(PAIRS, torch.float64)
    assert spec.requirements(spec.options()).reference
    alone = replace(full, reference_chosen=None, reference_rejected=None)
    chosen, rejected = full.policy_chosen / 2, full.policy_rejected / 2
    options = spec.options()
    if name == "ipo":
        options = spec.options(ipo_length_normalized=False)
    found = spec.function(replace(alone, chosen_score=chosen, rejected_score=rejected), options)
    per_token = full.chosen_tokens if name == "sigmoid_norm" else 1
    assert torch.equal(found.chosen_reward, options.beta * (chosen.detach() / per_token))
    moved = spec.function(replace(alone, chosen_score=chosen + 1, rejected_score=rejected + 1), options)
    if name != "sigmoid_norm":  # whose differences are of scores per token
        torch.testing.assert_close(found.loss, moved.loss, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OF_DIFFERENCE)
def test_without_a_reference_none_is_asked_for(name):
    given = {"reference_free": True}
    assert losses.get(name).requirements(losses.build_options(name, given)).reference is False
    full = inputs(PAIRS, torch.float64)
    found, out = evaluate(name, given, replace(full, reference_chosen=None, reference_rejected=None))
    nothing = torch.zeros(len(PAIRS), dtype=torch.float64)
    uniform = replace(inputs(PAIRS, torch.float64), reference_chosen=nothing, reference_rejected=nothing)
    expected, _ = evaluate(name, {}, uniform)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.grad_w, expected.grad_w)
    beta = losses.build_options(name, given).beta
    per_token = full.chosen_tokens if name == "sigmoid_norm" else 1
    assert torch.equal(out.chosen_reward, beta * (full.policy_chosen.detach() / per_token))


def test_divergences_meet_at_their_ends():
    """Towards 1 and 0 of its coefficient the alpha divergence is the reverse and the forward KL."""
    pairs = inputs(PAIRS, torch.float64)

    def score(divergence: str, coef: float = 0.5) -> torch.Tensor:
        found = scored(pairs, ScoreOptions(f_divergence=divergence, f_alpha_divergence_coef=coef)).chosen_score
        assert found is not None
        return found

    assert torch.equal(score("alpha_divergence", 0.0), score("forward_kl"))
    ratio = pairs.policy_chosen - pairs.reference_chosen
    assert torch.equal(score("alpha_divergence", 1.0), ratio)
    near = ratio.abs() < 10
    torch.testing.assert_close(score("alpha_divergence", 1 - 1e-9)[near], ratio[near], rtol=1e-7, atol=1e-7)


def test_nothing_overflows_where_the_policy_has_left_the_reference():
    far = [p._replace(l_w=p.r_w - 1e3, l_l=p.r_l - 2e3) for p in PAIRS]
    for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
        found, _ = evaluate("dpo", {"f_divergence": divergence}, inputs(far, torch.float32))
        assert all(torch.isfinite(each).all() for each in found)


@pytest.mark.parametrize(("name", "given"), [case for case in CASES if "ld_alpha" in case[1]], ids=str)
def test_the_gradient_in_beginnings_is_the_closed_forms(name, given):
    """That in whole answers is compared beside the losses' own."""
    for own, one in zip(*of_beginnings(name, given, PAIRS), strict=True):
        torch.testing.assert_close(own, one, rtol=2e-12, atol=2e-12)


@pytest.mark.parametrize("name", OF_DIFFERENCE)
def test_the_ends_of_ld_alpha(name):
    """At 1 it is the loss without it, and asks for nothing; at 0 what is behind the common length is not there."""
    full = inputs(random_pairs(100), torch.float64)
    at_1, at_0 = (losses.build_options(name, {"ld_alpha": share}) for share in (1.0, 0.0))
    spec = losses.get(name)
    assert not spec.requirements(at_1).beginnings and spec.requirements(at_0).beginnings
    found, _ = evaluate(name, {"ld_alpha": 1.0}, full)
    expected, _ = evaluate(name, {}, full)
    assert all(torch.equal(own, one) for own, one in zip(found, expected, strict=True))
    cut = inputs([p._replace(l_w=p.b_w, l_l=p.b_l, r_w=p.d_w, r_l=p.d_l) for p in random_pairs(100)], torch.float64)
    assert torch.equal(spec.function(full, at_0).loss, spec.function(cut, spec.options()).loss)


def test_weights_are_of_the_policy_as_it_is():
    """An answer as likely as the distribution is peaked, -log p = its collision entropy, weighs 1."""
    pairs = [p._replace(c_w=-p.l_w, c_l=-p.l_l) for p in random_pairs(20)]
    for name in OF_PAIRS:
        found, out = evaluate(name, {"use_weighting": True}, inputs(pairs, torch.float64))
        expected, _ = evaluate(name, {}, inputs(pairs, torch.float64))
        assert all(torch.equal(own, one) for own, one in zip(found, expected, strict=True))
        assert torch.equal(out.metrics["weighting"], torch.ones(20, dtype=torch.float64))


def test_a_mix_weighs_its_sum():
    name, given = "dpo=1.0,sft=0.5", {"use_weighting": True}
    found, out = evaluate(name, given, inputs(PAIRS, torch.float64))
    expected, _ = evaluate(name, {}, inputs(PAIRS, torch.float64))
    torch.testing.assert_close(found.loss, expected.loss * out.metrics["weighting"], rtol=1e-13, atol=1e-13)
    assert losses.get(name).requirements(losses.build_options(name, given)).collision_entropy


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("bdpo", {"f_divergence": "forward_kl"}, "--f-divergence is not used by the loss 'bdpo'"),
        ("nca_pair", {"f_divergence": "forward_kl"}, "--f-divergence is not used by the loss 'nca_pair'"),
        ("dpop", {"reference_free": True}, "--reference-free is not used by the loss 'dpop'"),
        ("simpo", {"reference_free": True}, "--reference-free is not used by the loss 'simpo'"),
        ("nca_pair", {"ld_alpha": 0.5}, "--ld-alpha is not used by the loss 'nca_pair'"),
        ("dpo", {"ld_alpha": -0.1}, "--ld-alpha must be >= 0 and <= 1"),
        ("dpo", {"f_divergence": "kl"}, "--f-divergence must be one of reverse_kl, forward_kl, js_divergence"),
        (
            "dpo",
            {"f_alpha_divergence_coef": 0.3},
            "--f-alpha-divergence-coef would be ignored without --f-divergence alpha_divergence. Add it",
        ),
        (
            "dpo=1,sft=1",
            {"f_alpha_divergence_coef": 0.3, "f_divergence": "forward_kl"},
            "--f-alpha-divergence-coef would be ignored without --f-divergence alpha_divergence",
        ),
        (
            "dpo",
            {"f_divergence": "alpha_divergence", "f_alpha_divergence_coef": 1.5},
            "--f-alpha-divergence-coef must be >= 0 and <= 1",
        ),
        (
            "dpo",
            {"f_divergence": "forward_kl", "reference_free": True},
            "--f-divergence would be ignored with --reference-free. Leave one out.",
        ),
        (
            "tpo",
            {"tpo_gamma": 0.5},
            "--tpo-gamma would be ignored without --tpo-length-normalized. Add it, or leave --tpo-gamma out.",
        ),
    ],
)
def test_what_is_refused(name, given, expected):
    with pytest.raises(UserError) as caught:
        losses.build_options(name, given)
    assert expected in str(caught.value)


def test_a_mix_hands_them_to_the_terms_that_have_them():
    """As TRL does."""
    given = {"f_divergence": "js_divergence", "beta": 0.3}
    found, _ = evaluate("dpo=1.0,bco_pair=0.5", given, inputs(PAIRS, torch.float64))
    dpo, _ = evaluate("dpo", given, inputs(PAIRS, torch.float64))
    bco, _ = evaluate("bco_pair", {"beta": 0.3}, inputs(PAIRS, torch.float64))
    torch.testing.assert_close(found.loss, dpo.loss + 0.5 * bco.loss, rtol=1e-14, atol=1e-14)
    needs = losses.get("dpo=1,sft=1").requirements(losses.build_options("dpo=1,sft=1", {"reference_free": True}))
    assert needs == Requirements()


@pytest.mark.parametrize("name", ["dpo", "dpo=1.0,sft=0.2"])
def test_they_are_told_where_they_are_set(name):
    """A checkpoint holds the options as text: of a run that does not know them it stays the same."""
    spec, plain = losses.get(name), losses.build_options(name, {})
    set_here = losses.build_options(name, {"f_divergence": "js_divergence"})
    assert "f_" not in f"{plain} {LossFunction(spec, plain).describe()}"
    assert "f_divergence='js_divergence'" in str(set_here) and "reference_free" not in str(set_here)
    assert "f_divergence js_divergence" in LossFunction(spec, set_here).describe()
    if name == "dpo":
        assert str(plain) == str(as_written("dpo").options())
        assert isinstance(plain, as_written("dpo").options) and isinstance(plain, ScoreOptions)


@dataclass(frozen=True)
class Clashing(LossOptions):
    reference_free: bool = option(False, "its own")


def test_a_loss_with_such_an_option_of_its_own():
    spec = LossSpec("mine", None, Clashing, lambda options: Requirements(), "", "", of_difference=True)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the loss 'mine' has an option --reference-free"):
        modified(spec)
