"""--sync-reference-every: the reference moves as TR-DPO says, in every layout, and a resumed run has it as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_bdpo.data.store import PairStore
from tests.distributed.test_resume import assert_bit_identical, run_in_two_parts
from tests.harness.jobs import SGD, last_stage, train, whole_weights
from tests.harness.ranks import RankFailure
from tests.harness.tiny_models import load_model, make_model

pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers")

EVERY, MIX, STEPS = 2, 0.6, 5
SYNC = ["--reference", "resident", "--sync-reference-every", str(EVERY)]
TP2 = ["--tensor-model-parallel-size", "2"]
#: Steps so large that a reference that has not moved, or not as far, gives other losses.
JOB = SGD | {"train_iters": STEPS, "lr": 0.05, "lr_decay_style": "constant", "beta": 0.3}


def trained_in_torch(directory: Path, store: PairStore, mix: float) -> tuple[torch.nn.Module, list[float]]:
    """One process, plain torch: SGD on the mean DPO loss of all pairs; the reference moves after every second step."""
    policy = load_model(directory)
    reference = copy.deepcopy(policy)

    def log_ratio(prompt, response):
        tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))

        def log_prob(model):
            logits = model(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1]
            return logits.log_softmax(-1).gather(1, tokens[len(prompt) :, None]).sum()

        with torch.no_grad():
            of_reference = log_prob(reference)
        return log_prob(policy) - of_reference

    losses = []
    optimizer = torch.optim.SGD(policy.parameters(), lr=JOB["lr"])
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        losses.append(0.0)
        for pair in map(store.pair, range(JOB["max_pairs"])):
            margin = log_ratio(pair.prompt, pair.chosen) - log_ratio(pair.prompt, pair.rejected)
            loss = -torch.nn.functional.logsigmoid(JOB["beta"] * margin) / JOB["max_pairs"]
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        if step % EVERY == 0:
            with torch.no_grad():
                for own, weight in zip(reference.parameters(), policy.parameters(), strict=True):
                    own.copy_(mix * weight + (1 - mix) * own)
    return policy, losses


LAYOUTS = [
    ("llama", 1, []),
    ("llama", 4, [*TP2, "--pipeline-model-parallel-size", "2"]),
    ("llama", 2, ["--context-parallel-size", "2"]),
    ("mixtral", 2, ["--expert-model-parallel-size", "2"]),
]


@pytest.mark.parametrize(("name", "world_size", "flags"), LAYOUTS, ids=["one", "tp2-pp2", "cp2", "ep2"])
def test_it_moves_as_in_plain_torch(ranks, tmp_path, name, world_size, flags):
    directory, saved, cache = make_model(name, tmp_path), tmp_path / "trained", tmp_path / "cache"
    flags = ["--hf-model", str(directory), "--save-hf", str(saved), *SYNC, "--sync-reference-mix", str(MIX), *flags]
    outcomes = ranks(world_size)(train, flags, pair_cache_dir=str(cache), **JOB)
    (meta,) = cache.glob("*/meta.json")
    expected, expected_losses = trained_in_torch(directory, PairStore.open(meta.parent), MIX)
    losses = [step["loss"] for step in last_stage(outcomes).steps]
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-4)  # fp32, steps that multiply differences
    found = load_model(saved).state_dict()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-3, msg=key)
    _, unmoved = trained_in_torch(directory, PairStore.open(meta.parent), 0.0)
    assert abs(unmoved[-1] - losses[-1]) > 0.01, "a reference that stays would not be seen"


def test_the_default_is_the_policy_itself(ranks):
    """Right after such a move the loss is log 2."""
    (outcome,) = ranks(1)(train, SYNC, **JOB)
    losses = [step["loss"] for step in outcome.steps]
    assert losses[0] == losses[2] == losses[4] == pytest.approx(np.log(2), abs=1e-6)
    assert min(abs(loss - np.log(2)) for loss in (losses[1], losses[3])) > 1e-3


def test_it_waits_for_weights_that_are_being_gathered(ranks):
    """With the distributed optimizer each rank has updated a part of the weights when a step ends."""
    job = {"train_iters": 4, "lr": 1e-2}
    overlapped = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    expected, found = (
        [step["loss"] for step in last_stage(ranks(count)(train, [*SYNC, *flags], **job)).steps]
        for count, flags in ((1, []), (2, overlapped))
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found[2] == pytest.approx(np.log(2), abs=1e-6)


MOVES = ["--reference", "resident", "--sync-reference-every", "1", "--sync-reference-mix", "0.5", "--lr", "1e-2"]
EXPERTS = ["--num-experts", "4", "--moe-token-dispatcher-type", "alltoall", "--expert-model-parallel-size", "2"]


@pytest.mark.parametrize(
    ("world_size", "flags"),
    [
        (1, []),
        (4, [*TP2, "--pipeline-model-parallel-size", "2"]),
        (2, ["--bf16", "--deterministic-mode", "--use-distributed-optimizer"]),
        (2, EXPERTS),
    ],
    ids=["one", "tp2-pp2", "bf16", "ep2"],
)
def test_a_resumed_run_is_bit_identical(ranks, tmp_path, world_size, flags):
    assert_bit_identical(*run_in_two_parts(ranks, world_size, tmp_path, [*MOVES, *flags]))


def test_another_layout_resumes_with_the_moved_reference(ranks, tmp_path):
    job = ["--train-iters", "3", "--save-interval", "2", "--save", str(tmp_path), *MOVES, "--ckpt-fully-parallel-save"]
    whole = ranks(1)(train, ["--train-iters", "3", *MOVES])
    ranks(2)(train, [*job, *TP2, "--exit-interval", "2"])
    resumed = ranks(1)(train, [*job, "--load", str(tmp_path)])
    assert resumed[0].steps[0]["loss"] == pytest.approx(whole[0].steps[2]["loss"], abs=2e-6)
    for key, value in whole_weights(whole).items():
        np.testing.assert_allclose(whole_weights(resumed)[key], value, atol=1e-4, err_msg=key)


def test_what_it_cannot_go_on_with(ranks, tmp_path):
    job = ["--train-iters", "2", "--save-interval", "1", "--save", str(tmp_path), "--lr", "1e-2"]
    ranks(1)(train, [*job, *MOVES, "--exit-interval", "1"])
    with pytest.raises(RankFailure, match="that run moved its reference"):
        ranks(1)(train, [*job, "--load", str(tmp_path), "--reference", "resident"])
    with pytest.raises(RankFailure, match="moves a reference, and --preference-loss simpo reads none"):
        ranks(1)(train, MOVES, preference_loss="simpo")
