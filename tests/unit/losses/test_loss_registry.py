"""What each loss says about itself, and how losses are named, given options, and added by other packages."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import pytest
import torch

from megatron_bdpo import losses
from megatron_bdpo.errors import UserError
from megatron_bdpo.losses import LossOptions, LossSpec, PairLogProbs, Requirements, option, registry
from megatron_bdpo.losses.options import field_types, flag
from tests.harness.closed_forms import CLOSED_FORMS, Pair
from tests.harness.loss_cases import PAIRS, evaluate, inputs, random_pairs

# --- what each loss says about itself ---


@pytest.mark.parametrize(
    ("name", "given", "expected_requirements"),
    [
        ("dpo", {}, Requirements(reference=True)),
        ("robust", {}, Requirements(reference=True)),
        ("hinge", {}, Requirements(reference=True)),
        ("ipo", {}, Requirements(reference=True, length_normalised=True)),
        ("ipo", {"ipo_length_normalized": False}, Requirements(reference=True)),
        ("bdpo", {}, Requirements(reference=True, comprehension=True)),
        ("bdpo", {"bdpo_weights": False}, Requirements(reference=True, comprehension=True)),
        ("bdpo", {"bdpo_scale": False}, Requirements(reference=True, comprehension=True)),
        ("bdpo", {"bdpo_weights": False, "bdpo_scale": False}, Requirements(reference=True)),
        ("safedpo", {}, Requirements(reference=True, safety=True)),
        ("simpo", {}, Requirements(length_normalised=True)),
        ("cpo", {}, Requirements()),
        ("orpo", {}, Requirements(length_normalised=True)),
        ("alphapo", {}, Requirements(length_normalised=True)),
        ("sft", {}, Requirements()),
        ("aot", {}, Requirements(reference=True)),
        ("aot_unpaired", {}, Requirements(reference=True)),
        ("sft", {"use_weighting": True}, Requirements(collision_entropy=True)),
        ("dpo", {"use_weighting": True}, Requirements(reference=True, collision_entropy=True)),
        ("dpo", {"ld_alpha": 0.5}, Requirements(reference=True, beginnings=True)),
        ("dpo", {"ld_alpha": 0.5, "reference_free": True}, Requirements(beginnings=True)),
        ("sigmoid_norm", {}, Requirements(reference=True, length_normalised=True)),
        *[(name, {}, Requirements(reference=True)) for name in ("apo_down", "apo_zero", "bco_pair", "discopop")],
        *[(name, {}, Requirements(reference=True)) for name in ("dpop", "exo_pair", "nca_pair", "sppo_hard")],
    ],
)
def test_requirements_are_stated_and_suffice(name, given, expected_requirements):
    needs = losses.get(name).requirements(losses.build_options(name, given))
    assert needs == expected_requirements

    asked = ["policy", "tokens"]
    asked += ["collision"] * needs.collision_entropy
    asked += ["reference"] * needs.reference + ["unconditional"] * needs.comprehension + ["unsafe"] * needs.safety
    full = inputs(PAIRS, torch.float32)
    known = {f.name: getattr(full, f.name) for f in fields(full) if any(word in f.name for word in asked)}
    known = {name: value for name, value in known.items() if needs.beginnings or not name.endswith("_beginning")}
    evaluate(name, given, PairLogProbs(**known))


def test_options_and_defaults():
    usual = {"beta": 0.1, "nll_weight": 0.0}
    of_labels = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    expected_defaults = {
        **dict.fromkeys(("apo_down", "apo_zero", "bco_pair", "nca_pair", "sppo_hard"), usual),
        "alphapo": {"beta": 2.0, "simpo_gamma": 0.5, "alphapo_alpha": 0.25, "nll_weight": 0.0},
        "aot": {**usual, "label_smoothing": 0.0},
        "aot_unpaired": {**usual, "label_smoothing": 0.0},
        "discopop": {**usual, "discopop_tau": 0.05},
        "dpop": {**usual, "dpop_lambda": 50.0},
        "exo_pair": {**usual, "label_smoothing": 1e-3},
        "sft": {},
        "sigmoid_norm": {**usual, "beta": 5.0},
        "bdpo": {
            "beta": 0.1,
            "bdpo_temperature": 1.0,
            "bdpo_weights": True,
            "bdpo_scale": True,
            "bdpo_comprehension": "per-token",
            "nll_weight": 0.0,
        },
        "bdpo_list": {
            "beta": 0.1,
            "bdpo_temperature": 1.0,
            "bdpo_weights": True,
            "bdpo_scale": True,
            "bdpo_comprehension": "per-token",
            "nll_weight": 0.0,
            "bdpo_list_form": "ranking",
        },
        **dict.fromkeys(("apo_zero_unpaired", "bco", "kto"), of_labels),
        "infonca": {**usual, "nca_alpha": 1.0},
        "lipo_lambda": {**usual, "lipo_labels": "win-rate"},
        "nca": {**usual, "nca_alpha": 1.0},
        "pl_dpo": usual,
        "tpo": {"beta": 0.01, "tpo_length_normalized": False, "tpo_gamma": 0.0, "nll_weight": 1.0},
        "cpo": {"beta": 0.1, "nll_weight": 1.0},
        "dpo": {"beta": 0.1, "label_smoothing": 0.0, "nll_weight": 0.0},
        "hinge": {"beta": 0.1, "nll_weight": 0.0},
        "ipo": {"beta": 0.1, "ipo_length_normalized": True, "nll_weight": 0.0},
        "orpo": {"orpo_weight": 0.1},
        "robust": {"beta": 0.1, "label_smoothing": 0.1, "nll_weight": 0.0},
        "safedpo": {"beta": 0.1, "safedpo_delta": 10.0, "nll_weight": 0.0},
        "simpo": {"beta": 2.0, "simpo_gamma": 0.5, "nll_weight": 0.0},
    }
    scores = {"f_divergence": "reverse_kl", "f_alpha_divergence_coef": 0.5, "reference_free": False, "ld_alpha": 1.0}
    for name in ("discopop", "dpo", "exo_pair", "hinge", "ipo", "robust", "safedpo", "sigmoid_norm"):
        expected_defaults[name] = expected_defaults[name] | scores
    of_others = {"bdpo_list", "infonca", "lipo_lambda", "nca", "pl_dpo", "tpo", *("apo_zero_unpaired", "bco", "kto")}
    for name in expected_defaults.keys() - of_others:
        expected_defaults[name] = expected_defaults[name] | {"use_weighting": False}
    assert {name: asdict(losses.build_options(name, {})) for name in losses.names()} == expected_defaults


@pytest.mark.parametrize(
    ("name", "key", "value", "expected_message"),
    [
        ("dpo", "beta", 0.0, "--beta must be above 0 and at most 10,000, got 0.0"),
        ("dpo", "beta", math.inf, "--beta must be above 0"),
        ("dpo", "beta", math.nan, "--beta must be above 0"),
        ("dpo", "beta", "0.1", "--beta must be of type float, got '0.1'"),
        ("dpo", "beta", True, "--beta must be of type float"),
        ("dpo", "label_smoothing", -0.1, "--label-smoothing must be >= 0 and < 0.5"),
        ("dpo", "label_smoothing", 0.5, "--label-smoothing must be >= 0 and < 0.5"),
        ("robust", "label_smoothing", 0.5, "--label-smoothing must be >= 0 and < 0.5"),
        ("bdpo", "bdpo_temperature", 0.0, "--bdpo-temperature must be at least 0.0001 (inf is allowed)"),
        ("bdpo", "bdpo_temperature", 9e-5, "--bdpo-temperature must be at least 0.0001"),
        ("bdpo", "bdpo_temperature", math.nan, "--bdpo-temperature must be at least 0.0001"),
        ("dpo", "beta", 10_001.0, "at most 10,000, got 10001.0. The default is 0.1."),
        ("dpo", "nll_weight", 1e30, "--nll-weight must be at least 0 and at most 10,000"),
        ("bdpo", "bdpo_comprehension", "mean", "--bdpo-comprehension must be one of per-token, sum, got 'mean'"),
        ("bdpo", "bdpo_scale", "no", "--bdpo-scale must be of type bool"),
        ("exo_pair", "label_smoothing", 0.0, "--label-smoothing must be > 0 and < 0.5"),
        ("discopop", "discopop_tau", 1.5, "--discopop-tau must be > 0 and <= 1"),
        ("dpop", "dpop_lambda", -1.0, "--dpop-lambda must be"),
        ("alphapo", "alphapo_alpha", math.inf, "--alphapo-alpha must be between -10,000 and 10,000"),
        ("infonca", "nca_alpha", 0.0, "--nca-alpha must be at least 0.0001 (inf is allowed)"),
        ("lipo_lambda", "lipo_labels", "rank", "--lipo-labels must be one of win-rate, score, got 'rank'"),
        ("bdpo_list", "bdpo_list_form", "pairs", "--bdpo-list-form must be one of ranking, all-pairs"),
        ("orpo", "orpo_weight", -0.1, "--orpo-weight must be at least 0 and at most 10,000"),
        ("safedpo", "safedpo_delta", -1.0, "--safedpo-delta must be at least 0 and at most 10,000"),
        ("simpo", "simpo_gamma", -1.0, "--simpo-gamma must be at least 0 and at most 10,000"),
        ("kto", "desirable_weight", 0.0, "--desirable-weight must be above 0 and at most 10,000"),
        ("bco", "undesirable_weight", -1.0, "--undesirable-weight must be above 0 and at most 10,000"),
        *[(name, "beta", -1.0, "--beta must be") for name in sorted(set(CLOSED_FORMS) - {"orpo", "sft"})],
        *[(name, "nll_weight", -1.0, "--nll-weight must be") for name in sorted(set(CLOSED_FORMS) - {"orpo", "sft"})],
    ],
)
def test_values_out_of_range_are_refused(name, key, value, expected_message):
    with pytest.raises(UserError) as caught:
        losses.build_options(name, {key: value})
    assert expected_message in str(caught.value)


def test_an_open_temperature_is_settled_by_the_pairs():
    pairs = inputs(random_pairs(200), torch.float64)
    options = registry.build_options("bdpo", {"bdpo_temperature": "auto"})
    assert registry.get("bdpo").requirements(options).all_pairs
    with pytest.raises(ValueError, match="still open"):
        registry.get("bdpo").function(pairs, options)
    settled, described = registry.get("bdpo").settle(pairs, options)
    assert isinstance(settled.bdpo_temperature, float) and settled.bdpo_temperature > 0
    assert f"temperature {settled.bdpo_temperature:.4g}" in described
    assert not registry.get("bdpo").requirements(settled).all_pairs
    assert registry.get("bdpo").settle(pairs, settled) == (settled, described)
    metrics = registry.get("bdpo").function(pairs, settled).metrics
    larger = torch.maximum(metrics["weights/chosen"], metrics["weights/rejected"])
    assert (larger <= 1.5 + 1e-12).double().mean().item() == pytest.approx(0.9, abs=1 / 200)


@pytest.mark.parametrize(("pairs", "warns"), [(29, True), (30, False)])
def test_a_temperature_from_few_pairs_warns(pairs, warns):
    options = registry.build_options("bdpo", {"bdpo_temperature": "auto"})
    _, described = registry.get("bdpo").settle(inputs(random_pairs(pairs), torch.float64), options)
    assert ("WARNING: --bdpo-temperature auto takes its quantile from 29 training pairs" in described) is warns


def test_every_number_of_every_loss_has_a_range():
    """The largest that is let through is far from where fp32 overflows."""
    for name in CLOSED_FORMS:
        kinds = field_types(registry.get(name).options)
        for each in fields(registry.get(name).options):
            if kinds[each.name].type in (int, float):
                assert each.metadata["within"] is not None, (name, each.name)
                with pytest.raises(UserError, match=re.escape(flag(each.name))):
                    registry.build_options(name, {each.name: -1e30})


def test_nothing_to_balance_leaves_the_temperature_open_to_nothing():
    same = [p._replace(r_l=p.r_w, u_l=p.u_w, n_l=p.n_w) for p in random_pairs(20)]
    options = registry.build_options("bdpo", {"bdpo_temperature": "auto"})
    with pytest.raises(UserError, match="--bdpo-temperature auto: the reference comprehends both responses alike"):
        registry.get("bdpo").settle(inputs(same, torch.float64), options)
    unused = registry.build_options("bdpo", {"bdpo_temperature": "auto", "bdpo_weights": False, "bdpo_scale": False})
    assert registry.get("bdpo").settle(inputs(same, torch.float64), unused) == (unused, "")


def test_words_are_taken_where_the_option_knows_them():
    with pytest.raises(UserError, match=r"--bdpo-temperature must be of type float or auto, got 'often'"):
        registry.build_options("bdpo", {"bdpo_temperature": "often"})
    with pytest.raises(UserError, match=r"--beta must be of type float, got 'auto'"):
        registry.build_options("bdpo", {"beta": "auto"})


def test_an_option_the_loss_does_not_use_is_refused():
    with pytest.raises(UserError) as caught:
        losses.build_options("simpo", {"beta": 1.0, "label_smoothing": 0.1})
    expected_message = (
        "--label-smoothing is not used by the loss 'simpo', which uses: --beta, --simpo-gamma, --nll-weight, "
        "--use-weighting. "
        "It is an option of: aot, aot_unpaired, dpo, exo_pair, robust."
    )
    assert str(caught.value) == expected_message

    with pytest.raises(UserError, match="No loss uses it; did you mean '--nll-weight'"):
        losses.build_options("dpo", {"nll_wieght": 1.0})


def test_an_unknown_loss_is_refused_with_a_suggestion():
    with pytest.raises(UserError, match=r"unknown loss 'bpdo'; did you mean 'bdpo'.*simpo"):
        losses.get("bpdo")
    with pytest.raises(UserError, match=r"unknown loss 'xyz'\. Known losses: alphapo, aot, aot_unpaired"):
        losses.get("xyz")


def test_option_fields_are_the_union_over_the_losses():
    union = losses.option_fields()
    assert set(union) == {f.name for spec in losses.all_specs() for f in fields(spec.options)}
    assert all(f.help for f in union.values())

    smoothing = {"aot": 0.0, "aot_unpaired": 0.0, "dpo": 0.0, "exo_pair": 1e-3, "robust": 0.1}
    assert union["label_smoothing"].defaults == smoothing
    assert union["beta"].defaults["simpo"] == 2.0
    assert union["bdpo_temperature"].flag == "--bdpo-temperature"
    assert union["bdpo_weights"].type is bool
    assert (union["bdpo_comprehension"].type, union["bdpo_comprehension"].choices) == (str, ("per-token", "sum"))


# --- registering losses ---


@dataclass(frozen=True)
class ClashingOptions(LossOptions):
    beta: int = option(1, "an integer, unlike every other beta")


def spec(name: str, options: type) -> LossSpec:
    return LossSpec(name, lambda pairs, options: None, options, lambda options: Requirements(), "", "")


@pytest.fixture
def fresh_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry._plugins.cache_clear()
    yield
    registry._plugins.cache_clear()


@pytest.mark.usefixtures("fresh_registry")
class TestRegister:
    def test_a_taken_name(self):
        with pytest.raises(UserError, match="'dpo' is taken"):
            losses.register(losses.get("dpo"))

    def test_options_that_are_no_frozen_dataclass(self):
        with pytest.raises(UserError, match="frozen dataclass"):
            losses.register(spec("mine", dataclass(type("Thawed", (), {}))))

    def test_an_option_without_a_default(self):
        bare = dataclass(frozen=True)(type("Bare", (), {"__annotations__": {"beta": float}}))
        with pytest.raises(UserError, match="--beta of loss 'mine' has no default"):
            losses.register(spec("mine", bare))

    def test_an_option_that_no_flag_can_carry(self):
        odd = dataclass(frozen=True)(type("Odd", (), {"__annotations__": {"margins": tuple}, "margins": ()}))
        with pytest.raises(UserError, match=r"Odd\.margins: .* not <class 'tuple'>"):
            losses.register(spec("mine", odd))

    def test_what_nothing_takes(self):
        with pytest.raises(UserError, match=r"'mine' takes 'group'\. Say one of: pairs, groups, answers"):
            losses.register(replace(spec("mine", LossOptions), takes="group"))

    @pytest.mark.parametrize(
        ("takes", "field", "value", "only"),
        [
            ("pairs", "step_shift", lambda answers, options: None, "answers"),
            ("pairs", "advise", lambda desirable, undesirable, options: None, "answers"),
            ("groups", "step_targets", lambda groups, options: None, "pairs"),
            ("groups", "of_difference", True, "pairs"),
            ("answers", "of_difference", True, "pairs"),
            ("answers", "settle", lambda answers, options: (options, ""), "pairs or groups"),
            ("answers", "select", lambda labels: (labels[:, 0] == 0, labels[:, 0] == 1), "pairs or groups"),
        ],
    )
    def test_what_a_loss_of_its_kind_has_no_use_for(self, takes, field, value, only):
        with pytest.raises(UserError, match=f"takes {takes}, and {field} is for losses of {only}. Leave it out"):
            losses.register(replace(spec("mine", LossOptions), takes=takes, **{field: value}))

    def test_one_option_name_with_two_types(self):
        losses.register(spec("mine", ClashingOptions))
        with pytest.raises(UserError, match="--beta has other values for the loss 'alphapo' than for 'mine'"):
            losses.option_fields()


PLUGIN = """
from dataclasses import dataclass, replace
from megatron_bdpo.losses import LossOptions, LossSpec, PairLosses, Requirements, option

@dataclass(frozen=True)
class Options(LossOptions):
    shift: float = option(1.0, "what is added")

def shifted(pairs, options):
    difference = pairs.policy_rejected - pairs.policy_chosen
    return PairLosses(difference + options.shift, pairs.policy_chosen.detach(), pairs.policy_rejected.detach())

SPEC = LossSpec("shifted", shifted, Options, lambda options: Requirements(), "a third party's loss", "none")
OTHER = replace(SPEC, name="dpo")
"""


@pytest.fixture
def install(tmp_path, monkeypatch, fresh_registry):
    """Installs a distribution, as pip would leave it on sys.path, that offers `name = target`."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "shifted_loss_plugin.py").write_text(PLUGIN)

    def install(distribution: str, name: str, target: str) -> None:
        info = tmp_path / f"{distribution}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[megatron_bdpo.losses]\n{name} = {target}\n")

    return install


def test_a_loss_from_an_entry_point(install):
    install("acme_losses", "shifted", "shifted_loss_plugin:SPEC")

    actual, _ = evaluate("shifted", {"shift": 0.25}, inputs([Pair(-5.0, -9.0, 2, 4, 0, 0, 0, 0)], torch.float64))
    expected_loss, expected_grad_w = -3.75, -1.0

    assert (actual.loss.item(), actual.grad_w.item()) == (expected_loss, expected_grad_w)
    assert "shifted" in losses.names()
    assert losses.option_fields()["shift"].defaults == {"shifted": 1.0}


@pytest.mark.parametrize(
    ("name", "target", "expected_message"),
    [
        ("dpo", "shifted_loss_plugin:OTHER", "offers a loss 'dpo', but that name is taken"),
        ("shifted", "no_such_module:SPEC", "cannot be used: ModuleNotFoundError: No module named 'no_such_module'"),
        ("shifted", "shifted_loss_plugin:MISSING", "cannot be used: AttributeError"),
        ("shifted", "shifted_loss_plugin:shifted", "has to be a LossSpec, not function"),
        ("another", "shifted_loss_plugin:SPEC", "the loss calls itself 'shifted'"),
    ],
)
def test_a_broken_entry_point_names_its_distribution(install, name, target, expected_message):
    install("acme_losses", name, target)
    with pytest.raises(UserError) as caught:
        losses.get("dpo")
    assert "distribution 'acme_losses'" in str(caught.value) and expected_message in str(caught.value)


def test_two_distributions_with_one_loss(install):
    install("acme_losses", "shifted", "shifted_loss_plugin:SPEC")
    install("other_losses", "shifted", "shifted_loss_plugin:SPEC")
    with pytest.raises(UserError) as caught:
        losses.names()
    assert "acme_losses" in str(caught.value) and "other_losses" in str(caught.value)


# --- which pairs a loss trains on ---


def test_safedpo_swaps_and_drops_by_the_labels():
    labels = np.array([(0, 1), (1, 0), (0, 0), (1, 1)], np.int8)
    keep, swap = losses.get("safedpo").select(labels)
    assert keep.tolist() == [True, True, True, False]
    assert swap.tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", sorted(set(losses.names()) - {"safedpo"}))
def test_other_losses_train_on_all_pairs_as_they_are(name):
    keep, swap = losses.get(name).select(np.array([(0, 1), (1, 0), (-1, 0), (1, 1)], np.int8))
    assert keep.tolist() == [True] * 4 and swap.tolist() == [False] * 4
