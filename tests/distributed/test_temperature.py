"""The temperature that follows from the data: settled once, printed, kept over a resume, the same on all ranks."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from tests.harness.jobs import Outcome, WeightsKept, last_stage, run_job, score, scores_in, train
from tests.harness.ranks import RankFailure

AUTO = ["--bdpo-temperature", "auto"]
TELLING = {"init_method_std": 0.1}  # at Megatron's 0.02 so narrow a model hardly reads its prompt


def expected_temperature(cache: Path) -> float:
    scores = scores_in(cache)
    information = (scores.conditional - scores.unconditional) / scores.tokens
    return float(np.quantile(np.abs(information[:, 0] - information[:, 1]), 0.9) / math.log(3))


def train_and_tell(flags, **overrides):
    """On a rank: the outcome, what was printed, and the temperature of the step's loss."""
    import contextlib
    import io

    printed, weights = io.StringIO(), WeightsKept()
    with contextlib.redirect_stdout(printed):
        run, exit_code = run_job(flags, overrides, [weights])
    outcome = Outcome(run.progress.steps, run.progress.evaluations, list(weights.shards), exit_code)
    temperatures = run.step.loss.options.bdpo_temperature, run.job.loss.options.bdpo_temperature
    return outcome, printed.getvalue(), temperatures


def test_it_is_the_rules_and_all_ranks_have_it(ranks, tmp_path):
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    epoch = TELLING | {"train_iters": 6, "pair_cache_dir": str(tmp_path)}
    seen = ranks(4)(train_and_tell, [*AUTO, *layout], **epoch)
    tau = expected_temperature(tmp_path)
    assert {each for _, _, temperatures in seen for each in temperatures} == {seen[0][2][0]}
    assert seen[0][2][0] == pytest.approx(tau, rel=1e-12)
    printed = seen[0][1]
    assert f"loss: bdpo_temperature {tau:.6g}, from 48 of 48 training pairs" in printed
    assert "comprehension of 48 training pairs, nats per token" in printed
    explicit = ranks(1)(train, ["--bdpo-temperature", repr(tau)], **epoch)
    for step, expected in zip(last_stage(seen)[0].steps, last_stage(explicit).steps, strict=True):
        assert step["weights/chosen"] == pytest.approx(expected["weights/chosen"], rel=1e-6)
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_resumed_run_keeps_it(ranks, tmp_path):
    """Also where the scores would now give another: here by their being changed on disk."""
    flags = [*AUTO, "--train-iters", "4", "--save-interval", "2", "--save", str(tmp_path), "--load", str(tmp_path)]
    ((_, _, (tau, _)),) = ranks(1)(train_and_tell, [*flags, "--exit-interval", "2"], **TELLING)
    ((outcome, printed, (resumed, _)),) = ranks(1)(_resume_with_other_rule, flags, **TELLING)
    assert resumed == tau
    assert [step["iteration"] for step in outcome.steps] == [3, 4]
    assert f"bdpo_temperature {tau:.6g}, as at the run's first start" in printed


def test_it_is_of_the_pairs_that_the_steps_use(ranks, tmp_path):
    """Not of what else is in the cache, nor of held-out pairs; a resumed run that goes on for longer keeps it."""
    flags = [*AUTO, "--eval-share", "0.25", "--pair-cache-dir", str(tmp_path / "cache")]
    ranks(1)(score, flags, **TELLING)
    run = ["--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"), "--save-interval", "2"]
    run += ["--override-opt-param-scheduler", "--train-iters"]
    ((ids, edges, printed),) = ranks(1)(train_and_tell_pairs, [*flags, *run, "2"], **TELLING)
    scores = scores_in(tmp_path / "cache")
    assert np.isfinite(scores.conditional).all() and len(ids) == 16
    information = ((scores.conditional - scores.unconditional) / scores.tokens)[ids]
    imbalance = np.abs(information[:, 0] - information[:, 1])
    expected = float(np.quantile(imbalance, 0.9) / math.log(3))
    assert f"bdpo_temperature {expected:.6g}, from 16 of 36 training pairs" in printed
    assert edges == pytest.approx(np.quantile(imbalance, [0.25, 0.5, 0.75]).tolist(), rel=1e-12)
    assert "quartiles of the imbalance:" in printed and printed.count("from 16 of 36 training pairs") == 2
    ((more, kept, printed),) = ranks(1)(train_and_tell_pairs, [*flags, *run, "4"], **TELLING)
    assert len(more) == 32 and kept == edges
    assert f"bdpo_temperature {expected:.6g}, as at the run's first start" in printed
    assert printed.count("as at the run's first start") == 2


def train_and_tell_pairs(flags, **overrides):
    """On a rank: the pairs of the steps, the edges between the quartiles, and what was printed."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run, _ = run_job(flags, overrides)
    return np.unique(run.job.plan.steps), run.step.imbalance_edges.tolist(), printed.getvalue()


def _resume_with_other_rule(flags, **overrides):
    from unittest import mock

    from megatron_bdpo.losses import bdpo

    with mock.patch.object(bdpo, "automatic_temperature", lambda *_: 123.0):
        return train_and_tell(flags, **overrides)


def test_the_distribution_is_printed_for_a_number_too(ranks, tmp_path):
    ((_, printed, _),) = ranks(1)(train_and_tell, [], pair_cache_dir=str(tmp_path))
    (table,) = re.findall(r"comprehension of 24 training pairs.*temperature 1\n(?:  .*\n)+", printed)
    for row in ("median", "I_w ", "I_l ", "|I_w - I_l|", "weights there", "scale there"):
        assert row in table


def test_a_resident_reference_cannot_tell(ranks, tmp_path):
    with pytest.raises(RankFailure, match="--reference resident knows no scores before the first step"):
        ranks(1)(train, [*AUTO, "--reference", "resident"], pair_cache_dir=str(tmp_path))


def test_nothing_to_balance_is_refused(ranks, tmp_path):
    """The empty prompt is the prompt: it tells nothing."""
    data = tmp_path / "pairs.jsonl"
    rows = [f'{{"prompt": "", "chosen": "Yes, number {n}.", "rejected": "No, number {n}."}}\n' for n in range(8)]
    data.write_text("".join(rows))
    with pytest.raises(RankFailure, match="comprehends both responses alike in at least 90%"):
        ranks(1)(train, [*AUTO, "--pair-data", str(data)], pair_cache_dir=str(tmp_path))
