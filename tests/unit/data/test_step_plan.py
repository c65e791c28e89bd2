"""The step plan: which pairs make up a step, and how its pairs are put into packs."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bdpo.data import step_plan
from megatron_bdpo.data.step_plan import PlanSettings, StepPlan, epoch_pairs, plan_steps
from megatron_bdpo.errors import UserError

PLAN = PlanSettings(pairs_per_step=4, data_parallel=1, max_pack_length=128)


@dataclasses.dataclass(frozen=True)
class Case:
    """Pairs, settings and a number of steps that can be planned."""

    sizes: np.ndarray
    settings: PlanSettings
    steps: int

    def plan(self, **changes) -> StepPlan:
        return plan_steps(self.sizes, dataclasses.replace(self.settings, **changes), self.steps)


@st.composite
def cases(draw) -> Case:
    sizes = np.array(draw(st.lists(st.integers(2, 90), min_size=2, max_size=40)))
    pairs_per_step = draw(st.integers(1, len(sizes)))
    multiple = draw(st.sampled_from([1, 8, 16]))
    shortest_limit = -(-int(sizes.max()) // multiple)
    return Case(
        sizes,
        PlanSettings(
            pairs_per_step=pairs_per_step,
            data_parallel=draw(st.integers(1, min(4, pairs_per_step))),
            max_pack_length=multiple * draw(st.integers(shortest_limit, 3 * shortest_limit)),
            microbatch_multiple=draw(st.integers(1, 3)),
            length_multiple=multiple,
            pipeline_wait=draw(st.sampled_from([0.0, 0.5, 3.0])),
            seed=draw(st.integers(0, 3)),
            fixed_length=draw(st.booleans()),
        ),
        steps=draw(st.integers(1, 12)),
    )


def some_sizes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, 100, count)


# Which pairs make up a step


@given(cases())
@settings(max_examples=60, deadline=None)
def test_every_step_has_exactly_the_pairs_asked_for(case):
    assert case.plan().steps.shape == (case.steps, case.settings.pairs_per_step)


@pytest.mark.parametrize(("pairs", "per_step"), [(12, 4), (12, 12), (2048, 4)])  # 2048/4: two windows of steps
def test_an_epoch_of_whole_steps_visits_every_pair_once(pairs, per_step):
    steps_per_epoch = pairs // per_step
    plan = plan_steps(some_sizes(pairs), dataclasses.replace(PLAN, pairs_per_step=per_step), 3 * steps_per_epoch)
    counts = np.bincount(plan.steps.ravel(), minlength=pairs)
    assert (counts == 3).all()
    if steps_per_epoch <= 256:  # then epochs begin where windows of steps do
        for epoch in range(3):
            visited = plan.steps[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch].ravel()
            assert sorted(visited) == list(range(pairs))


@given(st.integers(2, 14), st.data())
@settings(max_examples=40, deadline=None)
def test_pairs_are_visited_once_per_epoch_across_its_borders(pairs, data):
    """Steps may straddle epochs. Whenever a window of steps is complete, no pair is ahead of another by two visits."""
    per_step = data.draw(st.integers(1, pairs))
    window = pairs // per_step
    plan = plan_steps(some_sizes(pairs), dataclasses.replace(PLAN, pairs_per_step=per_step), window * pairs)
    for stop in range(window, len(plan.steps) + 1, window):
        counts = np.bincount(plan.steps[:stop].ravel(), minlength=pairs)
        visits = stop * per_step / pairs
        assert np.floor(visits) <= counts.min() <= counts.max() <= np.ceil(visits)


def test_no_pair_is_twice_in_a_step_where_steps_do_not_straddle_epochs():
    plan = plan_steps(some_sizes(64), dataclasses.replace(PLAN, pairs_per_step=16), 40)
    assert all(len(set(step)) == 16 for step in plan.steps.tolist())


@given(cases(), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_a_longer_run_repeats_the_steps_of_a_shorter_one(case, more):
    longer = plan_steps(case.sizes, case.settings, case.steps + more)
    assert np.array_equal(longer.steps[: case.steps], case.plan().steps)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_steps_do_not_depend_on_the_layout(case):
    expected_steps = case.plan().steps
    most = case.settings.pairs_per_step
    for changes in (
        {"data_parallel": 1},
        {"data_parallel": most},
        {"max_pack_length": case.settings.max_pack_length * 2},
        {"pipeline_wait": 0.0 if case.settings.pipeline_wait else 1.0},
        {"microbatch_multiple": 4},
        {"pack_pairs": False, "data_parallel": 1, "microbatch_multiple": 1},
    ):
        assert np.array_equal(case.plan(**changes).steps, expected_steps), changes


def test_the_seed_decides_the_plan():
    sizes = some_sizes(60)
    one, same, other = (plan_steps(sizes, dataclasses.replace(PLAN, seed=seed), 20) for seed in (1, 1, 2))
    assert np.array_equal(one.steps, same.steps)
    assert np.array_equal(one.pack_of, same.pack_of)
    assert not np.array_equal(one.steps, other.steps)


def test_epochs_are_shuffled_differently():
    plan = plan_steps(some_sizes(40), dataclasses.replace(PLAN, pairs_per_step=10), 8)
    assert not np.array_equal(plan.steps[:4], plan.steps[4:])


def test_steps_need_nearly_the_same_number_of_tokens():
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(5, 0.6, 3200).astype(int).clip(10, 900)
    plan = plan_steps(sizes, dataclasses.replace(PLAN, pairs_per_step=32, max_pack_length=1024), 100)
    unlevelled = rng.permutation(sizes).reshape(100, 32).sum(axis=1)
    # A step with one of the few longest pairs cannot be levelled fully by pairs of like length: 4.8% remain of 60%.
    assert np.ptp(plan.real_tokens) < 0.06 * plan.real_tokens.mean()
    assert np.ptp(unlevelled) > 0.4 * unlevelled.mean()


def test_epochs_are_joined_without_a_seam():
    """Made one at a time, the stream is what all epochs joined would be."""
    pools = [(np.arange(11), 1.0), (np.arange(11, 20), 1.5)]
    stream = np.concatenate(list(itertools.islice(step_plan._windows(pools, 3, 7), 20)))
    joined = np.concatenate([step_plan._epoch(pools, 3, epoch) for epoch in range(6)])
    assert (stream == joined[:140]).all()


def test_a_long_window_takes_several_epochs():
    pools = [(np.arange(5), 1.0)]
    (first,) = itertools.islice(step_plan._windows(pools, 3, 12), 1)
    assert first.tolist() == np.concatenate([step_plan._epoch(pools, 3, epoch) for epoch in range(3)])[:12].tolist()


def test_plans_of_a_seed_stay_what_they_were():
    """Runs that go on with a later version see the same pairs. The digest is of the version before plans had blocks."""
    sizes = np.random.default_rng(9).integers(10, 900, 3000)
    pools = [(np.arange(1000), 1.5), (np.arange(1000, 3000), 0.7)]
    plan = plan_steps(sizes, PlanSettings(16, 4, 2048, seed=5), 400, pools, sizes**2)
    arrays = (plan.steps, plan.pack_of, plan.lengths, plan.real_tokens)
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(each, "<i8").tobytes() for each in arrays)).hexdigest()
    assert digest == "10f1b9a1f245024349d1f5455b96fec0e46b324618424623ebe216d6c975cd9f"
    assert plan.pack_of.dtype == np.int32 and plan.steps.dtype == plan.lengths.dtype == np.int64


# Weights of sources


@pytest.mark.parametrize(("weight", "expected_visits"), [(2.0, {2}), (1.0, {1}), (0.5, {0, 1}), (1.5, {1, 2})])
def test_weight_is_visits_per_epoch(weight, expected_visits):
    weighted, plain = np.arange(0, 40), np.arange(40, 60)
    pools = [(weighted, weight), (plain, 1.0)]
    expected_draws = 40 * weight + 20
    assert epoch_pairs(pools) == expected_draws
    plan = plan_steps(some_sizes(60), PLAN, int(expected_draws) // 4, pools)
    counts = np.bincount(plan.steps.ravel(), minlength=60)
    assert set(counts[:40]) == expected_visits
    assert counts[:40].sum() == 40 * weight
    assert set(counts[40:]) == {1}


def test_fractional_weight_draws_another_part_in_each_epoch():
    pools = [(np.arange(40), 0.5)]
    plan = plan_steps(some_sizes(40), PLAN, 10, pools)
    first, second = set(plan.steps[:5].ravel()), set(plan.steps[5:].ravel())
    assert len(first) == len(second) == 20
    assert first != second


def test_pairs_outside_the_pools_are_never_visited():
    sizes = some_sizes(30)
    sizes[7] = 10_000  # would not fit, and does not have to
    used = np.delete(np.arange(30), 7)
    plan = plan_steps(sizes, PLAN, 30, [(used, 1.0)])
    assert set(plan.steps.ravel()) == set(used)


# Packs


@given(cases())
@settings(max_examples=100, deadline=None)
def test_packs_hold_each_pair_once_and_never_overflow(case):
    plan, limits = case.plan(), case.settings
    for step in range(case.steps):
        packs = [pack for rank in range(limits.data_parallel) for pack in plan.packs(step, rank)]
        assert len(packs) == plan.packs_per_step == plan.microbatches * limits.data_parallel
        assert sorted(np.concatenate(packs)) == sorted(plan.steps[step])
        lengths = np.tile(plan.lengths[step], limits.data_parallel)  # every rank's m-th pack has the m-th length
        assert all(case.sizes[pack].sum() <= length for pack, length in zip(packs, lengths, strict=True))
        assert plan.positions[step] == lengths.sum()
        assert plan.real_tokens[step] == case.sizes[plan.steps[step]].sum()
    assert 0 < plan.lengths.min() <= plan.longest <= limits.max_pack_length
    assert (plan.lengths % limits.length_multiple == 0).all()
    assert plan.microbatches % limits.microbatch_multiple == 0
    assert 0 < plan.fill <= 1


@given(cases())
@settings(max_examples=60, deadline=None)
def test_every_rank_has_a_pair_in_every_step(case):
    plan = case.plan()
    for step in range(case.steps):
        for rank in range(case.settings.data_parallel):
            assert sum(len(pack) for pack in plan.packs(step, rank)) > 0


def test_without_packing_every_pair_has_its_own_pack():
    sizes = some_sizes(24)
    plan = plan_steps(sizes, dataclasses.replace(PLAN, data_parallel=2, pack_pairs=False), 6)
    assert plan.microbatches == 2
    assert plan.longest == -(-int(sizes.max()) // 8) * 8
    for step in range(6):
        packs = [plan.packs(step, rank) for rank in (0, 1)]
        assert [len(pack) for rank in packs for pack in rank] == [1, 1, 1, 1]
        for microbatch, length in enumerate(plan.lengths[step]):
            assert length == -(-max(sizes[rank[microbatch][0]] for rank in packs) // 8) * 8


def test_fill_is_the_share_of_positions_that_hold_tokens():
    plan = plan_steps(np.full(4, 30), dataclasses.replace(PLAN, max_pack_length=64), 1)
    assert plan.lengths.tolist() == [[64, 64]]
    assert plan.fill == pytest.approx(120 / 128)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_as_in_hh_rlhf_fill_packs(seed):
    """Lengths like HH-RLHF's (sharing the prompt saves about a third), truncated to 512 as is usual."""
    rng = np.random.default_rng(seed)
    prompt = rng.lognormal(4.8, 0.8, 20_000).astype(int).clip(1, 512)
    responses = rng.lognormal(4.0, 0.7, (20_000, 2)).astype(int).clip(1, 512).sum(axis=1)
    plan = plan_steps(prompt + responses, PlanSettings(64, 2, 2048, seed=seed), 300)
    assert plan.fill >= 0.95


def whole_hh_prompts(count: int, seed: int) -> np.ndarray:
    """Pair sizes like those of HH-RLHF's harmless dialogues, prompts whole: median 173, 1% above 700."""
    return np.random.default_rng(seed).lognormal(5.15, 0.62, count).astype(int).clip(16, 2000)


@pytest.mark.parametrize(("pairs_per_step", "ranks"), [(8, 1), (64, 1), (64, 8), (512, 8)])
@pytest.mark.parametrize("pipeline_wait", [3.0, 0.0])
def test_whole_prompts_fill_packs(pairs_per_step, ranks, pipeline_wait):
    """One very long pair now and then makes the packs of its own step long, and no others."""
    sizes = whole_hh_prompts(8 * 1024, seed=1)
    plan = plan_steps(sizes, PlanSettings(pairs_per_step, ranks, 4096, pipeline_wait=pipeline_wait), len(sizes) // 512)
    assert plan.fill >= 0.95


def test_pipeline_stages_get_one_length_per_step():
    sizes = whole_hh_prompts(640, seed=2)
    plan = plan_steps(sizes, PlanSettings(64, 2, 2048, pipeline_wait=3.0), 10)
    assert plan.microbatches > 1
    assert (plan.lengths == plan.lengths[:, :1]).all()


@pytest.mark.parametrize("pack_pairs", [True, False])
def test_packs_of_fixed_length_are_as_long_as_they_may_be_and_as_few_as_hold_the_pairs(pack_pairs):
    sizes = some_sizes(320)
    plan = plan_steps(sizes, PlanSettings(64, 2, 2048, fixed_length=True, pack_pairs=pack_pairs), 10)
    assert (plan.lengths == 2048).all()
    expected = -(-int(plan.real_tokens.max()) // 2048) if pack_pairs else 64
    assert plan.packs_per_step == expected + expected % 2


@pytest.mark.parametrize(("waits", "packs", "length"), [(0.0, 13, 3840), (0.5, 16, 3072), (7.0, 22, 2304)])
def test_the_more_pipeline_stages_wait_the_more_packs(waits, packs, length):
    """Of 64 pairs of 768 positions 13 packs hold five each, 16 four, 22 three, and two would be packs below 2048."""
    plan = plan_steps(np.full(640, 768), PlanSettings(64, 1, 4096, pipeline_wait=waits), 10)
    assert (plan.microbatches, plan.longest) == (packs, length)


def test_packs_are_not_made_shorter_for_the_pipeline_than_kernels_like():
    sizes = np.full(640, 100)
    alone, waiting = (plan_steps(sizes, PlanSettings(64, 1, 2048, pipeline_wait=waits), 10) for waits in (0.1, 7.0))
    assert waiting.microbatches == alone.microbatches


@pytest.mark.parametrize("multiple", [8, 128])
def test_lengths_are_few_and_the_longest_is_not_rounded_beyond_need(multiple):
    sizes = whole_hh_prompts(16_000, seed=3)
    plan = plan_steps(sizes, PlanSettings(4, 1, 4096, length_multiple=multiple), 4000)
    assert len(np.unique(plan.lengths)) <= 64
    fullest = max(int(sizes[pack].sum()) for step in range(4000) for pack in plan.packs(step, 0))
    assert plan.longest == -(-fullest // multiple) * multiple


def test_more_packs_are_taken_only_where_they_save_something():
    """Two packs of 500 hold no more padding than one of 1000, which suits the kernels better."""
    plan = plan_steps(np.full(40, 100), PlanSettings(10, 1, 1000), 4)
    assert plan.lengths.tolist() == [[1000]] * 4


def test_attention_cost_is_spread_over_ranks():
    """Two packs of one long pair and two of eight short ones: attention is quadratic, so each rank gets one of each."""
    sizes = np.array([64, 64] + 16 * [8])
    plan = plan_steps(sizes, PlanSettings(pairs_per_step=18, data_parallel=2, max_pack_length=64), 1, costs=sizes**2)
    assert plan.fill == 1
    for rank in (0, 1):
        assert sorted(len(pack) for pack in plan.packs(0, rank)) == [1, 8]


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs_per_step": 0}, "--pairs-per-step must be at least 1, not 0"),
        ({"pairs_per_step": 3, "data_parallel": 4}, "--pairs-per-step 3 cannot be split over 4 data-parallel ranks"),
        ({"max_pack_length": 100}, "--seq-length 100 must be a multiple of 8"),
        ({"max_pack_length": 120, "length_multiple": 16}, "--seq-length 120 must be a multiple of 16"),
        (
            {"pack_pairs": False, "pairs_per_step": 6, "data_parallel": 4},
            "6 packs cannot be split evenly over 4 data-parallel ranks",
        ),
        (
            {"pack_pairs": False, "pairs_per_step": 6, "data_parallel": 2, "microbatch_multiple": 2},
            r"over 2 data-parallel ranks in groups of 2\. Use a multiple of 4",
        ),
    ],
)
def test_settings_that_cannot_be_planned_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLAN, **changes)


def test_more_pairs_per_step_than_pairs_is_refused():
    with pytest.raises(UserError, match="--pairs-per-step 4 is more than the 3 usable pairs"):
        plan_steps(some_sizes(3), PLAN, 1)


def test_weights_count_as_usable_pairs():
    plan = plan_steps(some_sizes(3), PLAN, 1, [(np.arange(3), 2.0)])
    assert plan.steps.shape == (1, 4)


def test_pair_longer_than_a_pack_is_refused():
    with pytest.raises(UserError, match="one of the pairs takes 129 positions, more than a pack of --seq-length 128"):
        plan_steps(np.array([10, 129, 10, 10]), PLAN, 1)


@pytest.mark.parametrize("steps", [0, -1])
def test_a_run_without_steps_is_refused(steps):
    with pytest.raises(UserError, match=f"--train-iters must be at least 1, not {steps}"):
        plan_steps(some_sizes(8), PLAN, steps)
