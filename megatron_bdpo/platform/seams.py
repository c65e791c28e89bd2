"""The functions of ``megatron.training`` that we stand in for, and why each.

``pretrain()`` has no call-backs for these moments, so its module-level names are wrapped for the length of one run
and restored afterwards. Nothing is copied: each wrapper calls Megatron's own function.

| name                                | why                                                                            |
|-------------------------------------|--------------------------------------------------------------------------------|
| `initialize_megatron`               | without a GPU it must be told so (`allow_no_cuda`)                             |
| `compile_helpers`                   | calls `make` without a Makefile in the wheel, and exits; not needed here       |
| `load_checkpoint`                   | torch's Adam (no TE, no Apex) needs a state to load into, and its own counters |
| `get_optimizer_param_scheduler`     | it counts packs, of which another layout may have more or fewer; a longer run  |
|                                     | is another to it, whatever its learning rate                                   |
| `setup_model_and_optimizer`         | the reference is scored or copied just after the policy is loaded              |
| `train`                             | an evaluation before the first step                                            |
| `get_forward_backward_func`         | the resident reference scores the step's packs before the policy's pass        |
| `consume_seqlen_stats_in_iteration` | packs differ in length, and their padding is no work: tokens to count          |
| `save_checkpoint`                   | what it takes has a limit of its own, as has the end of one in the background  |
| `training_log`                      | Megatron's line leaves out negative values (log-probs), and knows no pairs     |
| `evaluate`                          | the same for evaluation, and the before/after table                            |
| `get_signal_handler`                | a stop file asks for what a signal asks for: a checkpoint, then the end        |
| `dist_checkpointing.save`           | a checkpoint is complete, with digests, before Megatron's tracker names it; it |
|                                     | holds a reference that moves, too                                              |
| `FileSystemWriterAsync`, its reader | see ``writing``: digests while files are written, errors that pass, true ones  |
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import megatron.core.datasets.utils as dataset_utils
import megatron.training.initialize as megatron_initialize
import megatron.training.training as trainer
import torch
from megatron.core import dist_checkpointing
from megatron.core.num_microbatches_calculator import get_current_global_batch_size

from megatron_bdpo.platform import cpu
from megatron_bdpo.platform.hooks import HOOKS_ONLY, EvaluationLeft, SaveHooks, TrainerHooks
from megatron_bdpo.platform.writing import replace_dead_writer, writer_seams, written_by_this_process


@contextlib.contextmanager
def trainer_seams(hooks: TrainerHooks, saves: SaveHooks) -> Iterator[None]:
    """Wrap the functions of the trainer, and of its checkpoints, inside the ``with`` block."""
    replacements = [
        (dataset_utils, "compile_helpers", lambda: None),
        (trainer, "initialize_megatron", _initialize(trainer.initialize_megatron)),
        (trainer, "load_checkpoint", _load(trainer.load_checkpoint)),
        (trainer, "get_optimizer_param_scheduler", _scheduler(trainer.get_optimizer_param_scheduler)),
        (trainer, "setup_model_and_optimizer", _setup(trainer.setup_model_and_optimizer, hooks)),
        (trainer, "train", _train(trainer.train, hooks)),
        (trainer, "get_forward_backward_func", _schedule(trainer.get_forward_backward_func, hooks)),
        (trainer, "consume_seqlen_stats_in_iteration", lambda: hooks.work_of_step()),
        (trainer, "save_checkpoint", _in_phase(trainer.save_checkpoint, hooks, "save")),
        (trainer, "maybe_finalize_async_save", _finalize(trainer.maybe_finalize_async_save, hooks)),
        (trainer, "training_log", _log(trainer.training_log, hooks)),
        (trainer, "evaluate", _evaluate(trainer.evaluate, hooks)),
        (trainer, "get_signal_handler", lambda: hooks),
        (dist_checkpointing, "save", _save(dist_checkpointing.save, saves)),
        *writer_seams(hashes=saves.wants_digests),
    ]
    with _replaced(replacements):
        yield


@contextlib.contextmanager
def save_seam(hooks: SaveHooks) -> Iterator[None]:
    """Outside of ``pretrain``: checkpoints saved in the ``with`` block are saved as within the trainer's seams."""
    saving = (dist_checkpointing, "save", _save(dist_checkpointing.save, hooks))
    with _replaced([saving, *writer_seams(hashes=hooks.wants_digests)]):
        yield


def initialize_megatron() -> None:
    """Megatron's own, outside of ``pretrain`` and as it is within the seams."""
    with _replaced([(dataset_utils, "compile_helpers", lambda: None)]):
        megatron_initialize.initialize_megatron(allow_no_cuda=cpu.is_active())


@contextlib.contextmanager
def _replaced(replacements: list[tuple[Any, str, Callable[..., Any]]]) -> Iterator[None]:
    originals = [(module, name, getattr(module, name)) for module, name, _ in replacements]
    for module, name, replacement in replacements:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _initialize(original: Callable[..., Any]) -> Callable[..., Any]:
    def initialize(**kwargs: Any) -> Any:
        return original(allow_no_cuda=cpu.is_active(), **kwargs)

    return initialize


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        adams = list(_torch_adams(optimizer))
        steps: dict[Any, float] = {}
        for adam in adams:
            _create_state(adam)
            adam.register_load_state_dict_post_hook(lambda loaded: steps.update(_step_counters(loaded)))
        with torch.no_grad():  # in fp32 the distributed optimizer's main weights are views of weights with gradients
            result = original(model, optimizer, *args, **kwargs)
        for adam in adams:
            # The distributed optimizer gives all weights one and the same counter, which torch's Adam would advance
            # once per weight, and then copies a zero into it: each weight gets its own, with what was loaded.
            for parameter, state in adam.state.items():
                state["step"] = torch.tensor(steps.get(parameter, 0.0))
        return result

    return load


def _step_counters(adam: torch.optim.Optimizer) -> dict[Any, float]:
    return {parameter: float(state["step"]) for parameter, state in adam.state.items()}


def _torch_adams(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """torch's own Adams inside Megatron's optimizer; TE's and Apex's keep their step elsewhere."""
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = getattr(inner, "optimizer", None)
        if isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
            yield adam


def _create_state(adam: torch.optim.Optimizer) -> None:
    """What torch's Adam would create at its first step, for a checkpoint to be loaded into."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            state = adam.state[parameter]
            if "step" not in state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)


def _scheduler(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_optimizer_param_scheduler(optimizer: Any) -> Any:
        scheduler = original(optimizer)
        packs = get_current_global_batch_size()
        state_dict, load_state_dict = scheduler.state_dict, scheduler.load_state_dict

        def in_steps() -> dict[str, Any]:
            state = state_dict()
            return state | {name: state[name] / packs for name in _COUNTED_IN_PACKS}

        def load(state: dict[str, Any]) -> None:
            counts = {name: state[name] * packs for name in _COUNTED_IN_PACKS}
            counts["num_steps"] = round(counts["num_steps"])
            if scheduler.use_checkpoint_opt_param_scheduler:
                load_state_dict(state | counts)
            else:  # that it fits the steps that are done has been seen: see training.continuation
                load_state_dict(state | state_dict() | {"num_steps": counts["num_steps"]})

        scheduler.state_dict, scheduler.load_state_dict = in_steps, load
        return scheduler

    return get_optimizer_param_scheduler


#: Of the learning rate's schedule in a checkpoint: there in optimizer steps.
_COUNTED_IN_PACKS = ("num_steps", "lr_warmup_steps", "lr_decay_steps", "wd_incr_steps")


def _setup(original: Callable[..., Any], hooks: TrainerHooks) -> Callable[..., Any]:
    def setup(*args: Any, **kwargs: Any) -> Any:
        with hooks.in_phase("weights"):
            result = original(*args, **kwargs)
        hooks.after_load(result[0])
        return result

    return setup


def _in_phase(original: Callable[..., Any], hooks: TrainerHooks, name: str) -> Callable[..., Any]:
    def work(*args: Any, **kwargs: Any) -> Any:
        with hooks.in_phase(name):
            return original(*args, **kwargs)

    return work


def _finalize(original: Callable[..., Any], hooks: TrainerHooks) -> Callable[..., Any]:
    waits = _in_phase(original, hooks, "save")

    def finalize(blocking: bool = False, **kwargs: Any) -> Any:  # asked before each step, where it does not wait
        return (waits if blocking else original)(blocking=blocking, **kwargs)

    return finalize


def _train(original: Callable[..., Any], hooks: TrainerHooks) -> Callable[..., Any]:
    def train(
        step: Any, model: Any, optimizer: Any, scheduler: Any, train_data: Any, valid_data: Any, process: Any,
        config: Any, *rest: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        def evaluate(iteration: int) -> None:
            prefix = f"iteration {iteration}" if iteration else "the start"
            trainer.evaluate_and_print_results(prefix, step, valid_data, model, iteration, None, config)

        hooks.before_training(evaluate)
        return original(step, model, optimizer, scheduler, train_data, valid_data, process, config, *rest, **kwargs)

    return train


def _schedule(original: Callable[..., Any], hooks: TrainerHooks) -> Callable[..., Any]:
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        return hooks.wrap_schedule(original(*args, **kwargs))

    return get_forward_backward_func


def _log(original: Callable[..., Any], hooks: TrainerHooks) -> Callable[..., Any]:
    def training_log(
        loss_dict: dict[str, torch.Tensor],
        total_loss_dict: Any,
        learning_rate: Any,
        iteration: int,
        *rest: Any,
        **kw: Any,
    ) -> Any:
        losses = dict(loss_dict)
        result = original(_shown(loss_dict), total_loss_dict, learning_rate, iteration, *rest, **kw)
        _loss_scale, _report_memory, skipped, grad_norm, *_ = rest
        for name, value in (("learning_rate", learning_rate), ("grad_norm", grad_norm)):
            if losses and value is not None:
                losses[name] = losses["loss"].new_tensor(float(value), dtype=torch.float64)
        if grad_norm is not None and not skipped:
            hooks.after_update(float(grad_norm), iteration)
        hooks.after_step(losses, iteration, bool(skipped))
        return result

    return training_log


def _shown(metrics: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in metrics.items() if not name.startswith(HOOKS_ONLY)}


def _evaluate(original: Callable[..., Any], hooks: TrainerHooks) -> Callable[..., Any]:
    def evaluate(step: Any, data: Any, model: Any, process: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        machine = trainer.get_rerun_state_machine()
        mode = machine.get_mode()
        with hooks.in_phase("evaluation"):
            try:
                metrics, collected, time_limit = original(step, data, model, process, config, *args, **kwargs)
            except EvaluationLeft:  # what Megatron does where its own limit of time ends an evaluation, and undoes
                for chunk in model:
                    chunk.train()
                config.timers = trainer.get_timers()
                config.timers("evaluate").stop()
                machine.set_mode(mode)
                return None, None, True
            if metrics is not None:
                hooks.after_evaluation(metrics)
                metrics = _shown(metrics)
        return metrics, collected, time_limit

    return evaluate


def _save(original: Callable[..., Any], hooks: SaveHooks) -> Callable[..., Any]:
    def save(state: Any, directory: Any, *args: Any, **kwargs: Any) -> Any:
        in_background = kwargs.get("async_sharded_save", False)
        if in_background:
            replace_dead_writer()
        writing = contextlib.nullcontext() if in_background else written_by_this_process()
        with hooks.saving(Path(directory)), writing:
            request = original({**state, **hooks.more_state()}, directory, *args, **kwargs)
            if request is None:
                hooks.after_files(Path(directory))
            else:  # --async-save: run by every rank once all have written
                request.finalize_fns[:] = [
                    _finishing(finish, hooks, Path(directory)) for finish in request.finalize_fns
                ]
                request.finalize_fns.append(lambda: hooks.after_files(Path(directory)))
        return request

    return save


def _finishing(finish: Callable[[], None], hooks: SaveHooks, directory: Path) -> Callable[[], None]:
    def finish_or_tell() -> None:
        with hooks.finishing(directory):
            finish()

    return finish_or_tell
