"""Every family's logits are transformers', whatever the layout: a converter may round-trip exactly and yet be wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from unittest import mock

import pytest

from tests.harness.jobs import last_stage
from tests.harness.tiny_models import MODELS, largest_difference, load_model, logits, make_model

pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers")

TP2, PP2 = ["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"]
LAYOUTS = {
    "TP1": (1, []),
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "TP2 PP2": (4, [*TP2, *PP2]),
}
EP2 = (2, ["--expert-model-parallel-size", "2"])
SP = ["--sequence-parallel"]  # which experts need with tensor parallelism, and which is nothing without it
EXPERTS = [name for name in MODELS if "mixtral" in name or "moe" in name or "gpt" in name]
#: What a model needs beside.
NEEDS = dict.fromkeys(EXPERTS, SP) | {"gpt-oss": [*SP, "--expert-tensor-parallel-size", "1"]}
#: Models in every layout, and in the simplest and the fullest; the others, whose layouts are in ``test_gradients``, in
#: the simplest.
FULL = {"llama", "mistral", "qwen2", "qwen3", "gemma", "mixtral", "qwen3 moe"}
VARIANTS = {"llama tied", "llama 3.2", "llama linear", "qwen2 sliding", "qwen3 moe unnormed"}
CASES = {
    f"{name} {layout}": (name, LAYOUTS[layout][0], [*LAYOUTS[layout][1], *NEEDS.get(name, [])])
    for name in MODELS
    for layout in LAYOUTS
    if name in FULL or layout == "TP1" or (name in VARIANTS and layout == "TP2 PP2")
} | {f"{name} EP2": (name, *EP2) for name in EXPERTS}

# fp32: logits are up to some units, one unit in their last place is 2e-7 to 5e-7, after four layers on either side.
LOGIT = 5e-6

JOB = {"max_pairs": 4, "pairs_per_step": 4, "train_iters": 1, "preference_loss": "dpo"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> (directory, transformers' model), made once."""
    directory, made = tmp_path_factory.mktemp("models"), {}

    def model(name):
        if name not in made:
            path = make_model(name, directory)
            made[name] = path, load_model(path)
        return made[name]

    return model


def difference(ranks, model, cache: Path, world_size=1, flags=(), mistake=None):
    directory, expected = model
    found = ranks(world_size)(
        logits, ["--hf-model", str(directory), *flags], mistake=mistake, pair_cache_dir=str(cache), **JOB
    )
    return largest_difference(last_stage(found), expected)


@pytest.mark.parametrize(("name", "world_size", "flags"), CASES.values(), ids=CASES)
def test_logits_are_those_of_transformers(ranks, models, tmp_path, name, world_size, flags):
    assert difference(ranks, models(name), tmp_path, world_size, flags) <= LOGIT


# Mistakes that published converters made, each of which keeps round trips exact ---------------------------------------


def rows_of_the_first_rank(undo: contextlib.ExitStack) -> None:
    """A tensor-parallel rank gets other columns than its own, as from a scatter of strided memory."""
    from megatron_bdpo.model.hf.checkpoint import HuggingFaceCheckpoint

    rows = HuggingFaceCheckpoint.rows

    def strided(self, name, start, stop, columns=()):
        part = rows(self, name, start, stop, columns)
        width = self.tensors[name].shape[-1]
        return part if not columns or part.shape[-1] == width else part.T.reshape(part.shape)

    undo.enter_context(mock.patch.object(HuggingFaceCheckpoint, "rows", strided))


def rope_theta_lost(undo: contextlib.ExitStack) -> None:
    """transformers 5 has it in ``rope_parameters``."""
    from megatron_bdpo.model.hf import config

    settings = config._rope_settings
    undo.enter_context(
        mock.patch.object(config, "_rope_settings", lambda values: settings(values) | {"rope_theta": 10_000.0})
    )


def window_off_by_one(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.model.hf import config

    window = config._window_arguments
    undo.enter_context(
        mock.patch.object(
            config,
            "_window_arguments",
            lambda values, layers: window({**values, "sliding_window": values["sliding_window"] + 1}, layers),
        )
    )


def any_rope_is_llama_3s(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.model.hf import config

    rope = config._rope_arguments
    scaled = {"use_rope_scaling": True, "rope_scaling_factor": 8.0}
    undo.enter_context(mock.patch.object(config, "_rope_arguments", lambda values: rope(values) | scaled))


def rope_factor_left_behind(undo: contextlib.ExitStack) -> None:
    """Megatron's own way from arguments to configuration forgets it: 8 in the place of Llama 3.2's 32."""
    from megatron_bdpo.training.flags import validation

    made = validation.model_config

    def forgetful(args):
        config = made(args)
        config.rope_scaling_factor = 8.0
        return config

    undo.enter_context(mock.patch.object(validation, "model_config", forgetful))


def other_arguments(undo: contextlib.ExitStack, **changed: object) -> None:
    """The configuration is read wrongly."""
    from megatron_bdpo.training.hf import start

    read = start._arguments
    undo.enter_context(mock.patch.object(start, "_arguments", lambda *given: read(*given) | changed))


#: Of gpt-oss, one at a time.
GPT_OSS = {
    "no offset of up": {"glu_linear_offset": 0.0},
    "no clamp": {"activation_func_clamp_value": None},
    "windows in the other layers": {"window_attn_skip_freq": [0, 1, 0, 1]},
    "yarn's range rounded": {"yarn_correction_range_round_to_int": True},
    "no attention factor": {"mscale_all_dim": 1.0},
    "sinks at zero": {"softmax_type": "off-by-one"},
}


def norms_over_the_heads_of_a_rank(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.model.norm import _SumOverRanks

    undo.enter_context(mock.patch.object(_SumOverRanks, "apply", lambda squares, group: group.size() * squares))


def positions_scaled_in_all_layers(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.model.layer import PairLayer

    attend = PairLayer._forward_attention

    def with_one_table(self, *args, rotary_pos_emb, **kwargs):
        return attend(self, *args, rotary_pos_emb=rotary_pos_emb[:1].expand_as(rotary_pos_emb), **kwargs)

    undo.enter_context(mock.patch.object(PairLayer, "_forward_attention", with_one_table))


def attention_before_the_mlp(undo: contextlib.ExitStack) -> None:
    """The MLP reads what attention was added to, under the same norm."""
    from megatron_bdpo.model.layer import PairLayer

    undo.enter_context(
        mock.patch.object(
            PairLayer, "_forward_pre_mlp_layernorm", lambda self, hidden: (self.input_layernorm(hidden), hidden)
        )
    )


def yarns_factor_in_all_layers(undo: contextlib.ExitStack) -> None:
    from megatron.core.transformer.attention import Attention

    initialise = Attention.__init__

    def fixed(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        factor = self._yarn_concentration_factor
        undo.enter_context(
            mock.patch.object(
                type(self), "_yarn_concentration_factor", property(lambda self: factor, lambda *_: None), create=True
            )
        )

    undo.enter_context(mock.patch.object(Attention, "__init__", fixed))


def stacked_projections_as_if_in_megatrons_order(undo: contextlib.ExitStack) -> None:
    """Rows are read one after the other, and written back so."""
    from megatron_bdpo.model.hf.tensors import Rows, Rule

    def in_a_row(self, sizes, names):
        return [Rows(name, 0, shape[0]) for name, shape in self.shapes(sizes, names).items()]

    parts = Rule.parts

    def mistaken(self, sizes, names):
        fused = any(not isinstance(size, str) for size in self.rows.values())
        return (in_a_row if fused else parts)(self, sizes, names)

    undo.enter_context(mock.patch.object(Rule, "parts", mistaken))


def whole_heads_rotated(undo: contextlib.ExitStack) -> None:
    from megatron_bdpo.model.hf import config

    rope = config._rope_arguments
    undo.enter_context(
        mock.patch.object(config, "_rope_arguments", lambda values: rope(values) | {"rotary_percent": 1.0})
    )


def argument_lost(name: str, value: object, undo: contextlib.ExitStack) -> None:
    """A family's argument has another value, and the tensors are what they are."""
    from megatron_bdpo.training.hf import start

    read = start.read_config

    def losing(content):
        found = read(content)
        return dataclasses.replace(found, arguments={**found.arguments, name: value})

    undo.enter_context(mock.patch.object(start, "read_config", losing))


def weight_left_behind(name: str, undo: contextlib.ExitStack) -> None:
    """A tensor stays zero."""
    from megatron_bdpo.model.hf import load

    fill = load.fill

    def forgetful(shard, checkpoint, weights):
        fill(shard, checkpoint, weights)
        if shard.key.endswith(name):
            shard.data.detach().zero_()

    undo.enter_context(mock.patch.object(load, "fill", forgetful))


MISTAKES = {
    "norms over the heads of a rank": (norms_over_the_heads_of_a_rank, "olmo2", 2, TP2),
    "positions scaled in all layers": (positions_scaled_in_all_layers, "olmo3", 1, []),
    "factor of YaRN in all layers": (yarns_factor_in_all_layers, "olmo3 yarn", 1, []),
    "cap of scores lost": (functools.partial(other_arguments, attention_softcap=None), "gemma2", 1, []),
    "cap of logits lost": (functools.partial(other_arguments, logit_softcap=None), "gemma2", 1, []),
    "scale of scores lost": (functools.partial(other_arguments, attention_scale=None), "gemma2", 1, []),
    "one base for all layers": (functools.partial(other_arguments, local_rotary_base=1e6), "gemma3", 1, []),
    "windows in other layers": (
        functools.partial(other_arguments, window_attn_skip_freq=[0, 1, 1, 1]),
        "gemma3",
        1,
        [],
    ),
    "multiplier of residuals lost": (functools.partial(other_arguments, residual_multiplier=None), "granite", 1, []),
    "multiplier of embeddings lost": (functools.partial(other_arguments, embedding_multiplier=None), "granite", 1, []),
    "scale of logits lost": (functools.partial(other_arguments, logit_scale=None), "granite", 1, []),
    "positions in all layers": (functools.partial(other_arguments, no_rope_freq=None), "exaone4", 1, []),
    "attention before the MLP": (attention_before_the_mlp, "cohere2", 1, []),
    "halves rotated instead of neighbours": (
        functools.partial(other_arguments, rotary_interleaved=False),
        "glm4",
        1,
        [],
    ),
    "bias behind attention": (functools.partial(weight_left_behind, "linear_proj.bias"), "llama biased", 1, []),
    "bias of an MLP": (functools.partial(weight_left_behind, "linear_fc1.bias"), "seed oss", 1, []),
    "bias of experts": (functools.partial(weight_left_behind, "router.expert_bias"), "glm4 moe", 1, []),
    "gate of the shared expert": (functools.partial(weight_left_behind, "gate_weight"), "qwen2 moe mixed", 1, []),
    "rotary positions everywhere": (functools.partial(argument_lost, "no_rope_freq", None), "smollm3", 1, []),
    "neighbours not turned": (functools.partial(argument_lost, "rotary_interleaved", False), "ernie 4.5", 1, []),
    "fused projections in a row": (stacked_projections_as_if_in_megatrons_order, "phi3", 1, []),
    "whole heads rotated": (whole_heads_rotated, "phi3", 1, []),
    "routed experts not scaled": (
        functools.partial(argument_lost, "moe_router_topk_scaling_factor", None),
        "glm4 moe",
        1,
        [],
    ),
    "groups of experts lost": (
        functools.partial(argument_lost, "moe_router_group_topk", None),
        "glm4 moe grouped",
        1,
        [],
    ),
    "probabilities of the chosen": (
        functools.partial(argument_lost, "moe_router_pre_softmax", False),
        "qwen2 moe",
        1,
        [],
    ),
    "columns of strided memory": (rows_of_the_first_rank, "llama", 2, TP2),
    "rope_theta lost": (rope_theta_lost, "qwen2", 1, []),
    "window off by one": (window_off_by_one, "mistral", 1, []),
    "any rope is Llama 3's": (any_rope_is_llama_3s, "llama", 1, []),
    "rope factor left behind": (rope_factor_left_behind, "llama 3.2", 1, []),
    **{
        f"gpt-oss: {what}": (functools.partial(other_arguments, **changed), "gpt-oss", 1, [])
        for what, changed in GPT_OSS.items()
    },
}


@pytest.mark.parametrize(("mistake", "name", "world_size", "flags"), MISTAKES.values(), ids=MISTAKES)
def test_a_silent_mistake_shows_in_the_logits(ranks, models, tmp_path, mistake, name, world_size, flags):
    assert difference(ranks, models(name), tmp_path, world_size, flags, mistake) > 10 * LOGIT
