"""Balanced DPO in a plain PyTorch loop, without Megatron: a tiny Llama of transformers learns the example's pairs.

    python examples/plain_torch.py

What comes from megatron_bdpo is the loss, the comprehension that it reads, packing with shared prompts, and log-probs
that never see the logits. These parts need torch and NumPy only; the loop, the model and the optimizer are yours.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_bdpo import losses
from megatron_bdpo.data import Group, Pack, PlanSettings, group_tokens, lay_out, pack_all, plan_steps
from megatron_bdpo.logprobs import ScoredPositions, answer_log_probs, fused_log_probs

DATA = Path(__file__).resolve().parent / "data"


def main() -> None:
    """Train, and show what the held-out pairs say of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preference-loss", default="bdpo", choices=list(filter(can_train, losses.names())))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--pairs-per-step", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()

    torch.manual_seed(1)
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(DATA / "tokenizer.model"))
    train, held_out = (read_pairs(DATA / f"{name}.jsonl", tokenizer) for name in ("train", "heldout"))
    model = tiny_llama(tokenizer.vocab_size())
    spec, options = losses.get(args.preference_loss), losses.build_options(args.preference_loss, {})

    # The policy is still the reference: what the loss reads of it is scored now, once.
    no_prompt = np.array([tokenizer.bos_id()], np.int32)
    reference, reference_held_out = score(model, train), score(model, held_out)
    unconditional = score(model, [Group(no_prompt, pair.answers) for pair in train])

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    settings = PlanSettings(args.pairs_per_step, data_parallel=1, max_pack_length=1024)
    plan = plan_steps(sizes(train), settings, args.steps)
    for step in range(args.steps):
        step_loss = 0.0
        for ids in plan.packs(step, rank=0):
            pack = lay_out([train[pair] for pair in ids], int(sizes(train)[ids].sum()))
            pairs = losses.PairLogProbs.of_pairs(
                tokens=torch.from_numpy(pack.answer_tokens).view(-1, 2),
                policy=log_probs(model, pack).view(-1, 2),
                reference=reference[ids],
                unconditional=unconditional[ids],
            )
            loss = spec.function(pairs, options).loss.sum() / args.pairs_per_step  # the step's mean, however packed
            loss.backward()
            step_loss += float(loss)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 5 == 0:
            print(f"step {step + 1:>3}/{args.steps} | loss {step_loss:.4f}")

    gained = score(model, held_out) - reference_held_out
    margin = gained[:, 0] - gained[:, 1]
    print(f"held out: accuracy {(margin > 0).double().mean():.3f}, margin {margin.mean():+.2f} nats")


def can_train(name: str) -> bool:
    """Whether a loss can do with what this loop gives it: pairs without safety labels."""
    spec = losses.get(name)
    return spec.takes == "pairs" and not spec.requirements(spec.options()).safety


def read_pairs(path: Path, tokenizer: Any) -> list[Group]:
    """Token ids of prompts and answers, each tokenized by itself: the data puts a space between them."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [
        Group(
            np.array([tokenizer.bos_id(), *tokenizer.encode(row["prompt"])], np.int32),
            [np.array([*tokenizer.encode(row[name]), tokenizer.eos_id()], np.int32) for name in ("chosen", "rejected")],
        )
        for row in rows
    ]


def tiny_llama(vocab_size: int) -> LlamaForCausalLM:
    """4 layers of 96, random."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def sizes(pairs: list[Group]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[P] positions of a pack that each pair takes: its prompt once, and both answers."""
    lengths = [(len(pair.prompt), *map(len, pair.answers)) for pair in pairs]
    return group_tokens(np.array(lengths), share_prompts=True)


def log_probs(model: LlamaForCausalLM, pack: Pack) -> Tensor:
    """[A] log pi(y|x) of the pack's answers, pair after pair, in nats; the logits are never made."""
    hidden = model.model(
        input_ids=torch.from_numpy(pack.tokens)[None],
        position_ids=torch.from_numpy(pack.positions)[None],
        attention_mask=torch.from_numpy(pack.attention_mask())[None, None],
        use_cache=False,
    ).last_hidden_state
    scored = ScoredPositions.of(pack.scored_hidden, pack.scored_target, pack.answer_tokens)
    tokens = fused_log_probs(hidden.transpose(0, 1), model.lm_head.weight, None, scored)
    return answer_log_probs(tokens.log_probs, scored)


@torch.no_grad()
def score(model: LlamaForCausalLM, pairs: list[Group]) -> Tensor:
    """[P, 2] log-probs of all pairs' answers: chosen, rejected."""
    values = torch.empty(len(pairs), 2, dtype=torch.float64)
    for ids in pack_all(np.arange(len(pairs)), sizes(pairs), length=1024, multiple=1):
        pack = lay_out([pairs[pair] for pair in ids], int(sizes(pairs)[ids].sum()))
        values[ids] = log_probs(model, pack).view(-1, 2)
    return values


if __name__ == "__main__":
    main()
