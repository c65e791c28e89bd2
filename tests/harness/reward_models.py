"""Reward models by other hands: transformers' model for sequence classification, and a step of TRL's RewardTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.harness.huggingface import renamed
from tests.harness.trl_trainer import TrlStep, token_id_tokenizer

Pair = tuple[np.ndarray, np.ndarray]
"""Tokens of the prompt with the chosen and with the rejected answer."""


def pairs_in(cache: Path) -> list[Pair]:
    """All pairs that a job has left in its --pair-cache-dir."""
    from megatron_bdpo.data.store import PairStore

    (meta,) = cache.glob("*/meta.json")
    store = PairStore.open(meta.parent)
    pairs = map(store.pair, range(len(store)))
    return [tuple(np.concatenate([pair.prompt, answer]) for answer in (pair.chosen, pair.rejected)) for pair in pairs]


def build_model(config: dict[str, Any], weights: dict[str, np.ndarray]) -> Any:
    """The model of a reward model's ``config.json`` with Megatron's whole tensors."""
    import transformers

    made = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForSequenceClassification.from_config(made, attn_implementation="eager")
    tensors = {name: torch.from_numpy(value) for name, value in renamed(weights, config).items()}
    model.load_state_dict(tensors, strict=True)
    return model.float().eval()


def load_model(directory: Path) -> Any:
    """The model in a directory."""
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def rewards(model: Any, pairs: Sequence[Pair]) -> np.ndarray:
    """[P, 2] of chosen and rejected, one sequence at a time."""
    return np.array(
        [
            [float(model(input_ids=torch.from_numpy(each.astype(np.int64))[None]).logits) for each in pair]
            for pair in pairs
        ]
    )


def trl_step(
    model: Any, pairs: Sequence[Pair], directory: Path, margins: Sequence[float] | None = None, **settings: Any
) -> TrlStep:
    """One optimizer step of TRL's RewardTrainer over all pairs at a time; ``settings`` are of ``RewardConfig``."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    seen = TrlStep()

    class Observer(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **unused: Any) -> None:
            seen.gradients = {name: weight.grad.numpy().copy() for name, weight in model.named_parameters()}

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **unused: Any) -> None:
            seen.metrics = logs | seen.metrics

    rows = [{"chosen_ids": chosen.tolist(), "rejected_ids": rejected.tolist()} for chosen, rejected in pairs]
    if margins is not None:
        rows = [row | {"margin": margin} for row, margin in zip(rows, margins, strict=True)]
    tokenizer = token_id_tokenizer(model.config.vocab_size)
    if model.config.pad_token_id is not None:
        tokenizer.pad_token = f"<{model.config.pad_token_id}>"  # which TRL gives the model
    trainer = trl.RewardTrainer(
        model,
        trl.RewardConfig(
            max_length=None,
            per_device_train_batch_size=len(pairs),
            max_steps=1,
            max_grad_norm=0,
            gradient_checkpointing=False,
            disable_dropout=True,
            bf16=False,
            use_cpu=True,
            output_dir=str(directory / "trl"),
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Observer()],
    )
    trainer.train()
    return seen
