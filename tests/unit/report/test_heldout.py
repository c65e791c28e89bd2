"""What the report says of single held-out pairs, beside the same by hand; and what it says of hostile rewards."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from megatron_bdpo.display import plain
from megatron_bdpo.report.heldout import Evaluated, held_out_pairs
from megatron_bdpo.report.heldout_figures import heldout_pictures
from megatron_bdpo.report.heldout_labels import LabelledRewards
from megatron_bdpo.report.text import heldout_blocks
from megatron_bdpo.training.reporting.heldout_file import NAME, HeldOutFile, HeldOutRewards
from tests.unit.report.test_report import make_run, refusal, report

PICTURES = {"heldout_margins.png", "calibration.png", "reward_by_length.png"}


def evaluation(step: int, margins, tokens=None) -> HeldOutRewards:
    """Of pairs whose rejected answers have no reward."""
    margins = np.asarray(margins, float)
    rewards = np.stack([margins, np.zeros(len(margins))], axis=1)
    return HeldOutRewards(
        step, np.arange(len(margins)), rewards, np.full((len(margins), 2), 7) if tokens is None else tokens
    )


def evaluated(margins, tokens=None) -> Evaluated:
    return Evaluated.of(evaluation(3, margins, tokens))


def make_heldout(run, *evaluations: HeldOutRewards):
    file = HeldOutFile(run / NAME, 0)
    for each in evaluations:
        file.add(each)
    return run


def test_who_is_right():
    """A tie is half right, as in a run's metrics."""
    found = evaluated([2.0, -1.0, 0.5, 1e-6])
    assert found.right == (1 + 0 + 1 + 0.5) / 4
    assert not found.is_undecided and evaluated([1e-6, -1e-6]).is_undecided
    assert found.predicted[:2].tolist() == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))])


def test_calibration():
    """Thirty pairs of three degrees of sureness, in three bins: predictions, shares and counts by hand."""
    margins = np.concatenate([np.full(10, -0.1), np.full(10, 1.0), [4.0] * 9, [-4.0]])
    bins = evaluated(np.random.default_rng(0).permutation(margins)).calibration()
    predicted = [1 / (1 + math.exp(-size)) for size in (0.1, 1.0, 4.0)]
    assert [each.predicted for each in bins] == pytest.approx(predicted)
    assert [(each.right, each.pairs) for each in bins] == [(0.0, 10), (1.0, 10), (0.9, 10)]
    expected_error = (predicted[0] + (1 - predicted[1]) + abs(predicted[2] - 0.9)) / 3
    assert evaluated(margins).calibration_error == pytest.approx(expected_error)


def test_a_model_that_is_as_sure_as_right_is_calibrated():
    random = np.random.default_rng(1)
    sureness = random.normal(0, 2, 200_000)
    margins = np.where(random.random(len(sureness)) < 1 / (1 + np.exp(-np.abs(sureness))), 1, -1) * np.abs(sureness)
    assert evaluated(margins).calibration_error < 0.005 < evaluated(2 * margins).calibration_error


@pytest.mark.parametrize("pairs", [1, 2, 9, 10, 19, 20, 105, 1000])
def test_every_pair_is_in_one_bin(pairs):
    found = evaluated(np.random.default_rng(pairs).integers(-3, 4, pairs))
    bins = found.calibration()
    assert sum(each.pairs for each in bins) == pairs and len(bins) <= 10
    assert all(0 <= each.interval[0] <= each.right <= each.interval[1] <= 1 for each in bins)
    assert [each.predicted for each in bins] == sorted({each.predicted for each in bins})


def test_wilsons_interval():
    """Brown, Cai and DasGupta 2001, section 3.1.1, by hand for 9 of 10: (0.596, 0.982)."""
    margins = [1.0] * 9 + [-1.0]
    (found,) = evaluated(margins).calibration()
    assert found.interval == pytest.approx((0.5958, 0.9821), abs=1e-4)


def test_rewards_by_length():
    tokens = np.array([[n, 50 - n] for n in range(1, 21)])
    found = evaluated(np.arange(20.0) - 9.5, tokens)
    shorter, longer = found.by_length(0)
    assert (shorter.tokens, shorter.reward, shorter.answers) == (5.5, -5.0, 10)
    assert (longer.tokens, longer.reward) == (15.5, 5.0) and longer.quartiles == (2.75, 7.25)
    assert found.right_by_length() == [("shorter", 0.5, 20)]


def test_pairs_without_finite_rewards_are_left_out():
    found = held_out_pairs([evaluation(0, [1.0, np.nan]), evaluation(9, [np.inf, 2.0])])
    assert found.before.margins.tolist() == [1.0] and found.after.margins.tolist() == [2.0]
    assert found.after.left_out == 1
    assert held_out_pairs([]) is None and held_out_pairs([evaluation(0, [1.0]), evaluation(9, [np.nan])]) is None
    assert held_out_pairs([evaluation(0, [np.nan]), evaluation(9, [1.0])]).several is False


# In a report


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", steps=60)


def test_before_and_after(run, capsys):
    random = np.random.default_rng(0)
    tokens = random.integers(1, 90, (300, 2))
    make_heldout(run, evaluation(0, random.normal(0, 1, 300), tokens), evaluation(60, random.normal(1, 1, 300), tokens))
    said = report(capsys, run)
    assert "margins of 300 held-out pairs" in said and re.search(r"^  step 0 .*\n  step 60 ", said, re.M)
    assert "calibration after step 60: mean distance 0." in said
    assert "right where the chosen answer is longer: 0.8" in said
    html = (run / "report" / "report.html").read_text()
    assert "Of 300 held-out pairs at the latest evaluation, after step 60." in html
    assert {path.name for path in (run / "report").glob("*.png")} >= PICTURES
    assert max(len(line) for line in said.splitlines() if str(run) not in line) <= 80


def test_a_policy_that_was_its_reference():
    """Its margins are no distribution."""
    pairs = held_out_pairs([evaluation(0, np.full(40, -1e-7)), evaluation(60, np.arange(40) - 10)])
    assert re.search(r"^  step 0 +0\.500( +\+0\.000){6}$", plain(heldout_blocks(pairs)), re.M)
    assert "After step 0 every margin was 0: the policy was its reference." in heldout_pictures(pairs)[0].caption


@pytest.mark.parametrize("margins", [[0.5], [0.0, 0.0, 0.0], [1e30, -1e30, 3.0], [800.0] * 30])
def test_few_equal_and_huge_margins(margins):
    pairs = held_out_pairs([evaluation(60, margins)])
    assert [picture.png[:4] for picture in heldout_pictures(pairs)] == [b"\x89PNG"] * 3
    said = plain(heldout_blocks(pairs))
    assert f"margins of {len(margins)} held-out pairs" in said and "nan" not in said


def test_a_run_whose_rewards_are_all_lost(run, capsys):
    make_heldout(run, evaluation(0, [0.0, 0.0]), evaluation(60, [np.nan, np.nan]))
    said = report(capsys, run, "--text-only")
    assert "held-out pairs: no reward is finite at the latest evaluation, after step 60" in said
    assert "margins of" not in said


def test_a_run_without_held_out_pairs(run, capsys):
    (run / NAME).write_text("")
    assert "held-out pairs" not in report(capsys, run)
    assert 'class="tile"' in (run / "report" / "report.html").read_text()


def test_a_damaged_file(run, capsys):
    (run / NAME).write_text('{"step": 1, "pair": [1]}\n')
    assert f"{NAME}, line 1 holds no rewards of pairs" in refusal(capsys, run)


# Of labelled answers


def labelled(step: int, desirable, undesirable) -> HeldOutRewards:
    rewards = [*([value, np.nan] for value in desirable), *([np.nan, value] for value in undesirable)]
    tokens = [*([5, 0] for _ in desirable), *([0, 5] for _ in undesirable)]
    shape = (len(rewards), 2)
    return HeldOutRewards(step, np.arange(len(rewards)), np.reshape(rewards, shape), np.reshape(tokens, shape))


def test_how_far_labels_are_apart():
    """Couples by hand: each desirable answer against each undesirable one."""
    desirable, undesirable = [2.0, 0.0, -1.0], [0.0, -3.0, np.nan]
    found = LabelledRewards.of(labelled(1, desirable, undesirable))
    couples = [(a > b) + (a == b) / 2 for a in desirable for b in undesirable[:2]]
    assert found.apart == pytest.approx(np.mean(couples)) and len(found) == 5
    assert np.isnan(LabelledRewards.of(labelled(1, desirable, [])).apart)
    assert len(LabelledRewards.of(evaluation(1, [1.0, 2.0]))) == 0, "those are pairs"


def test_labelled_answers_in_a_report(run, capsys):
    random = np.random.default_rng(0)
    drawn = [random.normal(size=(2, 40)), random.normal([[2.0], [-2.0]], size=(2, 40))]
    make_heldout(run, *(labelled(step, *each) for step, each in zip((0, 60), drawn, strict=True)))
    said = report(capsys, run)
    assert "rewards of 80 held-out answers, to step 60" in said and "margins of" not in said
    assert re.search(r"^  step 60 +(1\.000|0\.99\d) +\+[12]\.\d+ +-[12]\.\d+ +80$", said, re.M)
    assert "Held-out labelled answers" in (run / "report" / "report.html").read_text()
    assert (run / "report" / "heldout_labels.png").exists()


def test_pairs_and_labelled_answers_in_one_report(run, capsys):
    pairs, answers = evaluation(60, [1.0, np.nan]), labelled(60, [1.0], [])
    both = [np.concatenate([getattr(each, name) for each in (pairs, answers)]) for name in ("rewards", "tokens")]
    make_heldout(run, HeldOutRewards(60, np.arange(3), *both))
    said = report(capsys, run, "--text-only")
    assert "margins of 1 held-out pairs" in said and "rewards of 1 held-out answers" in said
    assert "left out, for rewards that are not finite: 1" in said
