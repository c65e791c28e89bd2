"""A pack on its way to the model and the loss: one piece of memory, and pairs wherever they are among its answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_bdpo.data.context import ContextRank, context_part
from megatron_bdpo.data.packs import Pack, lay_out
from tests.unit.data.test_groups import stored
from tests.unit.data.test_packs import group
from tests.unit.data.test_pool import RankedStore

#: Answers 0 to 2, 3, and 4 to 8.
PACK = lay_out([group(3, 2, 1, 4), group(2, 3, first_token=20), group(4, 1, 1, 2, 3, 1, first_token=30)], 32)

#: Chosen and rejected: one answer in two pairs, another in none, and no order.
PAIRS = [[2, 0], [1, 0], [8, 4], [5, 7]]


def batch_of(pack: Pack, length: int) -> Any:
    import torch

    from megatron_bdpo.training.batches import PackPairs, to_batch

    unsafe = torch.tensor([[0, 1], [1, 0], [-1, -1], [0, 0]])
    margin, weight = torch.arange(4.0), torch.tensor([1 / 2, 1 / 2, 1 / 2, 1 / 2])
    first, of_groups = np.array([0, 2, 2]), torch.ones(3, dtype=torch.float64)
    pairs = PackPairs(np.arange(50, 54), torch.tensor(PAIRS), unsafe, margin, weight, 2, first, of_groups)
    return to_batch(pack, length, 64, pairs)


def tensors_of(value: Any, name: str = "") -> dict[str, Any]:
    """All tensors in a batch by their place, but its memory."""
    import dataclasses

    import torch

    if isinstance(value, torch.Tensor):
        return {} if name == ".memory" else {name: value}
    found: dict[str, Any] = {}
    for each in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
        found |= tensors_of(getattr(value, each.name), f"{name}.{each.name}")
    return found


def moved() -> dict[str, Any]:
    """What a batch has before and after it is moved, and how many pieces of memory that took."""
    import dataclasses

    batch = batch_of(PACK, 32)
    batch = dataclasses.replace(batch, unconditional=batch_of(PACK, 32))
    taken = []

    def move(memory: Any) -> Any:
        taken.append(memory.clone())
        memory.zero_()  # what would still be read of it
        return taken[-1]

    before = {name: tensor.clone() for name, tensor in tensors_of(batch).items()}
    after = tensors_of(batch._moved(move))
    storages = {memory.untyped_storage().data_ptr() for memory in taken}
    return {
        "before": {name: tensor.numpy() for name, tensor in before.items() if tensor.numel()},
        "after": {name: tensor.numpy() for name, tensor in after.items() if tensor.numel()},
        "in place": all(t.untyped_storage().data_ptr() in storages for t in after.values() if t.numel()),
        "moves": len(taken),
    }


def test_a_batch_is_moved_in_one_piece(ranks):
    (found,) = ranks(1)(moved)
    assert found["moves"] == 2 and found["in place"], "one for the pack, one for its answers after the empty prompt"
    inner = {name for name in found["before"] if not name.startswith(".unconditional")}
    assert {".tokens", ".attention.key_index", ".scored.hidden", ".pairs.answers", ".answer_tokens"} <= inner
    memories = {name for name in found["before"] if name.endswith(".memory")}
    for name in found["before"].keys() - memories:
        assert np.array_equal(found["after"][name], found["before"][name]), name


def pairs_read() -> dict[str, Any]:
    """What a loss reads of the batch of each of two context-parallel ranks."""
    import torch

    from megatron_bdpo.training.forward import entropy_report, pairs_of

    policy = torch.arange(9, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(PAIRS, dtype=torch.float64) - 100
    seen = []
    for rank in range(2):
        batch = batch_of(context_part(PACK, ContextRank(2, rank)), 32)
        pairs = pairs_of(batch, policy, reference, None)
        seen.append({name: value.tolist() for name, value in vars(pairs).items() if value is not None})
    pairs.policy_chosen.sum().backward()
    entropy = entropy_report(policy[torch.tensor(PAIRS)], batch.answer_tokens[torch.tensor(PAIRS)])
    return {"seen": seen, "gradient": policy.grad.tolist(), "entropy": {k: v.tolist() for k, v in entropy.items()}}


def test_pairs_are_read_where_they_are(ranks):
    (found,) = ranks(1)(pairs_read)
    chosen, rejected = [list(column) for column in zip(*PAIRS, strict=True)]
    tokens = [2, 1, 4, 3, 1, 1, 2, 3, 1]
    for seen in found["seen"]:
        assert seen.keys() == {
            *("policy_chosen", "policy_rejected", "chosen_tokens", "rejected_tokens"),
            *("reference_chosen", "reference_rejected", "chosen_unsafe", "rejected_unsafe"),
        }
        assert (seen["policy_chosen"], seen["policy_rejected"]) == (chosen, rejected)
        assert seen["chosen_tokens"] == [tokens[answer] for answer in chosen], "of the whole answer, on every rank"
        assert seen["rejected_tokens"] == [tokens[answer] for answer in rejected]
        assert seen["reference_rejected"] == [answer - 100 for answer in rejected]
        assert (seen["chosen_unsafe"], seen["rejected_unsafe"]) == ([0, 1, -1, 0], [1, 0, -1, 0])
    assert found["gradient"] == [float(answer in chosen) for answer in range(9)]
    assert found["entropy"] == {
        "entropy/chosen": [2 + 1 + 8 + 5, 4 + 1 + 1 + 1],
        "entropy/rejected": [11, 2 + 2 + 1 + 3],
    }


def group_read(over_pairs: bool) -> dict[str, Any]:
    """What losses read of a pack with a row of four answers, all pairs of it, and a plain pair."""
    import torch

    from megatron_bdpo.data.pool import PairPool
    from megatron_bdpo.training.batches import PackMaker
    from megatron_bdpo.training.forward import ReferenceLogProbs
    from megatron_bdpo.training.group_step import GroupStep, groups_of

    pool = PairPool([RankedStore()])
    make = PackMaker(pool, 64, over_pairs=over_pairs, takes="groups")
    batch, other_way = make(np.array([1, 0]), 48), make(np.array([0, 1]), 48)
    policy = torch.arange(6, dtype=torch.float64)  # of the pack's answers: the pair's, then the row's
    reference: Any = SimpleNamespace(lookup=lambda batch: ReferenceLogProbs(policy[batch.pairs.answers] - 100))
    scoring: Any = SimpleNamespace(apart=lambda scores: (scores, None, None))
    loss: Any = None
    step = GroupStep(loss, reference, scoring)
    read, (_, weight, ids, _) = step._inputs(batch, policy).read, step._inputs(other_way, policy)
    empty = PackMaker(pool, 64, takes="groups")(np.zeros(0, np.int64), 8)
    return {
        "pairs": batch.pairs.ids.tolist(),
        "answers": batch.pairs.answers.tolist(),
        "weight": batch.pairs.weight.tolist(),
        "count": batch.pairs.count,
        "groups": len(batch.attention.group_weight),
        "first": batch.pairs.first.tolist(),
        "named": ids.tolist(),
        "weights": weight.tolist(),
        **{name: value.tolist() for name, value in vars(read).items() if value is not None},
        "none": [len(groups_of(empty, policy[:0], policy[:0].view(0, 2), None)), empty.pairs.count, len(empty.pairs)],
    }


@pytest.mark.parametrize("over_pairs", [False, True])
def test_a_pack_of_groups(ranks, over_pairs):
    (found,) = ranks(1)(group_read, over_pairs)
    assert found["pairs"] == [6, 0, 1, 2, 3, 4, 5] and found["first"] == [0, 1]
    assert found["answers"] == [[0, 1], *([a + 2, b + 2] for a, b in RankedStore.PAIRS)]
    assert found["weight"] == ([1] * 7 if over_pairs else pytest.approx([1, *[1 / 6] * 6]))
    assert (found["count"], found["groups"]) == (7 if over_pairs else 2, 2)
    assert found["named"] == [0, 6] and found["weights"] == ([6, 1] if over_pairs else [1, 1])
    assert found["present"] == [[True, True, False, False], [True] * 4]
    there = [
        [value for value, is_there in zip(row, found["present"][index], strict=True) if is_there]
        for index, row in enumerate(found["policy"])
    ]
    assert there == [[0, 1], [2, 3, 4, 5]]
    assert found["reference"][1] == [-98, -97, -96, -95] and found["tokens"][1] == [2, 3, 4, 5]
    assert found["score"] == [[1, -1, 0, 0], [3, 1, -1, -3]], "no scores given: won less lost"
    assert found["unsafe"][0][:2] == [0, 1] and found["none"] == [0, 0, 0]


def refused() -> str:
    """What is said of two groups, of which one has a loss that is not finite."""
    import torch

    from megatron_bdpo.errors import UserError
    from megatron_bdpo.losses import GroupLogProbs
    from megatron_bdpo.training.finite import check_losses

    policy, present = torch.tensor([[-1.0, -2.0, 0.0], [-3.0, float("nan"), -5.0]]), torch.ones(2, 3).bool()
    present[1, 2] = False
    groups = GroupLogProbs(policy, torch.ones(2, 3), torch.ones(2, 3), present, reference=policy - 1)
    try:
        check_losses(torch.tensor([1.0, float("nan")]), groups, np.array([4, 7]), "row {}".format, "step 3")
    except UserError as error:
        return str(error)
    return ""


def test_the_group_whose_loss_is_not_finite_is_named(ranks):
    (told,) = ranks(1)(refused)
    assert "step 3: the loss of 1 group is not finite:\n  row 7: loss nan, policy -3 / nan, reference -4 / nan" in told


#: A row of three pairs of three answers, and one of a pair; the latter asks for a margin.
GROUPS = [(1, "A", "B", None), (1, "C", "A", None), (1, "C", "B", None), (2, "A", "B", 0.5)]
ANSWERS = {"A": (1, 2), "B": (3,), "C": (4, 5, 6)}
EMPTY = [0]  # the unconditional prompt of ``stored``


def made(directory: str) -> dict[str, Any]:
    """What a pack of these groups has, the second first, once after its own prompt and once after the empty one."""
    from pathlib import Path

    from megatron_bdpo.data.pool import PairPool
    from megatron_bdpo.data.records import PreferenceRecord
    from megatron_bdpo.data.tokenization import PairTokens
    from megatron_bdpo.data.tokenized_rows import RowsBuilder
    from megatron_bdpo.training.batches import PackMaker

    builder = RowsBuilder()
    for row, chosen, rejected, margin in GROUPS:
        tokens = ([9, 8], ANSWERS[chosen], ANSWERS[rejected])
        record = PreferenceRecord("", "", "", chosen == "C", rejected == "C", margin=margin)
        builder.append(PairTokens(*(np.array(part, np.int32) for part in tokens)), row, record)
    pool, found = PairPool([stored(Path(directory) / "store", builder.finish())]), {}
    for over_pairs in (False, True):
        make = PackMaker(pool, 32, over_pairs=over_pairs)
        batch = make.mixed(np.array([1, 0, 1]), np.array([False, False, True]), 24)
        pairs = {name: getattr(batch.pairs, name).tolist() for name in ("ids", "answers", "unsafe", "margin", "weight")}
        of_groups = {"count": batch.pairs.count, "group_weight": batch.attention.group_weight.tolist()}
        found[over_pairs] = pairs | of_groups | {"tokens": batch.tokens.tolist()[0]}
        nothing = make(np.zeros(0, np.int64), 8).pairs
        assert len(nothing) == nothing.count == len(nothing.group_weight) == 0
    return found


def test_pairs_of_a_pack_of_groups(ranks, tmp_path):
    """Numbered through the pack's answers; what they count is 1 in all of a group, or each."""
    (found,) = ranks(1)(made, str(tmp_path))
    a, b, c = ANSWERS.values()
    for over_pairs, of in found.items():
        assert of["tokens"] == [9, 8, *a, *b, 9, 8, *a, *b, *c, *EMPTY, *a, *b, *[0] * 7]
        assert of["ids"] == [3, 0, 1, 2, 3]
        assert of["answers"] == [[0, 1], [2, 3], [4, 2], [4, 3], [5, 6]]
        assert of["unsafe"] == [[1, 1], [1, 1], [0, 1], [0, 1], [1, 1]] and of["margin"] == [0.5, 0, 0, 0, 0.5]
        assert of["weight"] == ([1] * 5 if over_pairs else [1, 1 / 3, 1 / 3, 1 / 3, 1])
        assert of["group_weight"] == ([1, 3, 1] if over_pairs else [1, 1, 1])
        assert of["count"] == (5 if over_pairs else 3)
