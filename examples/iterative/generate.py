"""Answers to prompts: by transformers in this process, or by a server that speaks OpenAI's API (vLLM, SGLang, ...)."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_bdpo.errors import UserError

type Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    answers: int
    """For each prompt."""
    tokens: int
    temperature: float
    seed: int


def by_transformers(model: str, prompts: list[Prompt], sampling: Sampling) -> Iterator[list[str]]:
    """The answers of each prompt, in order. Rendered as the training run renders them: text as it is, messages by the
    model's chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(sampling.seed)
    for prompt in prompts:
        text = prompt
        if not isinstance(text, str):
            text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=isinstance(prompt, str), return_tensors="pt").input_ids
        made = policy.generate(
            ids.to(policy.device),
            do_sample=True,
            temperature=sampling.temperature,
            num_return_sequences=sampling.answers,
            max_new_tokens=sampling.tokens,
            pad_token_id=tokenizer.eos_token_id,
        )
        yield tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)


def by_server(server: str, model: str, prompts: list[Prompt], sampling: Sampling) -> Iterator[list[str]]:
    """The same of a server: messages through /chat/completions, text through /completions.

    Raises:
        UserError: it does not answer, or with an error.
    """
    settings = {
        "model": model,
        "n": sampling.answers,
        "max_tokens": sampling.tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
    }
    for prompt in prompts:
        if isinstance(prompt, str):
            choices = _asked(f"{server}/completions", settings | {"prompt": prompt})
            yield [choice["text"] for choice in choices]
        else:
            choices = _asked(f"{server}/chat/completions", settings | {"messages": prompt})
            yield [choice["message"]["content"] for choice in choices]


def _asked(address: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as reply:
            return list(json.load(reply)["choices"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{address} gave no answers: {error}. Is the server up, and is {body['model']} there?"
        ) from error


@contextlib.contextmanager
def served(command: str, server: str, model: str, minutes: float = 30) -> Iterator[None]:
    """A server of this model inside the block, started by a command with ``{model}`` in it; none for an empty command.

    Raises:
        UserError: it ends, or does not answer in time.
    """
    if not command:
        yield
        return
    process = subprocess.Popen(shlex.split(command.replace("{model}", shlex.quote(model))))
    try:
        until = time.monotonic() + 60 * minutes
        while not _answers(server):
            if process.poll() is not None or time.monotonic() > until:
                raise UserError(f"--serve: the server does not answer at {server}/models. Look at its own lines above.")
            time.sleep(1)
        yield
    finally:
        process.terminate()
        process.wait()


def _answers(server: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{server}/models", timeout=5) as reply:
        return bool(reply.status == 200)
    return False
