"""Mixture-of-experts layers under a normalisation per pair: whose tokens count in the router's auxiliary losses.

Megatron divides all gradients of a step by one number, with ``calculate_per_token_loss`` the tokens of the step, and
makes up for it in the router: there an auxiliary loss is multiplied by the tokens it is a mean of. Here that number is
the P pairs of the step, so the schedule's ``moe_grad_scale_func`` has to multiply by P over the step's tokens:

    gradient of the step = 1/P sum over packs [ gradient of the pair losses + (P/N) n_p * gradient of the aux loss_p ]

n_p tokens of pack p, N those of all packs. Padding is no token: it is routed, like all positions, but counts nowhere.
What remains is the mean over tokens that Megatron's users know, whatever the pairs per pack and the layout.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_utils import (
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class PairRouter(TopKRouter):
    """Megatron's router for packs that have padding, more on some ranks than on others, or hold nothing else."""

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
