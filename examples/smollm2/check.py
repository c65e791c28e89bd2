"""The numbers of a finished story, made again by transformers alone: nothing of megatron_bdpo is imported here.

    python examples/smollm2/check.py                       # what `make smollm2` has left in runs/smollm2

Read are the run's own files: the pairs, run.json (loss and temperature), metrics.jsonl, generations.jsonl, the base
model and the exported one. Computed are, pair by pair, in a plain forward pass without packing, the log-probs of the
answers, comprehension, weights and scale, the B-DPO (or DPO) loss, accuracy, margin and rewards of the last evaluation;
and the answers, by `generate`. A figure has to agree to five digits, and the answers word for word.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
EMPTY = [{"role": "user", "content": ""}]
ANSWERS = ("chosen", "rejected")
#: Five digits, or as much beside values near zero: a mean of log-probs of hundreds of nats is rounded in fp32.
RELATIVE, ABSOLUTE = 1e-5, 1e-5


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def render(tokenizer: Any, messages: list[dict[str, str]], *, opened: bool) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def log_prob(model: Any, prompt: list[int], response: list[int]) -> float:
    """log pi(response | prompt), summed in fp64."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return float(logits.double().log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)].sum())


def log_probs(policy: Any, reference: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Of every pair and answer: [pairs, 2], chosen and rejected."""
    found: dict[str, list[list[float]]] = {name: [] for name in ("policy", "reference", "unconditional", "tokens")}
    empty = render(tokenizer, EMPTY, opened=True)
    for row in rows:
        prompt = render(tokenizer, row["prompt"], opened=True)
        whole = [render(tokenizer, row["prompt"] + row[name], opened=False) for name in ANSWERS]
        responses = [ids[len(prompt) :] for ids in whole]
        found["policy"].append([log_prob(policy, prompt, response) for response in responses])
        found["reference"].append([log_prob(reference, prompt, response) for response in responses])
        found["unconditional"].append([log_prob(reference, empty, response) for response in responses])
        found["tokens"].append([len(response) for response in responses])
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


def expected_metrics(of: dict[str, Tensor], loss: str, options: dict[str, Any]) -> dict[str, float]:
    """What an evaluation should have reported."""
    beta = options["beta"]
    rewards = pushed = beta * (of["policy"] - of["reference"])
    metrics = {f"logps/{name}": of["policy"][:, index].mean() for index, name in enumerate(ANSWERS)}
    if loss == "bdpo":
        information = (of["reference"] - of["unconditional"]) / of["tokens"]
        weights = 2 * torch.softmax(-information / float(options["bdpo_temperature"]), dim=1)
        scale = 2**0.5 / weights.norm(dim=1)
        metrics |= {f"comprehension/{name}": information[:, index].mean() for index, name in enumerate(ANSWERS)}
        metrics |= {"comprehension/imbalance": (information[:, 0] - information[:, 1]).abs().mean()}
        metrics |= {f"weights/{name}": weights[:, index].mean() for index, name in enumerate(ANSWERS)}
        pushed = scale[:, None] * weights * rewards
        metrics["scale"] = scale.mean()
    margins = rewards[:, 0] - rewards[:, 1]
    metrics |= {f"rewards/{name}": rewards[:, index].mean() for index, name in enumerate(ANSWERS)}
    metrics |= {"rewards/margins": margins.mean(), "rewards/accuracies": (margins > 0).double().mean()}
    metrics["loss"] = -logsigmoid(pushed[:, 0] - pushed[:, 1]).mean()
    return {name: float(value) for name, value in metrics.items()}


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: list[dict[str, str]], tokens: int) -> str:
    ids = torch.tensor([render(tokenizer, prompt, opened=True)])
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(ids))
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("runs/smollm2"), help="(runs/smollm2)")
    parser.add_argument("--base", type=Path, default=HERE.parents[1] / "runs" / "smollm2" / "model", help="before")
    parser.add_argument("--heldout", type=Path, default=HERE / "pairs" / "heldout.jsonl")
    parser.add_argument("--answers", type=int, default=8, help="how many prompts are answered again (8)")
    options = parser.parse_args()
    run, aligned = options.output / "run", options.output / "aligned"
    for needed in (run / "run.json", run / "generations.jsonl", aligned / "config.json", options.base / "config.json"):
        if not needed.is_file():
            parser.error(
                f"{needed} is not there. Run make smollm2 first, or name its --output, and the --base it used."
            )
    record = json.loads((run / "run.json").read_text("utf-8"))
    reported = [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "evaluation"][-1]
    tokenizer = AutoTokenizer.from_pretrained(aligned)
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (aligned, options.base)
    )
    of = log_probs(policy, reference, tokenizer, read_lines(options.heldout))
    wrong = 0
    for name, value in expected_metrics(of, record["loss"], record["loss_options"]).items():
        if name not in reported:
            continue
        differs = abs(value - reported[name]) > max(ABSOLUTE, RELATIVE * abs(value))
        wrong += differs
        mark = "DIFFERS" if differs else ""
        print(f"{name:<26} reported {reported[name]:>14.7f}   transformers {value:>14.7f}   {mark}")
    last = [row for row in read_lines(run / "generations.jsonl") if row["step"] == reported["iteration"]]
    for row in last[: options.answers]:
        expected = answer(policy, tokenizer, row["prompt"], row["tokens"])
        wrong += expected != row["answer"]
        if expected != row["answer"]:
            print(f"answers DIFFER: {row['answer']!r}\n   transformers: {expected!r}")
    print(f"{len(last[: options.answers])} answers made again by generate")
    print("all agree" if not wrong else f"{wrong} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
