"""Mixture-of-experts layers under a normalisation per pair: whose tokens count in the router's auxiliary losses.

Megatron divides all gradients of a step by one number, with ``calculate_per_token_loss`` the tokens of the step, and
makes up for it in the router: there an auxiliary loss is multiplied by the tokens it is a mean of. Here that number is
the P pairs of the step, so the schedule's ``moe_grad_scale_func`` has to multiply by P over the step's tokens:

    gradient of the step = 1/P sum over packs [ gradient of the pair losses + (P/N) n_p * gradient of the aux loss_p ]

n_p tokens of pack p, N those of all packs. Padding is no token: it is routed, like all positions, but counts nowhere.
What remains is the mean over tokens that Megatron's users know, whatever the pairs per pack and the layout.

The loss by sequence (``seq_aux_loss``) takes a prompt and its answers, a group, for one sequence, and is a mean as the
pairs' own losses are: nothing makes up for tokens there. With w_g what a group counts in the mean of a step, which is
over P:

    gradient of the step = 1/P sum over groups [ gradient of its pair losses + w_g * gradient of the group's aux loss ]
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import (
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class PairRouter(TopKRouter):
    """Megatron's router for packs that have padding, more on some ranks than on others, or hold nothing else.

    Attributes:
        groups: [tokens] number of the group that each of this rank's positions is of, in the pass of this layer that is
            running; None where no loss asks for it.
        group_weight: [G] what each group of the pack counts.
    """

    groups: Tensor | None = None
    group_weight: Tensor
    expert_bias: Tensor | None

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Biases of experts stay in fp32 when a model is moved to half precision.

        Megatron makes fp32 of them again, but what was read before the model was wrapped would be rounded by then.
        """
        before = self.expert_bias
        result = super()._apply(fn, *args, **kwargs)
        moved = self.expert_bias
        if before is not None and moved is not None and moved.dtype != before.dtype and not moved.is_meta:
            self.expert_bias = before.to(moved.device)
        return result

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """Attach the load-balancing loss of this pack, a mean over all its tokens, to ``probs``.

        Megatron's own divides by zero where a pack is only padding, and weighs the part of each rank of the sequence-
        and context-parallel group by that rank's tokens instead of the pack's.
        """
        coefficient = self.get_aux_loss_coeff("aux_loss")
        if coefficient == 0:
            return probs
        tokens_per_expert, _, tokens = get_tokens_per_expert_and_token_count(
            routing_map=routing_map, reduce_group=self.tp_cp_group, topk=self.topk, with_padding_mask=True
        )
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=tokens_per_expert,
            total_num_tokens=tokens.clamp(min=1),
            topk=self.topk,
            num_experts=self.config.num_moe_experts,
            moe_aux_loss_coeff=coefficient,
            fused=self.config.moe_router_fusion,
        )
        return self.attach_and_log_load_balancing_loss(
            probs,
            coefficient,
            loss,
            "load_balancing_loss",
            self.tp_cp_group,
            valid_token_count=tokens / self.tp_cp_group.size(),
        )

    def _apply_seq_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Attach the sum of the load-balancing losses of the pack's groups, each a mean over the group's tokens.

        With P_e the mean probability of expert e and f_e its share of the group's choices (Switch, arXiv 2101.03961,
        equation 4, for each sequence as in DeepSeek-V3, arXiv 2412.19437, equation 17): coefficient E sum_e f_e P_e.
        """
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        if coefficient == 0 or self.groups is None:
            return probs
        weight = self.group_weight.to(scores_for_aux_loss)
        shape = (len(weight), routing_map.shape[-1])
        chosen = scores_for_aux_loss.new_zeros(shape).index_add(0, self.groups, routing_map.to(scores_for_aux_loss))
        torch.distributed.all_reduce(chosen, group=self.tp_cp_group)
        tokens = (chosen.sum(-1, keepdim=True) / self.topk).clamp(min=1)
        # Of this rank's positions: those of the other ranks of the sequence add theirs.
        mass = scores_for_aux_loss.new_zeros(shape).index_add(0, self.groups, scores_for_aux_loss)
        losses = weight * shape[1] * (chosen / (tokens * self.topk) * mass / tokens).sum(-1)
        get_moe_metrics_tracker().record(
            "seq_load_balancing_loss",
            losses.detach().sum() / weight.sum().clamp(min=1),
            self.layer_number,
            self.config.num_layers,
            reduce_group=self.tp_cp_group,
        )
        attached: Tensor = _AttachedLoss.apply(probs, coefficient * losses.sum(), self.config.grad_scale_func)
        return attached

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the tokens of each expert for its bias; Megatron combines [T, E] with [T], which does not broadcast."""
        super()._apply_expert_bias(routing_map, None if padding_mask is None else padding_mask[:, None])


def with_pair_router(mlp: Any) -> Any:
    """A layer spec's MLP builder with :class:`PairRouter`, if it builds a mixture of experts; otherwise as it is."""
    submodules = mlp.keywords.get("submodules") if isinstance(mlp, functools.partial) else None
    if not isinstance(submodules, MoESubmodules):
        return mlp
    return functools.partial(mlp, submodules=dataclasses.replace(submodules, router=PairRouter))


def let_expert_biases_be_added(model: Any) -> None:
    """Make up for what Megatron gets wrong about the biases of experts, which are whole on a rank.

    It adds those of local layers in place, which autograd refuses of what a reduction has returned; there is nothing to
    reduce. And it marks them as seeing a part of the sequence: their gradients, which are summed over the ranks that
    hold an expert, would be summed over the tensor-parallel ranks once more.
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name and getattr(parameter, "sequence_parallel", False):
            parameter.sequence_parallel = False
    for module in model.modules():
        if isinstance(module, RowParallelLinear) and module.is_expert and module.bias is not None:
            assert module.skip_bias_add and module.tp_group.size() == 1
            module.explicit_expert_comm = True


class _AttachedLoss(torch.autograd.Function):
    """A loss beside an activation, which passes through: its gradient is one, times the scale of an fp16 step."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, loss: Tensor, scale: Callable[[Tensor], Tensor] | None) -> Tensor:
        ctx.scale = scale
        ctx.like = loss.new_ones(())
        return activation

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], ctx.like if ctx.scale is None else ctx.scale(ctx.like), None


def tell_pairs(model: Any) -> None:
    """Have each layer tell its router whose positions are whose, where a loss asks for it.

    In front of the layer, so that a layer that is computed again tells it again: its router's pass is its own.
    """
    for layer in model.modules():
        router = getattr(getattr(layer, "mlp", None), "router", None)
        if isinstance(router, PairRouter) and router.get_aux_loss_coeff("seq_aux_loss"):
            layer.register_forward_pre_hook(functools.partial(_tell, model, router), with_kwargs=True)


def _tell(model: Any, router: PairRouter, layer: Any, given: Any, named: dict[str, Any]) -> None:
    plan = named["packed_seq_params"]
    router.groups, router.group_weight = model.own_positions(plan.groups), plan.group_weight


def freeze_routers(model: Any) -> None:
    """Leave routers as they are: no gradients, so no optimizer state, and no updates of experts' biases."""
    for router in model.modules():
        if isinstance(router, TopKRouter):
            router.requires_grad_(False)
            router.frozen_expert_bias = True
