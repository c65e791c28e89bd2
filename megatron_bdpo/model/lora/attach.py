"""Adapters put into a model from outside, and everything else of it frozen: the base is as it was."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.initialization import fill_by_name
from megatron_bdpo.model.lora.adapter import COLUMN, ROW, LoraAdapter, Outputs, Split
from megatron_bdpo.model.lora.config import LINEARS, LoraConfig
from megatron_bdpo.model.shards import ADAPTER, adapter_shards

_COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")


def adapters_hook(config: LoraConfig, seed: int) -> Callable[[list[Any]], list[Any]]:
    """A pre-wrap hook that freezes a model and gives it adapters; its weights have to be there before. Collective.

    B is zero and A drawn as PEFT draws it, each from a generator seeded with its name and layer: every layout starts
    alike.
    """

    def add(model: list[Any]) -> list[Any]:
        for chunk in model:
            chunk.requires_grad_(False)
            chunk.keeps_adapters_only = True
            for name, parent in list(chunk.named_modules()):
                # In an order that all ranks share: Megatron sums gradients of many weights in one piece.
                for linear in (each for each in LINEARS if hasattr(parent, each)):
                    _add_to(parent, linear, config, chunk.config, is_expert=".experts" in f".{name}")
            _let_gradients_through(chunk)
        fill_by_name(adapter_shards(model), _init_method, seed)
        return model

    return add


def adapters(model: Iterable[Any]) -> Iterator[LoraAdapter]:
    """Those of model chunks, wrapped or not."""
    for chunk in unwrap_model(list(model)):
        yield from (module for module in chunk.modules() if isinstance(module, LoraAdapter))


@contextlib.contextmanager
def adapters_off(model: Iterable[Any]) -> Iterator[None]:
    """In the block, the model is its base."""
    found = list(adapters(model))
    for each in found:
        each.is_on = False
    try:
        yield
    finally:
        for each in found:
            each.is_on = True


@torch.no_grad()
def merge(model: Iterable[Any]) -> None:
    """Put the adapters into the base's weights, for good; they take no part afterwards. Collective."""
    for chunk in unwrap_model(list(model)):
        for parent in chunk.modules():
            for name, adapter in parent.named_children():
                if isinstance(adapter, LoraAdapter):
                    weight = parent.get_submodule(name.removesuffix(ADAPTER)).weight
                    weight.copy_(adapter.merged(weight))
                    adapter.is_on = False


def _add_to(parent: nn.Module, name: str, config: LoraConfig, model: Any, *, is_expert: bool) -> None:
    """An adapter beside one linear layer of a module, if one of its projections is a target."""
    linear = parent.get_submodule(name)
    split = _split(COLUMN if name in _COLUMN_PARALLEL else ROW, model, is_expert=is_expert)
    weight = getattr(linear, "weight", None)
    if weight is None:  # of grouped experts, weight0, weight1, ...
        raise UserError("LoRA beside --moe-grouped-gemm is not supported. Leave the flag out.")
    outputs = _outputs(name, weight.shape[0], model, split.group.size())
    if not set(outputs.rows) & set(config.targets):
        return
    adapter = LoraAdapter(config, weight, outputs, split)
    # A sibling and no child: layers describe their own children to checkpoints as if they were whole on every rank.
    parent.add_module(name + ADAPTER, adapter)
    linear.register_forward_hook(functools.partial(_adapted, adapter))


def _adapted(adapter: LoraAdapter, linear: Any, inputs: tuple[Any, ...], result: tuple[Tensor, Any]) -> Any:
    """A linear layer's forward hook."""
    if not adapter.is_on:
        return None
    output, own_bias = result
    added_bias = linear.bias if own_bias is None else None
    if added_bias is not None and not added_bias.numel():  # Transformer Engine's word for none
        added_bias = None
    return adapter(inputs[0], output, linear.weight, added_bias), own_bias


def _split(axis: int, model: Any, *, is_expert: bool) -> Split:
    if is_expert:
        group = parallel_state.get_expert_tensor_parallel_group()
        return Split(axis, group, is_expert=True, expert_parallel=model.expert_model_parallel_size > 1)
    group = parallel_state.get_tensor_model_parallel_group()
    return Split(axis, group, sequence_parallel=model.sequence_parallel and group.size() > 1)


def _outputs(name: str, rows: int, model: Any, ranks: int) -> Outputs:
    """The projections of a linear layer and their outputs on this rank."""
    match name:
        case "linear_qkv":
            groups = model.num_query_groups // ranks
            assert groups, "check_layout refuses more tensor-parallel ranks than groups of heads"
            keys = groups * model.kv_channels
            return Outputs({"q_proj": rows - 2 * keys, "k_proj": keys, "v_proj": keys}, groups)
        case "linear_fc1" if model.gated_linear_unit:
            return Outputs({"gate_proj": rows // 2, "up_proj": rows // 2})
        case "linear_fc1":
            return Outputs({"up_proj": rows})
        case _:
            return Outputs({LINEARS[name][0]: rows})


def _let_gradients_through(chunk: Any) -> None:
    """Recomputed blocks return what has a gradient only if their input has one, and frozen embeddings give none."""
    embedding = getattr(chunk, "embedding", None)
    if embedding is None or not chunk.config.recompute_granularity:
        return

    def mark(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() else output

    embedding.register_forward_hook(mark)


def _init_method(key: str) -> Callable[[Tensor], Any]:
    if not key.endswith("_A"):
        return nn.init.zeros_
    return functools.partial(nn.init.kaiming_uniform_, a=5**0.5)
