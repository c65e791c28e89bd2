"""Answers to prompts: by transformers in this process, or by a server that speaks OpenAI's API (vLLM, SGLang, ...)."""

from __future__ import annotations

import contextlib
import gc
import http.client
import json
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import batched
from typing import Any, NamedTuple

from megatron_bdpo.errors import UserError

type Prompt = str | list[dict[str, Any]]


class Answer(NamedTuple):
    text: str
    ended: bool
    """By the model itself; False where ``Sampling.tokens`` cut it."""


type Generate = Callable[[list[Prompt], int], list[list[Answer]]]
"""Some prompts and a seed, to the answers of each."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    answers: int
    """For each prompt."""
    tokens: int
    """Of an answer, at most."""
    temperature: float


def by_transformers(model: str, sampling: Sampling) -> Generate:
    """The prompts of a call are one batch, each rendered as the training run renders it: text as it is after the start
    token, messages by the model's chat template. A call raises UserError where there are messages and no template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
    policy.to("cuda" if torch.cuda.is_available() else "cpu")
    ends = policy.generation_config.eos_token_id
    ends = torch.tensor([tokenizer.eos_token_id] if ends is None else ends, device=policy.device)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def encode(prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            ids, start = list(tokenizer(prompt).input_ids), tokenizer.bos_token_id
            return ids if start is None or ids[:1] == [start] else [start, *ids]
        if not tokenizer.chat_template:
            raise UserError(f"{model} has no chat template, and prompts are messages. Give prompts in text.")
        rendered = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(rendered, add_special_tokens=False).input_ids)

    def decode(prompt: Prompt, before: list[int], new: list[int]) -> str:
        if not isinstance(prompt, str):
            return str(tokenizer.decode(new, skip_special_tokens=True))
        text, whole = (tokenizer.decode(each, skip_special_tokens=True) for each in (before, before + new))
        return str(whole[len(text) :])  # by itself, sentencepiece's first token loses its space

    def generate(prompts: list[Prompt], seed: int) -> list[list[Answer]]:
        ids = {"input_ids": [encode(prompt) for prompt in prompts]}
        batch = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(policy.device)
        torch.manual_seed(seed)
        made = policy.generate(
            **batch,
            do_sample=True,
            temperature=sampling.temperature,
            num_return_sequences=sampling.answers,
            max_new_tokens=sampling.tokens,
            pad_token_id=tokenizer.pad_token_id,
        )[:, batch.input_ids.shape[1] :]
        before = [each for each in zip(prompts, ids["input_ids"], strict=True) for _ in range(sampling.answers)]
        texts = (decode(*each, new) for each, new in zip(before, made.tolist(), strict=True))
        answers = map(Answer, texts, torch.isin(made, ends).any(dim=1).tolist())
        return [list(each) for each in batched(answers, sampling.answers)]

    return generate


def release_gpu() -> None:
    """Give back what dropped models hold of it: the training run is another process."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def by_server(server: str, model: str, sampling: Sampling) -> Generate:
    """The same of a server, which is asked for all prompts of a call at once: for messages through /chat/completions,
    for text through /completions. One that gives fewer answers than it was asked for is asked again.

    A call raises UserError where the server does not answer, or with an error, or with what is no answer.
    """
    settings = {"model": model, "max_tokens": sampling.tokens, "temperature": sampling.temperature}

    def generate(prompts: list[Prompt], seed: int) -> list[list[Answer]]:
        def ask(prompt: Prompt) -> list[Answer]:
            found: list[Answer] = []
            while missing := sampling.answers - len(found):
                # A seed of its own for each answer: those that a server draws with the next ones are no one else's.
                own = settings | {"n": missing, "seed": seed * sampling.answers + len(found)}
                found += _asked(server, prompt, own)[:missing]
            return found

        with ThreadPoolExecutor(len(prompts)) as threads:
            return list(threads.map(ask, prompts))

    return generate


def _asked(server: str, prompt: Prompt, settings: dict[str, Any]) -> list[Answer]:
    """What a server answers to one request, at least one answer."""
    kind, column = ("completions", "prompt") if isinstance(prompt, str) else ("chat/completions", "messages")
    address, body = f"{server}/{kind}", json.dumps(settings | {column: prompt}).encode()
    try:
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as reply:
            choices = json.load(reply)["choices"]
        answers = [Answer(_text(choice), choice.get("finish_reason") != "length") for choice in choices]
    except urllib.error.HTTPError as error:
        said = error.read(300).decode(errors="replace")
        raise UserError(f"{address} refused: {error}. It says: {said!r}. Is {settings['model']} there?") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, http.client.HTTPException) as error:
        raise UserError(
            f"{address} gave no answers: {error!r}. Is the server up, and is {settings['model']} there?"
        ) from error
    if not answers:
        raise UserError(f"{address} gave a reply of no choices. Look at the server's own lines.")
    return answers


def _text(choice: dict[str, Any]) -> str:
    """Of a choice; null where the model has said nothing."""
    return str((choice["message"]["content"] if "message" in choice else choice["text"]) or "")


@contextlib.contextmanager
def served(command: str, server: str, model: str, minutes: float = 30) -> Iterator[None]:
    """A server of this model inside the block, started by a command with ``{model}`` in it; none for an empty command.

    Raises:
        UserError: it ends, or does not answer in time.
    """
    if not command:
        yield
        return
    if _answers(server):
        raise UserError(f"--serve: something answers at {server} already. End it, or leave --serve out to use it.")
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
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(server: str) -> bool:
    """Whether the server is up: an error is an answer, too, unless it says that it is not ready."""
    try:
        with urllib.request.urlopen(f"{server}/models", timeout=5):
            return True
    except urllib.error.HTTPError as error:
        return error.code not in _NOT_READY
    except (OSError, http.client.HTTPException):
        return False


#: Of a server that still loads its model, or of a proxy before one.
_NOT_READY = (502, 503, 504)
