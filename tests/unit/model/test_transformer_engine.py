"""What we take for granted of Transformer Engine, against its released Python sources: it does not run here.

Read in the wheels ``transformer-engine`` from PyPI (``transformer_engine/pytorch``), and recorded below by release. A
release that is not among them: compare its sources, and add it.
"""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from packaging.version import Version

#: ``module/base.py``, ``set_extra_state``: whether a pickle that is not empty is refused, or run whatever it names.
PICKLES_ARE_REFUSED = {
    "2.14.0": False,
    "2.14.1": False,
    "2.15.0": False,
    "2.16.0": False,
    "2.16.1": True,
    "2.17.0": False,
    "2.17.1": True,
    "2.18.0": True,
    "2.19.0": True,
    "2.20.2": True,
}

#: ``attention/dot_product_attention/dot_product_attention.py``: parameters that all of these releases have. The first
#: two of the constructor have no default.
DOT_PRODUCT_ATTENTION = (
    "num_attention_heads kv_channels num_gqa_groups attention_dropout qkv_format attn_mask_type window_size "
    "bottom_right_diagonal sequence_parallel tp_size get_rng_state_tracker tp_group layer_number attention_type "
    "cp_group cp_global_ranks cp_stream cp_comm_type softmax_scale softmax_type return_max_logit"
)
ITS_FORWARD = (
    "query_layer key_layer value_layer attention_mask qkv_format cu_seqlens_q cu_seqlens_kv cu_seqlens_q_padded "
    "cu_seqlens_kv_padded max_seqlen_q max_seqlen_kv attn_mask_type window_size bottom_right_diagonal "
    "checkpoint_core_attention core_attention_bias_type core_attention_bias alibi_slopes fast_zero_fill "
    "inference_params pad_between_seqs fp8_output num_splits"
)


def bound(parameters: str, given: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, as Python would bind them."""
    names = parameters.split()
    assert named.keys() <= set(names[len(given) :]), named.keys() - set(names)
    return dict(zip(names, given, strict=False)) | named


class DotProductAttention:
    """Takes what the real one takes, and asserts what it asserts of 'thd' inputs (2.14.0 to 2.20.2)."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self.made = bound(DOT_PRODUCT_ATTENTION, given, named)

    def __call__(self, *given: Any, **named: Any) -> torch.Tensor:
        call = self.made | bound(ITS_FORWARD, given, named)
        query, key = call["query_layer"], call["key_layer"]
        assert call["qkv_format"] == "thd" and "padding" in call["attn_mask_type"]
        assert query.ndim == key.ndim == 3
        sizes = call["kv_channels"]  # one, or those of keys and of values
        key_size, value_size = sizes if isinstance(sizes, tuple) else (sizes, sizes)
        assert query.shape[1:] == (call["num_attention_heads"], key_size)
        assert key.shape[1:] == (call["num_gqa_groups"], key_size)
        assert call["value_layer"].shape[1:] == (call["num_gqa_groups"], value_size)
        starts = call["cu_seqlens_q"], call["cu_seqlens_kv"]
        assert starts[0].shape == starts[1].shape and {each.dtype for each in starts} == {torch.int32}
        # check_set_window_size, of a bottom-right causal mask: a causal window ends at the query itself.
        assert call["window_size"][0] >= -1 and call["window_size"][1] == 0
        return query[..., :1].expand(-1, -1, value_size).flatten(1)  # [tokens, heads * size of values]


@pytest.mark.parametrize("value_size", [8, 4])
@pytest.mark.parametrize("window", [None, 64])
def test_attention_is_called_as_transformer_engine_takes_it(monkeypatch, window, value_size):
    from megatron_bdpo.model import attention_backends
    from megatron_bdpo.model.attention_layer import Layer

    engine = types.SimpleNamespace(DotProductAttention=DotProductAttention)
    monkeypatch.setitem(sys.modules, "transformer_engine", types.SimpleNamespace(pytorch=engine))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", engine)
    starts = torch.tensor([0, 3, 5], dtype=torch.int32)
    plan = types.SimpleNamespace(query_starts=starts, key_starts=starts, query_lengths=(3, 2), key_lengths=(3, 2))
    query, key = torch.randn(5, 4, 8), torch.randn(5, 2, 8)
    attention_backends._te_module.cache_clear()
    try:
        layer = Layer(8, 0.25, window, value_size)
        found = attention_backends.BACKENDS["te"](query, key, key[..., :value_size], plan, layer)
        assert found.shape == (5, 4, value_size)
    finally:
        attention_backends._te_module.cache_clear()


#: ``module/base.py``: keywords of ``initialize_ub`` that Megatron gives it, in all of these releases.
INITIALIZE_UB = {"shape", "tp_size", "quantization_modes", "ub_cfgs", "bootstrap_backend"}


def buffers_and_packs(flags: list[str], cache: str) -> tuple[list[int], set[int]]:
    """Rows of the buffers that Megatron asks Transformer Engine for, and of what this rank's layers are given of packs.

    The copy into a buffer checks that it has as many elements (``CommOverlap::copy_into_buffer``, 2.20.2).
    """
    from megatron.training import initialize

    from megatron_bdpo.training import forward
    from megatron_bdpo.training.run import PreferenceRun
    from tests.harness.jobs import run_job

    shapes: list[list[int]] = []
    rows: set[int] = set()
    score_pack = forward.score_pack

    def seen(model: Any, batch: Any, scoring: Any) -> torch.Tensor:
        rows.add(batch.tokens.shape[1])
        return score_pack(model, batch, scoring)

    def initialize_ub(**keywords: Any) -> None:
        assert keywords.keys() == INITIALIZE_UB
        shapes.append(keywords["shape"])

    base = types.SimpleNamespace(
        initialize_ub=initialize_ub, UserBufferQuantizationMode=types.SimpleNamespace(FP8="fp8", NONE="none")
    )
    module = types.SimpleNamespace(base=base)
    engine = types.SimpleNamespace(pytorch=types.SimpleNamespace(module=module))
    modules = {"transformer_engine": engine, "transformer_engine.pytorch": engine.pytorch}

    class Looking(PreferenceRun):
        def after_load(self, model):
            with (
                mock.patch.dict(sys.modules, modules),
                mock.patch.object(initialize, "is_te_min_version", lambda version: Version(version) <= NEWEST),
            ):
                initialize._initialize_tp_communicators()
            super().after_load(model)

    with mock.patch.object(forward, "score_pack", seen):
        run_job(flags, {"pair_cache_dir": cache}, run_type=Looking)
    return [shape[0] for shape in shapes], rows


NEWEST = Version("2.20.2")

#: The held-out pairs would be in packs of another length than the others.
PARALLEL = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--eval-share", "0.2", "--eval-interval", "1"]


@pytest.mark.parametrize("reference", [[], ["--reference", "resident"]], ids=["precomputed", "resident"])
def test_buffers_have_the_size_of_every_pack_of_fixed_length(ranks, tmp_path, reference):
    flags = [*PARALLEL, *reference, "--fixed-pack-length"]
    for buffers, rows in ranks(2)(buffers_and_packs, flags, str(tmp_path)):
        assert buffers == [512] and rows == {512}


def test_buffers_have_the_size_of_a_context_parallel_part(ranks, tmp_path):
    flags = ["--context-parallel-size", "2", "--fixed-pack-length"]
    for buffers, rows in ranks(2)(buffers_and_packs, flags, str(tmp_path)):
        assert buffers == [256] and rows == {256}


def test_without_a_fixed_length_they_have_not(ranks, tmp_path):
    for _, rows in ranks(2)(buffers_and_packs, PARALLEL, str(tmp_path)):
        assert len(rows) > 1


class Ran(Exception):
    """Something that a pickle names has been called."""


def run() -> None:
    raise Ran


class Stranger:
    """Pickled, it is a call of :func:`run`."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return run, ()


class QuantisedLayer(torch.nn.Linear):
    """Has extra state as a module of Transformer Engine's: a pickle in a tensor of bytes, empty where there is none."""

    refuses: bool

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        if state is None or state.numel() == 0:
            return
        if self.refuses:
            raise RuntimeError("Refusing to load pickled Transformer Engine extra state")
        pickle.loads(state.numpy().tobytes())


def states_loaded(releases: dict[str, bool], cache: str) -> dict[str, bool]:
    """By release: whether the tiny policy, with such a layer, takes a checkpoint that holds a stranger's pickle."""
    from megatron.core.utils import unwrap_model

    from megatron_bdpo.training.callbacks.callback import Callback
    from tests.harness.jobs import run_job

    found = {}

    class Loading(Callback):
        def after_load(self, start):
            (chunk,) = unwrap_model(start.model)
            inner = chunk.decoder.layers[0].add_module
            inner("quantised", QuantisedLayer(2, 2))
            layer = chunk.decoder.layers[0].quantised
            state = chunk.state_dict()
            for number in ("", "1"):  # and one of Megatron's grouped experts
                name = f"decoder.layers.0.quantised._extra_state{number}"
                state[name] = torch.frombuffer(bytearray(pickle.dumps(Stranger())), dtype=torch.uint8)
            state["decoder.layers.0.quantised.weight"] = torch.full((2, 2), 7.0)
            for release, refuses in releases.items():
                layer.refuses = refuses
                torch.nn.init.zeros_(layer.weight)
                chunk.load_state_dict(state, strict=False)
                found[release] = bool((layer.weight == 7).all())
            del chunk.decoder.layers[0].quantised

    run_job(["--train-iters", "1"], {"pair_cache_dir": cache}, [Loading()])
    return found


def test_no_release_is_given_a_pickle_of_a_checkpoint(ranks, tmp_path):
    assert ranks(1)(states_loaded, PICKLES_ARE_REFUSED, str(tmp_path))[0] == dict.fromkeys(PICKLES_ARE_REFUSED, True)


@pytest.mark.parametrize(("refuses", "expected"), [(False, Ran), (True, RuntimeError)])
def test_the_stand_in_does_what_transformer_engine_does(refuses, expected):
    layer = QuantisedLayer(2, 2)
    layer.refuses = refuses
    with pytest.raises(expected):
        layer.set_extra_state(torch.frombuffer(bytearray(pickle.dumps(Stranger())), dtype=torch.uint8))
