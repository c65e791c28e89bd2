"""Gradients that the output layer adds to ``main_grad`` itself, without Apex, are those that autograd hands over.

As beside Transformer Engine's layers: they add up theirs by themselves, and no layer needs Apex. Here Megatron's local
layers stand in for them, built with the fusion and then told to leave it to autograd; all else is the real thing.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megatron_bdpo.training.callbacks.callback import Callback, Start
from tests.harness.jobs import Outcome, Shards, assemble, copy_shards, train, whole_weights
from tests.harness.ranks import RankFailure

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None, reason="is about machines without Apex"
)

TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
HALF = ["--bf16", "--accumulate-allreduce-grads-in-fp32", "--overlap-grad-reduce"]

#: Plain SGD: a step is the gradient, where Adam's would be the same for twice the gradient.
SGD = {"optimizer": "sgd", "sgd_momentum": 0.0, "weight_decay": 0.0, "clip_grad": 0.0, "lr": 0.1, "beta": 1.0}


def fused(flags: list[str], *, without_apex: bool = True, **overrides: Any) -> tuple[Any, list[bool]]:
    """On a rank: train with the fusion. Returns the outcome, and for each gradient asked of the output layer's kernel
    whether it came by way of ``main_grad``.

    Args:
        without_apex: as with Transformer Engine's layers. False: as Megatron does by itself.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megatron_bdpo.logprobs import fused_linear
    from megatron_bdpo.model.pair_gpt import PairGPTBuilder
    from megatron_bdpo.platform.compilation import build_output_layer_without_apex
    from megatron_bdpo.training import model_config
    from megatron_bdpo.training.flags import fused_layers

    build, stand_in = PairGPTBuilder.build_model, fused_linear._stand_in
    by_main_grad: list[bool] = []

    def built(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = build(self, *args, **kwargs)
        for layer in model.decoder.modules():
            if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
                assert layer.gradient_accumulation_fusion
                layer.gradient_accumulation_fusion = False
        return model

    def stands_in(weight: Any) -> Any:
        by_main_grad.append(True)
        return stand_in(weight)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(PairGPTBuilder, "build_model", built))
        stack.enter_context(mock.patch.object(fused_linear, "_stand_in", stands_in))
        # The flags' own part, which is about local layers, is left out; it has its test below.
        stack.enter_context(mock.patch.object(fused_layers, "apex_accumulates", lambda: True))
        stack.enter_context(
            mock.patch.object(
                model_config,
                "build_output_layer_without_apex",
                lambda allowed: build_output_layer_without_apex(without_apex),
            )
        )
        try:
            outcome = train(flags, gradient_accumulation_fusion=True, **overrides)
        finally:
            build_output_layer_without_apex(False)
    return outcome, by_main_grad


class StartKept(Callback):
    """Copies the weights before the first step."""

    shards: Shards

    def after_load(self, start: Start) -> None:
        self.shards = copy_shards(start.model)


def trained(flags: list[str], **overrides: Any) -> tuple[Shards, Outcome]:
    """On a rank: train without the fusion. The weights before the first step, and the outcome."""
    start = StartKept()
    outcome = train(flags, callbacks=[start], **overrides)
    return start.shards, outcome


@pytest.mark.parametrize("kernel", ["fused", "plain"])
@pytest.mark.parametrize(
    ("size", "flags", "untied"),
    [
        (1, [], True),
        (1, [], False),
        (4, [*TP2, *PP2, "--sequence-parallel"], False),
        (2, [*TP2, *HALF], True),
        (2, [*TP2, *HALF], False),
    ],
)
def test_weights_are_those_of_unfused_training(ranks, size, flags, untied, kernel):
    """Of two steps of several microbatches. Tied embeddings get both of their gradients."""
    flags = [*flags, "--log-probs", kernel, "--no-pack-pairs"]
    shape = SGD | {"untie_embeddings_and_output_weights": untied, "train_iters": 2, "max_pairs": 16}
    starts, expected = zip(*ranks(size)(trained, flags, **shape), strict=True)
    outcomes = ranks(size)(fused, flags, **shape)
    of_last_stage = outcomes[-1][1]
    assert bool(of_last_stage) == (kernel == "fused"), "the plain kernel does without, for want of Apex"
    before, after = assemble(starts), whole_weights(expected)
    found = whole_weights([outcome for outcome, _ in outcomes])
    # Of the longest step in the tensor. fp32: sums in another order. Half precision: the kernel adds its product in
    # fp32, autograd rounds it to 2^-8 of it, and weights are rounded to 2^-9 of themselves.
    allowed = 1e-5 if "--bf16" not in flags else 2e-2
    for name, value in after.items():
        step = np.abs(value - before[name]).max()
        rounding = 2**-8 * np.abs(value).max() if "--bf16" in flags else 1e-6
        if name.startswith(("embedding", "output_layer")):
            assert step > 10 * rounding, "steps that would not be missed compare nothing"
        assert np.abs(found[name] - value).max() <= allowed * step + rounding, name


def test_megatron_by_itself_asks_for_apex(ranks):
    """The reason for the seam: without it the model is not built, whatever the other layers are."""
    with pytest.raises(RankFailure, match="ColumnParallelLinear was called with gradient_accumulation_fusion set"):
        ranks(1)(fused, [], without_apex=False)


def settled(transformer_impl: str, apex: bool) -> bool:
    """On a rank: whether gradients' accumulation stays fused, as Megatron's default is."""
    from megatron_bdpo.training.flags import fused_layers
    from megatron_bdpo.training.flags.arguments import Arguments

    arguments = Arguments.parse(["--transformer-impl", transformer_impl], {"gradient_accumulation_fusion": True})
    with mock.patch.object(fused_layers, "apex_accumulates", lambda: apex):
        arguments.set(**fused_layers.fusion_arguments(arguments.settings))
    return bool(arguments.megatron.gradient_accumulation_fusion)


@pytest.mark.parametrize(
    ("transformer_impl", "apex", "expected"),
    [("transformer_engine", False, True), ("local", False, False), ("local", True, True)],
)
def test_without_apex_only_local_layers_lose_the_fusion(ranks, transformer_impl, apex, expected):
    assert ranks(1)(settled, transformer_impl, apex) == [expected]


def users(module: Any, name: str) -> set[str]:
    """The functions, with their classes, of a module that read a name."""
    found = set()
    for outer in ast.parse(inspect.getsource(module)).body:
        for inner in ast.walk(outer):
            if isinstance(inner, ast.FunctionDef):
                reads = {node.id for node in ast.walk(inner) if isinstance(node, ast.Name)}
                if name in reads and isinstance(node := outer, ast.FunctionDef | ast.ClassDef):
                    found.add(node.name if node is inner else f"{node.name}.{inner.name}")
    return found


def test_what_megatron_wants_apex_for():
    """In its linear layers' backward pass, and nowhere else that a run comes to; the answer is asked for in one place.

    Transformer Engine's Python, 2.19.0 and 2.20.2, does not name Apex: its layers are told ``fuse_wgrad_accumulation``
    by Megatron's configuration, and their own GEMM adds to ``main_grad``.
    """
    from megatron.core import utils
    from megatron.core.extensions import transformer_engine
    from megatron.core.tensor_parallel import layers

    assert users(layers, "_grad_accum_fusion_available") == {"ColumnParallelLinear.__init__"}
    backward = "LinearWithGradAccumulationAndAsyncCommunication.backward"
    assert users(layers, "fused_weight_gradient_mlp_cuda") == {backward}
    # With --defer-embedding-wgrad-compute, which is refused.
    assert {name.split(".")[0] for name in users(utils, "fused_weight_gradient_mlp_cuda")} == {
        "drain_embedding_wgrad_compute"
    }
    told = inspect.getsource(transformer_engine).count(
        "fuse_wgrad_accumulation=self.config.gradient_accumulation_fusion"
    )
    assert told == 3, "of its linear, norm and linear, and grouped layers"
