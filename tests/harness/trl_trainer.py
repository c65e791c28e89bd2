"""One step of TRL's trainers (DPO, KTO, TPO, CPO, ORPO) on the CPU: its metrics and the gradient of every parameter."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.harness.in_double import InDouble


@dataclass
class TrlStep:
    """What TRL's trainer says about the step, in fp32 or in fp64."""

    metrics: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    """The same pairs after the step; empty where that was not asked for."""


def apart(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> tuple[float, str]:
    """How far gradients are from those in fp64, of the largest entry of a tensor: in which tensor most."""
    assert found.keys() == exact.keys() and all(value.dtype == np.float64 for value in exact.values())
    return max((float(np.abs(found[name] - value).max() / np.abs(value).max()), name) for name, value in exact.items())


def trl_step(
    policy: Any,
    reference: Any,
    pairs: list[dict[str, Any]],
    tokenizer: Any,
    directory: Path,
    *,
    batch: int,
    evaluate: bool = False,
    double: bool = False,
    **settings: Any,
) -> TrlStep:
    """One optimizer step over all pairs; tokenising, collating, loss, backward and optimizer are TRL's own.

    Args:
        pairs: prompt, chosen and rejected, as texts or as messages.
        batch: pairs that TRL sees at a time; it accumulates gradients.
        evaluate: whether the pairs are evaluated after the step.
        double: compute in float64.
        settings: of ``DPOConfig``.
    """
    import trl

    kinds, models = (trl.DPOTrainer, trl.DPOConfig), {"model": policy, "ref_model": reference}
    return _step(kinds, models, pairs, tokenizer, directory, batch, settings, evaluate=evaluate, double=double)


def trl_kto_step(
    policy: Any,
    reference: Any,
    answers: list[dict[str, Any]],
    tokenizer: Any,
    directory: Path,
    *,
    double: bool = False,
    **settings: Any,
) -> TrlStep:
    """One optimizer step of ``KTOTrainer`` over all labelled answers, in one batch in their order.

    Args:
        answers: prompt, completion and label.
        double: compute in float64.
        settings: of ``KTOConfig``.
    """
    import trl

    settings = {"train_sampling_strategy": "sequential"} | settings
    kinds, models = (trl.KTOTrainer, trl.KTOConfig), {"model": policy, "ref_model": reference}
    return _step(kinds, models, answers, tokenizer, directory, len(answers), settings, double=double)


def trl_tpo_step(
    policy: Any,
    triples: list[dict[str, Any]],
    tokenizer: Any,
    directory: Path,
    *,
    double: bool = False,
    **settings: Any,
) -> TrlStep:
    """One optimizer step of ``TPOTrainer`` over all triples, one at a time: its NLL is a mean over a batch's tokens.

    Args:
        triples: prompt, chosen, rejected and reference, which is the gold one.
        double: compute in float64.
        settings: of ``TPOConfig``.
    """
    from trl.experimental.tpo import TPOConfig, TPOTrainer

    kinds = (TPOTrainer, TPOConfig)
    return _step(kinds, {"model": policy}, triples, tokenizer, directory, 1, settings, double=double)


def trl_step_without_reference(
    policy: Any,
    pairs: list[dict[str, Any]],
    tokenizer: Any,
    directory: Path,
    *,
    double: bool = False,
    **settings: Any,
) -> TrlStep:
    """One optimizer step of ``CPOTrainer``, or without a ``loss_type`` of ``ORPOTrainer``, over all pairs.

    One at a time: their NLL is a mean over a batch's tokens. ORPO's is over those of prompt and answer there, and here
    over those of the answer, as in CPO.

    Args:
        pairs: prompt, chosen and rejected, as texts.
        double: compute in float64.
        settings: of ``CPOConfig`` or ``ORPOConfig``.
    """
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class OfAnswers(ORPOTrainer):
        def concatenated_forward(self, model: Any, batch: Any) -> Any:
            chosen, *others, _ = super().concatenated_forward(model, batch)  # chosen: per token
            return chosen, *others, -chosen.mean()

    kinds = (CPOTrainer, CPOConfig) if "loss_type" in settings else (OfAnswers, ORPOConfig)
    return _step(kinds, {"model": policy}, pairs, tokenizer, directory, 1, settings, double=double)


def _step(kinds: tuple[Any, Any], models: dict[str, Any], *given: Any, double: bool = False, **more: bool) -> TrlStep:
    """One step of a trainer, given with its configuration, in fp32 or in fp64."""
    with InDouble() if double else contextlib.nullcontext():
        models = {name: model.double() if double else model for name, model in models.items()}
        return _made_step(kinds, models, *given, **more)


def _made_step(
    kinds: tuple[Any, Any],
    models: dict[str, Any],
    rows: list[dict[str, Any]],
    tokenizer: Any,
    directory: Path,
    batch: int,
    settings: dict[str, Any],
    *,
    evaluate: bool = False,
) -> TrlStep:
    from datasets import Dataset
    from transformers import TrainerCallback

    seen = TrlStep()

    class Observer(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **unused: Any) -> None:
            seen.gradients = {name: weight.grad.numpy().copy() for name, weight in model.named_parameters()}

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **unused: Any) -> None:
            seen.metrics = logs | seen.metrics  # the first log is the step's, the last one a summary

    data = Dataset.from_list(rows)
    trainer_type, config_type = kinds
    trainer = trainer_type(
        **models,
        args=config_type(
            max_length=None,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            gradient_accumulation_steps=len(rows) // batch,
            max_steps=1,
            max_grad_norm=0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            output_dir=str(directory / "trl"),
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=data,
        eval_dataset=data if evaluate else None,
        processing_class=tokenizer,
        callbacks=[Observer()],
    )
    trainer.train()
    if evaluate:
        seen.after = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    return seen


def token_id_tokenizer(vocabulary: int) -> Any:
    """Reads "<17><4>" as [17, 4], so that TRL's own data preparation arrives at given tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({f"<{token}>": token for token in range(vocabulary)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\d+>"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<2>", pad_token="<0>")
