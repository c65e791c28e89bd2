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
from megatron_bdpo.model.lora.adapter import LoraAdapter, Outputs
from megatron_bdpo.model.lora.grouped import GroupedAdapters
from megatron_bdpo.model.lora.lora_config import LINEARS, LoraConfig
from megatron_bdpo.model.lora.split import COLUMN, ROW, Split
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
    found = [(each, each.is_on) for each in adapters(model)]
    for each, _ in found:
        each.is_on = False
    try:
        yield
    finally:
        for each, was_on in found:
            each.is_on = was_on


@torch.no_grad()
def merge(model: Iterable[Any]) -> None:
    """Put adapters into the base's weights, for good; they take no part afterwards. Without any, nothing is done.

    Collective.
    """
    for chunk in unwrap_model(list(model)):
        for parent in chunk.modules():
            for name in [name for name, _ in parent.named_children() if name.endswith(ADAPTER)]:
                weights = _weights(parent.get_submodule(name.removesuffix(ADAPTER)))
                for adapter, weight in zip(adapters([parent.get_submodule(name)]), weights, strict=True):
                    weight.copy_(adapter.merged(weight))
                    adapter.is_on = False


def _add_to(parent: nn.Module, name: str, config: LoraConfig, model: Any, *, is_expert: bool) -> None:
    """An adapter beside one linear layer of a module, if one of its projections is a target."""
    linear = parent.get_submodule(name)
    split = _split(COLUMN if name in _COLUMN_PARALLEL else ROW, model, is_expert=is_expert)
    # A fused norm would leave adapters with its input; see ``norm.separate_norms``.
    assert not hasattr(linear, "layer_norm_weight"), f"{name} has its norm in it"
    weights = _weights(linear)
    outputs = _outputs(name, weights[0].shape[0], model, split.group.size())
    if not set(outputs.rows) & set(config.targets):
        return
    own = [LoraAdapter(config, weight, outputs, split) for weight in weights]
    # A sibling and no child: layers describe their own children to checkpoints as if they were whole on every rank.
    if hasattr(linear, "weight"):
        parent.add_module(name + ADAPTER, own[0])
        linear.register_forward_hook(functools.partial(_adapted, own[0]))
    else:
        grouped = GroupedAdapters(own)
        parent.add_module(name + ADAPTER, grouped)
        linear.register_forward_hook(functools.partial(_grouped, grouped))


def _weights(linear: Any) -> list[Tensor]:
    """A linear layer's weight, or those of grouped experts in their order."""
    if hasattr(linear, "weight"):
        return [linear.weight]
    named = dict(linear.named_parameters(recurse=False))
    weights = [named[f"weight{number}"] for number in range(len(named)) if f"weight{number}" in named]
    if not weights:
        raise UserError("the experts' weights are stacked in one, beside which no adapters can stand.")
    return weights


def _adapted(adapter: LoraAdapter, linear: Any, inputs: tuple[Any, ...], result: tuple[Tensor, Any]) -> Any:
    """A linear layer's forward hook."""
    if not adapter.is_on:
        return None
    output, own_bias = result
    added_bias = linear.bias if own_bias is None else None
    if added_bias is not None and not added_bias.numel():  # Transformer Engine's word for none
        added_bias = None
    return adapter(inputs[0], output, linear.weight, added_bias), own_bias


def _grouped(adapters: GroupedAdapters, linear: Any, inputs: tuple[Any, ...], result: tuple[Tensor, Any]) -> Any:
    """The forward hook of grouped experts' linear layer."""
    if not all(each.is_on for each in adapters):
        return None
    output, bias = result
    return adapters(*inputs, output, _weights(linear)), bias


def _split(axis: int, model: Any, *, is_expert: bool) -> Split:
    if is_expert:
        return Split(axis, parallel_state.get_expert_tensor_parallel_group(), is_expert=True)
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
