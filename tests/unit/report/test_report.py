"""``megatron-bdpo report`` on made scores and made metrics: the numbers, the files, and what is refused."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_bdpo.cli.main import main
from megatron_bdpo.data.prepare import PairDataSettings, prepare_pairs
from megatron_bdpo.data.sources import SourceSpec
from megatron_bdpo.data.tokenization import PairTokenizer
from megatron_bdpo.report.scored_pairs import comprehension_of
from megatron_bdpo.training.reference.cache import ScoreCache, open_scores

PAIRS = 200
SCORE_PICTURES = {"comprehension.png", "imbalance.png", "weights.png", "scale.png"}
CURVES = {"loss.png", "accuracy.png", "margin.png", "rewards.png", "logps.png", "grad_norm.png"}
QUALITY_PICTURES = {"length_difference.png", "quality.png"}
QUARTILE_CURVES = {"accuracies_by_imbalance.png", "margins_by_imbalance.png"}


def make_scores(directory: Path, pairs: int = PAIRS, *, unfinished: bool = False, **changed) -> Path:
    """Scores of a data file beside them; pair i is line i + 1."""
    source = directory.parent / "pairs.jsonl"
    rows = [
        {"prompt": f"prompt {i} <script>", "chosen": f"good {i} & so", "rejected": f"bad {i}"} for i in range(pairs)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    random = np.random.default_rng(5)
    tokens = random.integers(1, 60, (pairs, 2)).astype(np.int32)
    unconditional = -5.0 * tokens
    arrays = {
        "conditional": unconditional + tokens * random.normal(0.3, 0.4, (pairs, 2)),
        "unconditional": unconditional,
        "tokens": tokens,
        "source": np.zeros(pairs, np.int16),
        "row": np.arange(1, pairs + 1),
    } | changed
    cache = ScoreCache.open(directory, {"made": "up"}, {"sources": [str(source)], "model": "some/model"})
    cache.add(np.arange(pairs), arrays, pairs)
    if not unfinished:
        cache.finish(pairs, {"conditional": pairs, "unconditional": pairs}, {})
    return directory


def make_run(directory: Path, steps: int = 90, record: dict | None = None) -> Path:
    directory.mkdir(parents=True)
    names = ["loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen"]
    names += ["logps/rejected", "grad_norm"]
    names += [f"rewards/{name}/imbalance_q{q}" for name in ("accuracies", "margins") for q in (1, 2, 3, 4)]
    lines = []
    for step in range(1, steps + 1):
        values = {name: math.exp(-step / 40) * (1 + place) for place, name in enumerate(names)}
        if step == 7:
            values |= {"grad_norm": None}
            del values["rewards/margins/imbalance_q2"]  # no pair of it in this step
        lines.append({"kind": "step", "iteration": step, **values})
        if step % 30 == 0:
            lines.append({"kind": "evaluation", "iteration": step, **dict.fromkeys(names[:7], 0.5)})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if record is not None:
        (directory / "run.json").write_text(json.dumps(record))
    return directory


@pytest.fixture
def scores(tmp_path):
    return make_scores(tmp_path / "scores")


def report(capsys, *arguments) -> str:
    """What a report prints."""
    assert main(["report", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refusal(capsys, *arguments) -> str:
    """The line that says why there is none, and the one that says what to do."""
    assert main(["report", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.splitlines()[1].startswith("advice: ") and said.count("\n") == 2
    return said


# Scores


def test_numbers(scores, capsys):
    """Of the most imbalanced pair, and of all, by the formulas written down here."""
    output = report(capsys, scores, "--text-only", "--pairs", 3, "--bdpo-temperature", 0.5)
    from safetensors.numpy import load_file

    values = load_file(scores / "part-00000.safetensors")
    i_w, i_l = ((values["conditional"] - values["unconditional"]) / values["tokens"]).T
    worst = int(np.argmax(np.abs(i_w - i_l)))
    expected_weight = 2 / (1 + math.exp((i_w[worst] - i_l[worst]) / 0.5))
    expected_scale = math.sqrt(2) / math.hypot(expected_weight, 2 - expected_weight)
    expected = [worst, *(f"{x:+.3f}" for x in (i_w[worst], i_l[worst], i_w[worst] - i_l[worst]))]
    expected += [f"{expected_weight:.3f}", f"{expected_scale:.3f}"]
    line = output.split("the 3 most imbalanced pairs\n")[1].splitlines()[1]
    assert line.split()[:6] == [str(cell) for cell in expected]
    assert line.endswith(f"pairs.jsonl, line {worst + 1}")
    assert re.search(rf"^I_w +{i_w.mean():.3f} +{i_w.std():.3f} ", output, re.M)
    assert max(map(len, output.splitlines())) <= 80


@pytest.mark.parametrize("count", [0, 1, 4, 7, 60, 99])
def test_the_most_imbalanced_pairs_of_many_equal_ones(tmp_path, count):
    """In the order of a stable sort of all of them."""
    imbalance = np.random.default_rng(count).integers(-3, 4, 60)
    tokens = np.ones((60, 2), np.int32)
    conditional = np.stack([imbalance, np.zeros(60)], axis=1).astype(float)
    scores = make_scores(
        tmp_path / "scores", 60, conditional=conditional, unconditional=np.zeros((60, 2)), tokens=tokens
    )
    pairs = comprehension_of(open_scores(scores), 1.0, per_token=True, where="")
    expected = sorted(range(60), key=lambda pair: -abs(imbalance[pair]))[:count]
    assert pairs.largest(count).tolist() == expected


def test_page_and_pictures(scores, tmp_path, capsys):
    report(capsys, scores, "--output", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", *SCORE_PICTURES}
    html = (tmp_path / "out" / "report.html").read_text()
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    files = [path.read_bytes() for path in (tmp_path / "out").glob("*.png")]
    assert sorted(embedded) == sorted(files)
    assert all(data.startswith(b"\x89PNG") for data in files)


def test_page_needs_nothing_else(scores, tmp_path, capsys):
    """No address, no script, no style or picture from elsewhere."""
    make_run(tmp_path / "run", record={"loss": "bdpo", "reference_scores": {"train": str(scores)}})
    report(capsys, tmp_path / "run", "--show-text")
    html = (tmp_path / "run" / "report" / "report.html").read_text()
    markup = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "data:", html)
    links = {value for _, value in re.findall(r'(src|href)="([^"]*)"', markup)}
    assert {value for value in links if value[0] != "#"} == {"data:"}
    assert {f"#{name}" for name in re.findall(r'<section id="([^"]*)"', markup)} == links - {"data:"}
    for forbidden in ("http:", "https:", "//", "<script", "<link", "@import", "url("):
        assert forbidden not in markup.replace(str(tmp_path), ""), forbidden


def test_texts_are_shown_only_on_request(scores, tmp_path, capsys):
    quiet = report(capsys, scores, "--output", tmp_path / "quiet", "--pairs", 5)
    loud = report(capsys, scores, "--output", tmp_path / "loud", "--pairs", 5, "--show-text")
    pages = [(tmp_path / name / "report.html").read_text() for name in ("quiet", "loud")]
    assert "good" not in quiet and "good" not in pages[0]
    (worst,) = re.findall(r"pairs\.jsonl, line (\d+)", loud)[:1]
    assert f"good {int(worst) - 1} &" in loud
    assert f"<pre>prompt {int(worst) - 1} &lt;script&gt;</pre>" in pages[1]


def test_pairs_that_are_not_scored_are_left_out(tmp_path, capsys):
    conditional = np.full((PAIRS, 2), -3.0)
    conditional[10:] = np.nan
    conditional[3, 1] = np.nan
    scores = make_scores(tmp_path / "scores", conditional=conditional, unfinished=True)
    output = report(capsys, scores, "--text-only")
    assert f"comprehension of 9 of {PAIRS} pairs" in output


@pytest.mark.parametrize("pairs", [1, 2])
def test_few_pairs_and_equal_values(tmp_path, capsys, pairs):
    report(capsys, make_scores(tmp_path / "scores", pairs))
    same = {"conditional": np.full((pairs, 2), -1.0), "unconditional": np.full((pairs, 2), -1.0)}
    output = report(capsys, make_scores(tmp_path / "same", pairs, **same), "--bdpo-temperature", "inf")
    assert "tau inf" in output


def test_automatic_temperature(scores, capsys):
    """Nine of ten pairs within 3 : 1."""
    from safetensors.numpy import load_file

    values = load_file(scores / "part-00000.safetensors")
    imbalance = np.abs(np.diff((values["conditional"] - values["unconditional"]) / values["tokens"]))
    expected = f"{np.quantile(imbalance, 0.9) / math.log(3):.4g}"
    output = report(capsys, scores, "--text-only", "--bdpo-temperature", "auto")
    assert f"temperature auto: would be {expected}" in output
    assert f"weights and scale at tau {expected}" in output


def test_sum_instead_of_per_token(scores, capsys):
    output = report(capsys, scores, "--text-only", "--bdpo-comprehension", "sum")
    assert "200 of 200 pairs, nats;" in output


def test_reader_that_leaves_early(scores, tmp_path):
    """`megatron-bdpo report DIR | head -1`: no traceback, and the files are there."""
    words = [sys.executable, "-m", "megatron_bdpo.cli.main", "report", str(scores), "--output", str(tmp_path / "out")]
    command = f"{shlex.join(words)} | head -1"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert ended.stdout == f"Reference scores {scores}\n" and not ended.stderr
    assert (tmp_path / "out" / "report.html").exists()


# Runs


def test_run_without_scores(tmp_path, capsys):
    output = report(capsys, make_run(tmp_path / "run"), "--output", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == CURVES | QUARTILE_CURVES
    assert "training, steps 1 to 90" in output and "held out, steps 30 to 90" in output
    assert re.search(r"loss +0\.9753  █.*▁ +0\.1054\n", output)
    assert max(len(line) for line in output.splitlines() if str(tmp_path) not in line) <= 80


def test_run_takes_temperature_and_scores_from_its_record(scores, tmp_path, capsys):
    record = {
        "loss": "bdpo",
        "loss_options": {"beta": 0.1, "bdpo_temperature": 0.25, "bdpo_comprehension": "sum"},
        "reference_scores": {"train": str(scores)},
    }
    run = make_run(tmp_path / "run", record=record)
    output = report(capsys, run)
    assert "pairs, nats; weights and scale at tau 0.25" in output
    assert "loss: bdpo, beta 0.1" in output
    assert {path.name for path in (run / "report").glob("*.png")} == CURVES | QUARTILE_CURVES | SCORE_PICTURES
    other = make_scores(tmp_path / "other", 20)
    output = report(capsys, run, "--scores", other, "--bdpo-temperature", 2, "--bdpo-comprehension", "per-token")
    assert "20 of 20 pairs, nats per token; weights and scale at tau 2" in output


def test_run_whose_loss_reads_no_comprehension(tmp_path, capsys):
    """Its scores are of answers after their prompts alone. A report on other scores is one that is asked for."""
    scores = make_scores(tmp_path / "scores", unconditional=np.full((PAIRS, 2), np.nan))
    run = make_run(tmp_path / "run", record={"loss": "dpo", "reference_scores": {"train": str(scores)}})
    output = report(capsys, run, "--text-only")
    assert "training, steps 1 to 90" in output and "omprehension" not in output
    assert "no pair has both" in refusal(capsys, run, "--scores", scores)


@pytest.mark.parametrize("steps", [1, 2])
def test_run_that_has_just_begun(tmp_path, capsys, steps):
    report(capsys, make_run(tmp_path / "run", steps))


def test_run_whose_infinite_temperature_is_a_word(scores, tmp_path, capsys):
    record = {"loss_options": {"bdpo_temperature": "inf"}, "reference_scores": {"train": str(scores)}}
    assert "at tau inf" in report(capsys, make_run(tmp_path / "run", record=record), "--text-only")


@pytest.fixture
def stores(tmp_path, megatron_tokenizer) -> dict[str, str]:
    """Two token stores: of the pairs trained on one is a copy, the held-out pair is one of them."""
    rows = [{"prompt": "1 2", "chosen": " 3 4", "rejected": " 5"}, {"prompt": "6", "chosen": " 7", "rejected": " 8 9"}]
    directories = {}
    for use, of_use in (("train", [*rows, rows[0]]), ("heldout", rows[:1])):
        (tmp_path / f"{use}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_use))
        settings = PairDataSettings((SourceSpec(str(tmp_path / f"{use}.jsonl")),), tmp_path / "cache")
        tokenizer = PairTokenizer(megatron_tokenizer("NullTokenizer", vocab_size=100))
        directories[use] = str(prepare_pairs(settings, tokenizer).directory)
    return directories


def test_run_whose_pairs_are_still_there(stores, tmp_path, capsys):
    record = {"reference_scores": {}, "pair_stores": stores}
    run = make_run(tmp_path / "run", record=record)
    output = report(capsys, run)
    assert re.search(r"copies of an earlier pair +1 +3 +33\.33%\n", output)
    assert re.search(r"held-out pairs that are trained on +1 +1 +100\.00%\n", output)
    assert "a rule that knows only lengths: is right in 66.7%" in output
    assert {path.name for path in (run / "report").glob("*.png")} == CURVES | QUARTILE_CURVES | QUALITY_PICTURES
    html = (run / "report" / "report.html").read_text()
    assert f"<td>{tmp_path / 'train.jsonl'}, line 3; see {tmp_path / 'train.jsonl'}, line 1</td>" in html
    assert "quality of" not in report(capsys, run, "--no-quality", "--text-only")


def test_run_of_labelled_answers(tmp_path, megatron_tokenizer, capsys):
    """No pair is compared, so there is no picture of differences of length; all else is told of answers."""
    rows = [{"prompt": "1 2", "completion": " 3 4", "label": label} for label in (True, True, False)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = PairDataSettings((SourceSpec(str(tmp_path / "train.jsonl")),), tmp_path / "cache")
    tokenizer = PairTokenizer(megatron_tokenizer("NullTokenizer", vocab_size=100))
    stores = {"train": str(prepare_pairs(settings, tokenizer).directory)}
    run = make_run(tmp_path / "run", record={"reference_scores": {}, "pair_stores": stores})
    output = report(capsys, run)
    assert "quality of 3 labelled answers" in output and "2 desirable (66.7%), 1 undesirable" in output
    assert re.search(r"answers labelled both ways +3 +3 +100\.00%\n", output)
    pictures = {path.name for path in (run / "report").glob("*.png")}
    assert pictures == CURVES | QUARTILE_CURVES | {"quality.png"}
    assert "Quality of the labelled answers" in (run / "report" / "report.html").read_text()


def test_run_whose_pairs_are_gone(stores, tmp_path, capsys):
    record = {"reference_scores": {}, "pair_stores": {**stores, "train": str(tmp_path / "gone")}}
    output = report(capsys, make_run(tmp_path / "run", record=record), "--text-only")
    assert f"quality of the pairs: not known. {tmp_path / 'gone'} is no pair store" in output
    assert "copies of" not in output


# Refusals


def test_directories_that_are_neither(scores, tmp_path, capsys):
    assert "there is no such directory" in refusal(capsys, tmp_path / "nowhere")
    said = refusal(capsys, tmp_path)
    assert f"{tmp_path} is neither" in said and f"These can be reported on: {scores}." in said
    make_run(tmp_path / "run", steps=0)
    assert "metrics.jsonl holds no record yet" in refusal(capsys, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("no json\n")
    assert "metrics.jsonl, line 1 is no record" in refusal(capsys, tmp_path / "run")


def test_damaged_scores(scores, capsys):
    (scores / "part-00000.safetensors").write_bytes(b"x")
    assert "part-00000.safetensors is damaged" in refusal(capsys, scores)


def test_scores_without_comprehension(tmp_path, capsys):
    scores = make_scores(tmp_path / "scores", unconditional=np.full((PAIRS, 2), np.nan))
    assert "no pair has both" in refusal(capsys, scores)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "warm"])
def test_wrong_temperature(scores, capsys, value):
    assert f"--bdpo-temperature must be a number above 0 (inf is allowed) or auto, got '{value}'" in refusal(
        capsys, scores, f"--bdpo-temperature={value}"
    )


def test_other_wrong_flags(scores, tmp_path, capsys):
    assert "--pairs" in refusal(capsys, scores, "--pairs=-1")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(capsys, scores, "--output", tmp_path / "file" / "x")
    (tmp_path / "pairs.jsonl").unlink()
    assert "pairs.jsonl" in refusal(capsys, scores, "--show-text")


def test_without_matplotlib(scores, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'megatron_bdpo[report]'" in refusal(capsys, scores)
    assert "most imbalanced" in report(capsys, scores, "--text-only")


def test_answers_side_by_side(tmp_path, capsys):
    """The first evaluation's beside the last one's, the texts escaped; all of them in the page."""
    run = make_run(tmp_path / "run", steps=60)
    rows = [
        {"step": step, "prompt": f"Q{number} <b>", "answer": f"after {step}: {number}", "finished": step > 0}
        for step in (0, 30, 60)
        for number in range(9)
    ]
    (run / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = report(capsys, run)
    assert "answers to the first 6 of 9 prompts after step 0, and after step 60" in said
    assert "step 0: after 0: 5 …" in said and "step 60: after 60: 5\n" in said and "after 60: 6" not in said
    html = (run / "report" / "report.html").read_text()
    (last,) = re.findall(r'<p>Q8 &lt;b&gt;</p><div class="answers">(.*?)</div></div>', html, re.S)
    assert re.findall(r"<b>(.*?)</b><pre>(.*?)</pre>", last) == [("step 0", "after 0: 8 …"), ("step 60", "after 60: 8")]
    assert "<summary>1 more</summary>" in html and "after 30" not in html


def test_damaged_answers(tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=3)
    (run / "generations.jsonl").write_text('{"prompt": "no step"}\n')
    assert "generations.jsonl, line 1 is no record of a run's generations" in refusal(capsys, run)
    (run / "generations.jsonl").write_text("")
    assert "answers to" not in report(capsys, run, "--text-only")
