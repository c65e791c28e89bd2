"""Rows that bring their reference's log-probs train as rows that are scored, and ours are written in that form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.reference.columns import add_columns
from tests.harness.jobs import DATA, last_stage, train
from tests.parity.test_groups import rows as groups

JOB = {"max_pairs": 16, "train_iters": 2}
DPO = ["--preference-loss", "dpo"]
TP2 = ["--tensor-model-parallel-size", "2"]


def steps(outcomes):
    return [
        {name: value for name, value in step.items() if not name.startswith("throughput")}
        for step in last_stage(outcomes).steps
    ]


@pytest.fixture(scope="module")
def scored(ranks, tmp_path_factory):
    """The steps of a run that scores its reference, and its rows with the scores."""
    directory = tmp_path_factory.mktemp("columns")
    outcomes = ranks(1)(train, DPO, pair_cache_dir=str(directory / "cache"), **JOB)
    (manifest,) = (directory / "cache").glob("**/manifest.json")
    rows = directory / "rows.jsonl"
    written, left_out = add_columns(manifest.parent, rows)
    total = sum(1 for _ in (DATA / "train.jsonl").open())
    assert (written, left_out) == (16, total - 16)
    return steps(outcomes), rows, manifest.parent


def test_the_rows_are_those_that_were_scored(scored):
    _, rows, scores = scored
    written = [json.loads(line) for line in rows.open()]
    first = [json.loads(line) for line in (DATA / "train.jsonl").open()][:16]
    columns = [(row.pop("ref_chosen_logps"), row.pop("ref_rejected_logps")) for row in written]
    assert written == first and all(value < 0 for pair in columns for value in pair)
    with pytest.raises(UserError, match="is there already"):
        add_columns(scores, rows)


@pytest.mark.parametrize("layout", [[], TP2], ids=["1 rank", "TP2"])
def test_columns_train_as_scores_do(scored, ranks, tmp_path, layout):
    expected, rows, _ = scored
    data = {"pair_data": [str(rows)], "pair_cache_dir": str(tmp_path)}
    found = steps(ranks(2 if layout else 1)(train, [*DPO, *layout, "--reference", "columns"], **JOB, **data))
    assert not list(tmp_path.glob("**/manifest.json")), "nothing is scored"
    for step, expected_step in zip(found, expected, strict=True):
        assert step == pytest.approx(expected_step, rel=1e-5, abs=1e-6) if layout else step == expected_step


def test_answers_of_lists_train_as_their_scores_do(ranks, tmp_path):
    """Rows of two to five answers, all pairs; some answers are equally good."""
    job = JOB | {"max_pairs": None, "pairs_per_step": 4, "pairs_from": "all"}
    data = tmp_path / "groups.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in groups()))
    cache = tmp_path / "cache"
    expected = steps(ranks(1)(train, DPO, **job, pair_data=[str(data)], pair_cache_dir=str(cache)))
    (manifest,) = cache.glob("**/manifest.json")
    rows = tmp_path / "rows.jsonl"
    assert add_columns(manifest.parent, rows) == (len(groups()), 0)
    flags = [*DPO, "--reference", "columns"]
    found = steps(ranks(1)(train, flags, **job, pair_data=[str(rows)], pair_cache_dir=str(tmp_path / "other")))
    assert found == expected and not list((tmp_path / "other").glob("**/manifest.json"))


def test_values_that_do_not_fit_are_refused(scored, ranks, tmp_path):
    _, rows, _ = scored

    def refusal(flags: list[str], change, **job) -> str:
        changed = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        changed.write_text(
            "".join(json.dumps(change(json.loads(line), i)) + "\n" for i, line in enumerate(rows.open()))
        )
        data = {"pair_data": [str(changed)], "pair_cache_dir": str(tmp_path / "cache")}
        with pytest.raises(Exception, match=r"\w") as caught:
            ranks(1)(train, [*flags, "--reference", "columns"], **JOB | data | job)
        return str(caught.value)

    def of_other_tokens(row, i):
        return row | {"ref_chosen_logps": row["ref_chosen_logps"] - (5 if i == 3 else 0)}

    assert "step" in refusal(DPO, of_other_tokens)
    without = refusal(DPO, lambda row, i: {k: v for k, v in row.items() if i != 3 or not k.startswith("ref_")})
    assert "1 of 16 pairs bring no log-probs" in without and "line 4" in without
    cut = refusal(DPO, lambda row, i: row, max_response_length=5)
    assert "bring no log-probs" in cut
    assert "reads the unconditional log-probs too" in refusal(["--preference-loss", "bdpo"], lambda row, i: row)
    assert "reads no reference" in refusal(["--preference-loss", "simpo"], lambda row, i: row)
    assert "'ref_chosen_logps' is 3" in refusal(DPO, lambda row, i: row | {"ref_chosen_logps": 3})


def test_rows_that_have_changed_since(ranks, tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join((DATA / "train.jsonl").read_text().splitlines(keepends=True)[:16]))
    ranks(1)(train, DPO, pair_cache_dir=str(tmp_path / "cache"), **JOB | {"pair_data": [str(data)]})
    (manifest,) = (tmp_path / "cache").glob("**/manifest.json")
    data.write_text("\n" + data.read_text())
    with pytest.raises(UserError, match="has changed since its rows were scored"):
        add_columns(manifest.parent, tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def test_output(tmp_path: Path):
    with pytest.raises(UserError, match="holds no reference scores"):
        add_columns(tmp_path, tmp_path / "rows.jsonl")
