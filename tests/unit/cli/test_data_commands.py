"""The sub-commands that look at data, as a user types them; and what a training run says of its data."""

from __future__ import annotations

import contextlib
import io
import json

import pytest

from megatron_bdpo.cli.main import main
from tests.harness.jobs import DATA
from tests.harness.program import ROOT, TINY, TOKENIZER, run

BAD = '{"prompt": "a", "chosen": "b", "rejected": "b"}\nnothing\n{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


def test_check(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text(BAD)
    assert main(["data", "check", str(path)]) == 2
    output = capsys.readouterr()
    assert f"{path}, line 1: identical responses" in output.out and f"{path}, line 2: bad JSON" in output.out
    assert "pairs: 1 kept of 3 rows (2 dropped, 66.67%)" in output.out
    assert "error: 33.3% of the rows are malformed; --max-malformed-share allows 0.0%." in output.err
    allowed = ["--max-malformed-share", "0.5", "--max-dropped-share", "0.7"]
    assert main(["data", "check", str(path), "--json", *allowed]) == 0
    assert json.loads(capsys.readouterr().out)["problems"][1]["rows"] == [2]


def test_check_tells_of_copies_and_contradictions(tmp_path, capsys):
    rows = [("a", "b", "c"), ("a", "c", "b"), ("a", "b", "c"), ("d", "b", "c")]
    text = "".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row, strict=True))) + "\n" for row in rows)
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    assert main(["data", "check", str(path)]) == 0
    output = capsys.readouterr().out
    assert f"1 copies of an earlier pair ({path}, line 3; see {path}, line 1)" in output
    assert f"2 with the answers of an earlier pair exchanged: they contradict each other ({path}, line 2; see" in output
    assert main(["data", "check", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["repeats"]["exchanged"]["count"] == 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_another_encoding_is_named(tmp_path, capsys, encoding):
    """With a mark at the beginning or without."""
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(BAD.encode(encoding))
    assert main(["data", "check", str(path)]) == 2
    cause, advice = capsys.readouterr().err.splitlines()
    assert encoding[:6].upper() in cause and "rows are text in UTF-8" in cause
    assert f"`iconv -f {encoding[:6].upper()} -t UTF-8 pairs.jsonl > utf8.jsonl`" in advice


def test_a_path_that_is_nearly_right(tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text(BAD)
    assert main(["data", "check", str(tmp_path / "piars.jsonl")]) == 2
    assert f"advice: Did you mean {tmp_path / 'pairs.jsonl'}?" in capsys.readouterr().err


def test_show(ranks):
    """Every token is there, between bars; what the answers end with, too."""
    ((code, output, errors),) = ranks(1)(run, "data", "show", str(DATA / "train.jsonl"), "--row", "3", *TOKENIZER)
    assert code == 0, errors
    lines = output.splitlines()
    assert lines[:2] == [f"{DATA / 'train.jsonl'}, line 3: trl", "prompt: 42 tokens"]
    assert lines[2].startswith("    <s>|User|:| I| am| not| sure|")
    rejected = lines.index("rejected: 24 tokens, 24 of them scored")
    assert "".join(line[4:] for line in lines[rejected + 1 : rejected + 3]).count("|") == 23
    assert lines[rejected + 2].endswith("|</s>")
    assert lines[-3:] == ["unconditional prompt (B-DPO): 1 token", "    <s>", "positions in a pack: 155"]


def test_show_of_a_chat(ranks, qwen_like, tmp_path):
    """Of an answer of several turns, what is scored is told apart; a limit cuts what is shown."""
    turns = [("assistant", "Yes"), ("user", "Please"), ("assistant", "Paris")]
    answer = [{"role": role, "content": text} for role, text in turns]
    prompt = [{"role": "user", "content": "<|im_start|> is it?"}]
    row = {"prompt": prompt, "chosen": answer, "rejected": [{"role": "assistant", "content": "No"}]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(qwen_like)]
    ((code, output, errors),) = ranks(1)(run, "data", "show", str(tmp_path / "pairs.jsonl"), "--row", "1", *flags)
    assert code == 0, errors
    assert "control tokens in texts, taken as such: <|im_start|>" in output
    assert "  context, not scored:" in output and "  scored:" in output
    assert "    <|im_start|>|" in output


def test_show_of_several_answers(ranks, tmp_path):
    """Pairs that are not used are told among the others; a pack holds the group's prompt and answers once."""
    row = {"prompt": "1", "responses": [" 2", " 3 3", " 2", " 4"], "scores": [4, 3, 2, 2]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"responses": [" 2"] * 4}) + "\n")
    command = ["data", "show", str(tmp_path / "rows.jsonl"), "--pairs-from", "all", *TOKENIZER]
    ((code, output, errors),) = ranks(1)(run, *command, "--row", "1")
    assert code == 0, errors
    lines = output.splitlines()
    assert [line for line in lines if line.startswith("pair ")] == [f"pair {place} of 6" for place in range(1, 7)]
    assert sum(line.startswith("not used: ") for line in lines) == 2, "equal texts, and equal scores"
    texts = [line.strip() for line in lines if line.startswith("    ")]
    assert len(texts) == len(set(texts)) == 1 + 3 + 1, "prompt, answers and the unconditional prompt stand once"
    assert "as in pair 1" in next(line for line in lines[lines.index("pair 3 of 6") :] if line.startswith("prompt: "))
    (found,) = (line for line in lines if line.startswith("positions"))
    assert found.startswith("positions in a pack of a group of 4 pairs, 3 answers: ")
    ((code, output, errors),) = ranks(1)(run, *command, "--row", "2")
    assert code == 2 and "line 2 gives no pair: " in errors, "although there are six"


def test_check_of_mixed_forms(tmp_path, capsys):
    chat = '{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}\n'
    (tmp_path / "pairs.jsonl").write_text(BAD.splitlines()[2] + "\n" + chat)
    assert main(["data", "check", str(tmp_path / "pairs.jsonl")]) == 2
    assert "line 2 holds chat messages" in capsys.readouterr().err


FORMATS = ROOT / "tests" / "unit" / "data" / "formats"


def test_check_of_a_format(tmp_path, capsys):
    alpaca = str(FORMATS / "alpaca.jsonl")
    assert main(["data", "check", alpaca]) == 0
    output = capsys.readouterr().out
    assert f"read as alpaca, the format of {alpaca}, line 1;" in output and "pairs: 2 kept of 2 rows" in output
    assert main(["data", "check", alpaca, "--pair-format", "sharegpt"]) == 2
    assert "line 1: missing column: column 'conversations' is missing;" in capsys.readouterr().out
    assert main(["data", "check", alpaca, "--pair-format", "orca", "--pair-columns", "question=instruction"]) == 0
    assert "pairs: 2 kept of 2 rows" in capsys.readouterr().out
    nectar = str(FORMATS / "nectar.jsonl")
    for way, expected in (("best-worst", 2), ("all", 4), ("adjacent", 3)):
        assert main(["data", "check", nectar, "--pairs-from", way, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["pairs_kept"] == [expected]


def test_columns_of_other_names_give_the_same_tokens(ranks, tmp_path):
    from megatron_bdpo.data.store import PairStore

    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text().splitlines()[:12]]
    theirs = {"prompt": "question", "chosen": "answer_a", "rejected": "answer_b"}
    renamed = [{theirs.get(name, name): value for name, value in row.items()} for row in rows]
    stores = []
    for name, written, more in (
        ("ours", rows, []),
        ("theirs", renamed, ["--pair-columns", ",".join(f"{ours}={other}" for ours, other in theirs.items())]),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in written))
        words = [str(path), *TOKENIZER, *more, "--pair-cache-dir", str(tmp_path / name), "--json"]
        ((code, output, errors),) = ranks(1)(run, "data", "prepare", *words)
        assert code == 0, errors
        stores.append(PairStore.open(json.loads(output)["directory"]))
    assert len(stores[0]) == len(stores[1]) == 12
    for pair in range(12):
        for expected, found in zip(*(store.pair(pair).parts for store in stores), strict=True):
            assert expected.tolist() == found.tolist()


def test_prepared_pairs_are_those_of_the_training(ranks, tmp_path):
    """The training run finds the tokens: their directory is named after everything that decides them."""
    from tests.harness.jobs import train

    words = [str(DATA / "train.jsonl"), *TOKENIZER, "--max-pairs", "48", "--pair-cache-dir", str(tmp_path)]
    ((code, output, errors),) = ranks(1)(run, "data", "prepare", *words, "--json")
    assert code == 0, errors
    (store,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert json.loads(output)["directory"] == str(store)
    ranks(1)(train, [], pair_cache_dir=str(tmp_path))
    assert {path.name for path in tmp_path.iterdir() if (path / "tokens.bin").exists()} == {store.name}


def test_stats(ranks, tmp_path):
    from megatron_bdpo.data.store import PairStore

    words = [str(DATA / "train.jsonl"), *TOKENIZER, "--pair-cache-dir", str(tmp_path)]
    ((code, output, errors),) = ranks(1)(run, "data", "stats", *words, "--json")
    assert code == 0, errors
    found = json.loads(output)["statistics"]
    (directory,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    lengths = PairStore.open(directory).lengths
    assert found["pairs"] == len(lengths)
    assert found["mean_positions"] == pytest.approx(lengths.sum(1).mean())
    assert found["positions"]["100"] == lengths.sum(1).max()
    assert found["too_long"]["512"] == (lengths.sum(1) > 512).sum()
    assert found["chosen_longer"] == pytest.approx((lengths[:, 1] > lengths[:, 2]).mean())
    ((code, output, errors),) = ranks(1)(run, "data", "stats", *words)
    assert code == 0 and "pairs that do not fit a pack\n  --seq-length" in output
    assert "copies of an earlier pair" in output and "held-out" not in output


def test_check_of_groups(tmp_path, capsys):
    """Pairs of a row are told from rows; two of three answers that begin alike are a group of their own."""
    prompt = [{"role": "user", "content": "a"}]
    said = [{"role": "assistant", "content": "yes?"}, {"role": "user", "content": "go on"}]
    alike = [[*said, {"role": "assistant", "content": text}] for text in "ab"]
    path = tmp_path / "rows.jsonl"
    for answers, groups in ((["b", "c", "d"], 1), ([*alike, "c"], 2)):
        path.write_text(json.dumps({"prompt": prompt, "responses": answers, "scores": [1, 2, 3]}))
        assert main(["data", "check", str(path), "--pairs-from", "all"]) == 0
        assert f"pairs: 3 in {groups} groups kept of 3 pairs" in capsys.readouterr().out


def test_stats_of_groups(ranks, tmp_path):
    """Positions are what packs hold: a prompt and its answers once, not pair by pair."""
    rows = [{"prompt": "a", "responses": [" b", " c c", " d d d"], "scores": [1, 2, 3]}, {"prompt": "e"}]
    rows[1] |= {"responses": [" b", " c"], "scores": [2, 1]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(tmp_path / "rows.jsonl"), "--pairs-from", "all", *TOKENIZER, "--pair-cache-dir", str(tmp_path / "c")]
    ((code, output, errors),) = ranks(1)(run, "data", "stats", *words, "--json")
    assert code == 0, errors
    told = json.loads(output)
    found, tokens = told["statistics"], told["report"]["tokens"]
    assert (found["pairs"], found["groups"], found["answers"], told["report"]["groups"]) == (4, 2, 5, 2)
    in_pairs = sum(tokens[part]["mean"] for part in ("prompt", "chosen", "rejected")) * 4
    assert 2 * found["mean_positions"] < in_pairs and sum(found["too_long"].values()) == 0
    ((code, output, errors),) = ranks(1)(run, "data", "stats", *words)
    assert code == 0 and "pairs: 4 in 2 groups kept of 4 pairs" in output and "groups that do not fit a pack" in output
    assert "2, of 5 answers in 4 pairs" in output and "positions of a group" in output


def test_stats_of_held_out_pairs(ranks, tmp_path):
    """Twenty of the pairs that are trained on, and some that are not."""
    rows = (DATA / "train.jsonl").read_text().splitlines()[:20] + (DATA / "heldout.jsonl").read_text().splitlines()
    (tmp_path / "heldout.jsonl").write_text("".join(f"{row}\n" for row in rows))
    words = [str(DATA / "train.jsonl"), *TOKENIZER, "--pair-cache-dir", str(tmp_path / "cache")]
    words += ["--eval-pair-data", str(tmp_path / "heldout.jsonl")]
    ((code, output, errors),) = ranks(1)(run, "data", "stats", *words, "--json")
    assert code == 0, errors
    quality = json.loads(output)["quality"]
    assert (quality["leaked_pairs"]["count"], quality["leaked_pairs"]["of"]) == (20, len(rows))
    assert quality["leaked_pairs"]["example"].startswith(f"{tmp_path / 'heldout.jsonl'}, line 1; see ")


def test_a_training_tells_of_leaks(ranks, tmp_path):
    """One line that names the first of them; nothing of pairs that are not trained on."""
    rows = (DATA / "train.jsonl").read_text().splitlines()[:3] + (DATA / "heldout.jsonl").read_text().splitlines()[:5]
    (tmp_path / "heldout.jsonl").write_text("".join(f"{row}\n" for row in rows))
    for held_out, expected in ((tmp_path / "heldout.jsonl", 1), (DATA / "heldout.jsonl", 0)):
        (said,) = ranks(1)(opened, str(held_out), str(tmp_path / "cache"))
        assert said.count("WARNING: the prompts of 3 of 8 held-out pairs are trained on (") == expected
        assert said.count("WARNING: the prompts of") == expected


def opened(held_out: str, cache: str) -> str:
    """What is said while a training's stores are opened."""
    from megatron_bdpo.training.distributed import process_groups
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.token_stores import open_stores

    flags = [*TINY, "--pair-data", str(DATA / "train.jsonl"), *TOKENIZER, "--eval-pair-data", held_out]
    arguments = Arguments.parse([*flags, "--pair-cache-dir", cache])
    output = io.StringIO()
    with process_groups(arguments.settings.process), contextlib.redirect_stdout(output):
        open_stores(arguments)
    return output.getvalue()
