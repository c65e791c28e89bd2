"""The example of iterative DPO: two rounds with a tiny model; answers by transformers, and by a server."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from examples.iterative.generate import Sampling, _answers, by_server, by_transformers
from megatron_bdpo.errors import UserError
from tests.harness.program import run
from tests.harness.rendezvous import free_port

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "iterative"
FLAGS = ["--", "--seq-length", "128", "--pairs-per-step", "4", "--train-iters", "2", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def loop():
    spec = importlib.util.spec_from_file_location("iterative_loop", EXAMPLE / "loop.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["iterative_loop"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("iterative")
    script = [sys.executable, ROOT / "tests" / "first_hour" / "make_model.py", "MODEL", "pairs.jsonl"]
    subprocess.run(script, cwd=directory, check=True, capture_output=True)
    rows = (directory / "pairs.jsonl").read_text().splitlines()[:8]
    prompts = [json.dumps({"prompt": json.loads(row)["prompt"]}) for row in rows]
    (directory / "prompts.jsonl").write_text("\n".join(prompts))
    return directory


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_two_rounds(loop, made, ranks, tmp_path, capsys):
    """Each round trains on its own model's answers, and its model is the next one's start; a stop loses nothing."""
    trained: list[list[str]] = []

    def train(flags: list[str]) -> int:
        trained.append(flags)
        ((code, _, errors),) = ranks(1)(run, "train", *flags, "--pair-cache-dir", str(tmp_path / "cache"))
        assert code == 0, errors
        return code

    words = ["--model", str(made / "MODEL"), "--prompts", str(made / "prompts.jsonl"), "--output", str(tmp_path)]
    words += ["--held-out", str(made / "prompts.jsonl"), "--tokens", "12", "--answers", "3", "--cut-penalty", "0"]
    (tmp_path / "judge.py").write_text("def score(prompt, answer):\n    return len(answer)\n")
    words += ["--judge", str(tmp_path / "judge.py")]
    assert loop.main([*words, "--rounds", "1", *FLAGS], train) == 0
    assert loop.main([*words, "--rounds", "2", *FLAGS], train) == 0
    starts = [flags[flags.index("--hf-model") + 1] for flags in trained]
    assert starts == [str(made / "MODEL"), str(tmp_path / "1" / "model")], "the first round is not made again"
    models = [made / "MODEL", tmp_path / "1" / "model", tmp_path / "2" / "model"]
    assert len({(model / "model.safetensors").read_bytes() for model in models}) == 3
    for number in ("1", "2"):
        answers = lines(tmp_path / number / "answers.jsonl")
        assert len(answers) == 8 and all(len(row["responses"]) == 3 for row in answers)
    assert lines(tmp_path / "1" / "answers.jsonl") != lines(tmp_path / "2" / "answers.jsonl")
    held_out = lines(tmp_path / "2" / "held_out.jsonl")
    expected = sum(len(text) for row in held_out for text in row["responses"]) / 24
    assert f"held out, round 2: mean score {expected:.3f} +- " in capsys.readouterr().out


def test_answers_of_a_batch_are_those_of_its_prompts_alone(made, tmp_path):
    """Text and messages, of different lengths, in one batch: padding is seen by none. At no temperature to speak of."""
    model = shutil.copytree(made / "MODEL", tmp_path / "MODEL")
    prompts = [json.loads(line)["prompt"] for line in (made / "prompts.jsonl").read_text().splitlines()][:2]
    prompts.append([{"role": "user", "content": "a much longer question, of a few more words than the others have?"}])
    sampling = Sampling(answers=2, tokens=12, temperature=1e-4)
    with pytest.raises(UserError, match="has no chat template"):
        by_transformers(str(model), sampling)(prompts, 1)
    (model / "chat_template.jinja").write_text("{% for message in messages %}[{{ message.content }}]{% endfor %}")
    generate = by_transformers(str(model), sampling)
    for prompt, (answer, again) in zip(prompts, generate(prompts, 1), strict=True):
        assert [[answer, again]] == generate([prompt], 2)
        assert answer == again and answer.text


def test_text_is_answered_as_training_reads_it(made):
    """Behind the start token, which this tokenizer does not put there by itself."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = json.loads((made / "prompts.jsonl").read_text().splitlines()[0])["prompt"]
    model, tokenizer = (kind.from_pretrained(made / "MODEL") for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt).input_ids]])
    assert ids[0, 1] != tokenizer.bos_token_id
    greedy = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    expected = tokenizer.decode(greedy[0, ids.shape[1] :], skip_special_tokens=True)
    ((answer,),) = by_transformers(str(made / "MODEL"), Sampling(answers=1, tokens=12, temperature=1e-4))([prompt], 1)
    assert answer.text == expected


def test_generation_goes_on_where_it_stopped(loop, made, tmp_path, monkeypatch):
    """A file with a batch and a half, its last line cut, becomes the one of an undisturbed start, byte for byte."""
    words = ["--model", str(made / "MODEL"), "--prompts", str(made / "prompts.jsonl"), "--rounds", "1"]
    words += ["--tokens", "8", "--answers", "2", "--at-once", "3", *FLAGS]
    words[-len(FLAGS) : -len(FLAGS)] = ["--output", str(tmp_path)]
    monkeypatch.setattr(loop, "trained_on", lambda row, penalty: {})
    assert loop.main(words) == 2
    path = tmp_path / "1" / "answers.jsonl"
    expected = path.read_bytes()
    path.write_bytes(b"".join(expected.splitlines(keepends=True)[:5])[:-9])
    assert loop.main(words) == 2
    assert path.read_bytes() == expected
    path.write_text(json.dumps({"prompt": "another"}) + "\n")
    with pytest.raises(UserError, match="answers other prompts"):
        loop._kept(path, ["a"])


@pytest.fixture(scope="module")
def reward_model(made) -> Path:
    """Of the model, with its tokenizer and a head that tells answers apart."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(made / "MODEL", num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(3))
    model.save_pretrained(made / "REWARD")
    AutoTokenizer.from_pretrained(made / "MODEL").save_pretrained(made / "REWARD")
    return made / "REWARD"


def reward_by_transformers(directory: Path, prompt: str, answer: str) -> float:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    text = tokenizer(prompt + answer).input_ids
    ids = torch.tensor([[tokenizer.bos_token_id, *text, tokenizer.eos_token_id]])
    with torch.no_grad():
        return float(model(ids).logits)


def test_a_reward_model_judges(loop, made, reward_model, ranks, tmp_path, capsys):
    """Its scores are transformers' own rewards of prompt and answer; the next start does not ask it again."""
    jobs: list[str] = []

    def job(command: str):
        def run_on_rank(flags: list[str]) -> int:
            jobs.append(command)
            ((code, _, errors),) = ranks(1)(run, command, *flags)
            assert code == 0, errors
            return code

        return run_on_rank

    words = ["--model", str(made / "MODEL"), "--prompts", str(made / "prompts.jsonl"), "--output", str(tmp_path)]
    words += ["--held-out", str(made / "prompts.jsonl"), "--tokens", "8", "--answers", "3", "--cut-penalty", "0"]
    words += ["--reward-model", str(reward_model), "--reward-flags", "--seq-length 128", "--rounds", "1", *FLAGS]
    assert loop.main(words, job("train"), job("score")) == 0
    assert jobs == ["score", "score", "train", "score"]
    judged = lines(tmp_path / "1" / "judged_answers.jsonl")
    assert [row | {"scores": 0} for row in judged] == [
        row | {"scores": 0} for row in lines(tmp_path / "1" / "answers.jsonl")
    ]
    texts, scores = judged[0]["responses"], judged[0]["scores"]
    expected = [reward_by_transformers(reward_model, judged[0]["prompt"], text) for text in texts]
    assert scores == pytest.approx(expected, rel=2e-5, abs=2e-5) and len(set(expected)) > 1
    trained = lines(tmp_path / "1" / "train.jsonl")
    assert (trained[0]["responses"], trained[0]["scores"]) == (texts, scores)
    told = capsys.readouterr().out
    assert loop.main(words, job("train"), job("score")) == 0 and len(jobs) == 4
    assert capsys.readouterr().out.splitlines() == told.splitlines()[-3:]


def test_answers_have_one_judge(loop, made, reward_model, server, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "judge.py").write_text("def score(prompt, answer): return 1")
    words = ["--model", "m", "--prompts", str(tmp_path / "prompts.jsonl"), "--server", server, "--rounds", "1"]
    judges = {"--judge": str(tmp_path / "judge.py"), "--reward-model": str(reward_model)}
    for number, (first, other) in enumerate(itertools.permutations(judges)):
        own = [*words, "--output", str(tmp_path / str(number))]
        loop.main([*own, first, judges[first]], train=lambda flags: 3, score=lambda flags: 3)
        assert loop.main([*own, other, judges[other]], train=lambda flags: 3, score=lambda flags: 3) == 2
        told = " ".join(capsys.readouterr().err.split())
        assert f"answers.jsonl has answers that {first} judges." in told and "name another --output" in told


def test_more_answers_are_judged_again(loop, tmp_path):
    """A file of answers that has grown since; else what is judged stays."""
    path = tmp_path / "answers.jsonl"

    def score(flags: list[str]) -> int:
        rows = [row | {"scores": [1.0]} for row in lines(path)]
        Path(flags[flags.index("--scored-rows") + 1]).write_text("".join(map(loop._line, rows)))
        return 0

    def answered(count: int) -> int:
        path.write_text("".join(map(loop._line, [{"prompt": "a", "responses": ["b"]}] * count)))
        os.utime(path, (count, count))  # seconds: long ago
        return len(model.judged(path))

    model = loop.RewardModel(tmp_path, [], score)
    assert answered(1) == 1 and answered(2) == 1
    os.utime(tmp_path / "judged_answers.jsonl", (1, 1))
    assert answered(2) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--reward-model {made}/REWARD --judge judge.py", "--judge and --reward-model are two judges"),
        ("--reward-flags --bf16", "--reward-flags are of --reward-model"),
        ("--reward-model {made}/MODEL", "MODEL holds LlamaForCausalLM. Name the directory of a reward model"),
        ("--reward-model nowhere", "nowhere holds no model"),
        ("--reward-model {made}/REWARD", "has ended with 3. Its own lines above say why"),
    ],
    ids=["two judges", "flags of none", "a policy", "nowhere", "scoring fails"],
)
def test_what_a_reward_model_may_not_be(words, expected, loop, made, reward_model, server, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}')
    given = words.format(made=made).replace("--reward-flags --bf16", "--reward-flags=--bf16").split()
    given += ["--model", "m", "--prompts", str(tmp_path / "prompts.jsonl"), "--server", server]
    assert loop.main([*given, "--output", str(tmp_path)], score=lambda flags: 3) == 2
    assert expected in " ".join(capsys.readouterr().err.split()).replace(" advice:", "")


class _Server(BaseHTTPRequestHandler):
    """Answers with what it was asked, n times; a model of a name in ``REPLIES`` as that says."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chat = self.path == "/v1/chat/completions"
        texts = [f"{asked['model']} {number}" for number in range(asked["n"])]
        choices = [{"message": {"content": text}} if chat else {"text": text} for text in texts]
        for choice in choices[2:3]:
            choice["finish_reason"] = "length"
        reply = REPLIES.get(asked["model"], lambda asked: {"choices": choices})(asked)
        body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(400 if asked["model"] == "refused" else 200)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.send_error(int(self.path.split("/")[1]))

    def log_message(self, *_: object) -> None: ...


#: Name of a model -> what is answered to a request.
REPLIES = {
    "one by one": lambda asked: {"choices": [{"text": f"{asked['n']} {asked['seed']}", "finish_reason": "length"}]},
    "two at most": lambda asked: {"choices": [{"text": str(asked["seed"] + i)} for i in range(min(2, asked["n"]))]},
    "too many": lambda asked: {"choices": [{"text": str(number)} for number in range(9)]},
    "silent": lambda asked: {"choices": [{"text": None}, {"message": {"content": None}, "text": None}]},
    "lost": lambda asked: b"no",
    "empty": lambda asked: {"choices": []},
    "null": lambda asked: {"choices": None},
    "other": lambda asked: {"choices": [{"content": "a"}]},
    "refused": lambda asked: b"it has another model",
}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("one by one", [("3 21", False), ("2 22", False), ("1 23", False)]),
        ("two at most", [("21", True), ("22", True), ("23", True)]),
        ("too many", [("0", True), ("1", True), ("2", True)]),
        ("silent", [("", True), ("", True), ("", True)]),
    ],
)
def test_a_server_is_asked_until_all_answers_are_there(server, model, expected):
    """Each request of a prompt has the seeds that follow the last one's, and no other batch has them."""
    assert by_server(server, model, Sampling(3, 8, 1.0))(["a", "b"], 7) == [expected, expected]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("lost", "gave no answers"),
        ("empty", "gave a reply of no choices"),
        ("null", "gave no answers"),
        ("other", "gave no answers: KeyError"),
        ("refused", "refused: HTTP Error 400: Bad Request. It says: 'it has another model'. Is refused there"),
    ],
)
def test_what_is_no_answer_is_refused(server, model, expected):
    with pytest.raises(UserError, match=expected):
        by_server(server, model, Sampling(3, 8, 1.0))(["a"], 7)


def test_a_server_is_up_when_it_answers_even_with_an_error(server):
    """One without a list of models, or without a cache of its own to list, is not waited for."""
    address = server.removesuffix("/v1")
    assert [code for code in (404, 500, 502, 503, 504) if _answers(f"{address}/{code}")] == [404, 500]


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_answers_of_a_server(loop, server, tmp_path):
    chat = [{"role": "user", "content": "hello"}]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": chat}) + "\n")
    (tmp_path / "judge.py").write_text("def score(prompt, answer):\n    return float(answer[-1])\n")
    words = ["--prompts", str(tmp_path / "prompts.jsonl"), "--judge", str(tmp_path / "judge.py"), "--server", server]
    words += ["--output", str(tmp_path), "--rounds", "1"]
    assert loop.main(["--model", "m", *words], lambda flags: 0) == 0
    row = {"responses": [f"m {number}" for number in range(4)], "scores": [0, 1, 2 - 1, 3]}
    assert lines(tmp_path / "1" / "train.jsonl") == [{"prompt": prompt, **row} for prompt in ("a", chat)]
    assert lines(tmp_path / "1" / "answers.jsonl")[0]["ended"] == [True, True, False, True]
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        assert loop.main(["--model", "lost", *words, "--output", str(tmp_path / "x")], lambda flags: 0) == 2
        assert loop.main(["--model", "m", *words], lambda flags: 3) == 2
        assert loop.main(["--model", "m", *words[:4], "--serve", "x"], lambda flags: 0) == 2
        assert loop.main(["--model", "m", *words[:4], "--server", "localhost:8000/v1"], lambda flags: 0) == 2
    assert "--server localhost:8000/v1 is no address" in " ".join(errors.getvalue().split())
    assert "gave no answers" in errors.getvalue() and "has ended with 3" in errors.getvalue()
    assert not (tmp_path / "x" / "1" / "answers.jsonl").read_text()


@pytest.mark.parametrize(
    ("judge", "prompt", "expected"),
    [
        ("x = 1", '"a"', "judge.py has no function score(prompt, answer). Define one."),
        ("import no_such_module", '"a"', "judge.py cannot be run: ModuleNotFoundError"),
        ("def score(prompt, answer): return 'good'", '"a"', "the score of 'm 0' is 'good'. Make it a number"),
        ("def score(prompt, answer): return float('nan')", '"a"', "the score of 'm 0' is nan. Make it a number"),
        ("def score(prompt, answer): return 1", "5", "prompt 1 is 5. Make it text, or a list of messages."),
        ("def score(prompt, answer): return 1", "[]", "prompt 1 is []. Make it text, or a list of messages."),
    ],
    ids=["no score", "cannot be run", "a word", "nan", "a number as prompt", "no messages"],
)
def test_what_a_judge_and_prompts_may_not_be(judge, prompt, expected, loop, server, tmp_path, capsys):
    (tmp_path / "judge.py").write_text(judge)
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": {prompt}}}')
    words = ["--model", "m", "--server", server, "--output", str(tmp_path / "out"), "--rounds", "1"]
    words += ["--prompts", str(tmp_path / "prompts.jsonl"), "--judge", str(tmp_path / "judge.py")]
    assert loop.main(words, lambda flags: 0) == 2
    assert expected in " ".join(capsys.readouterr().err.split()).replace(" advice:", "")
    with pytest.raises(SystemExit):
        loop.main([*words, "--answers", "1"])  # nothing to compare
    assert "--answers: 1 is less than 2" in capsys.readouterr().err


def test_a_server_is_started_for_a_model_and_ended(loop, tmp_path):
    (tmp_path / "m" / "v1").mkdir(parents=True)
    (tmp_path / "m" / "v1" / "models").touch()
    port = free_port()
    address = f"http://127.0.0.1:{port}/v1"
    command = f"{sys.executable} -m http.server {port} --bind 127.0.0.1 --directory {{model}}"
    with loop.served(command, address, str(tmp_path / "m")):
        urllib.request.urlopen(f"{address}/models").close()
        with pytest.raises(UserError, match=r"something answers at .* already"), loop.served(command, address, "m"):
            pass
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{address}/models")
    with pytest.raises(UserError, match="the server does not answer"), loop.served("false", address, "m"):
        pass


@pytest.mark.parametrize(
    ("texts", "scores", "ended", "expected"),
    [
        pytest.param(["b", "c"], [1, 1], [True, True], None, id="equal scores"),
        pytest.param(["b", " "], [1, 0], [True, True], None, id="one is empty"),
        pytest.param(["b", " ", "c"], [1, 0, 2], [True, True, True], [1, 2], id="an empty one of three"),
        pytest.param(["b", "c"], [1, 2], [True, False], None, id="the best was cut"),
        pytest.param(["b", "c"], [1, 2], [False, False], None, id="all were cut"),
        pytest.param(["b", "c"], [1, 1], [True, False], [1, 0.5], id="a cut one is worse"),
    ],
)
def test_what_is_trained_on(loop, texts, scores, ended, expected):
    """At a penalty of 0.5."""
    row = loop.trained_on({"prompt": "a", "responses": texts, "scores": scores, "ended": ended}, 0.5)
    assert (row and row["scores"]) == expected
