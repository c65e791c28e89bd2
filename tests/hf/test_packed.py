"""Views of files: gpt-oss's stacked experts, in bf16 and in MXFP4, and DeepSeek's blocks of FP8."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bdpo.errors import UserError
from megatron_bdpo.model.hf import packed
from megatron_bdpo.model.hf.checkpoint import HuggingFaceCheckpoint
from megatron_bdpo.model.hf.config import read_config
from tests.distributed.test_bad_input import refusal
from tests.harness.tiny_models import load_model, make_model
from tests.hf.test_export import export

pytest.importorskip("transformers", reason="the models are made by Hugging Face transformers")

LAYER = "model.layers.2.mlp.experts"
EXPERTS, HIDDEN, FFN = 4, 64, 96


def opened(directory: Path) -> HuggingFaceCheckpoint:
    architecture = read_config(json.loads((directory / "config.json").read_text()))
    checkpoint = architecture.open_weights(directory)
    checkpoint.check(architecture.weights.shapes())
    return checkpoint


def quantised(directory: Path) -> dict[str, torch.Tensor]:
    """Put random MXFP4 in the place of a model's experts; returns what transformers makes of it."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    file = directory / "model.safetensors"
    tensors = load_file(file)
    expected = dict(tensors)
    draw = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        experts, columns, rows = tensors.pop(name).shape  # stored as the transpose
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=draw, dtype=torch.uint8)
        scales = torch.randint(110, 140, blocks.shape[:3], generator=draw, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(config))
    return expected


@pytest.mark.parametrize("is_quantised", [False, True], ids=["fp32", "mxfp4"])
def test_every_part_of_every_expert(tmp_path, is_quantised):
    model = make_model("gpt-oss", tmp_path)
    whole = quantised(model) if is_quantised else load_file(model / "model.safetensors")
    checkpoint = opened(model)
    gate_up, down = whole[f"{LAYER}.gate_up_proj"], whole[f"{LAYER}.down_proj"]
    assert gate_up.shape == (EXPERTS, HIDDEN, 2 * FFN) and down.shape == (EXPERTS, FFN, HIDDEN)
    for expert in range(EXPERTS):
        expected = {
            "gate_proj.weight": gate_up[expert][:, 0::2].T,
            "up_proj.weight": gate_up[expert][:, 1::2].T,
            "down_proj.weight": down[expert].T,
            "gate_proj.bias": whole[f"{LAYER}.gate_up_proj_bias"][expert][0::2],
            "up_proj.bias": whole[f"{LAYER}.gate_up_proj_bias"][expert][1::2],
            "down_proj.bias": whole[f"{LAYER}.down_proj_bias"][expert],
        }
        for name, tensor in expected.items():
            read = f"{LAYER}.{expert}.{name}"
            assert torch.equal(checkpoint.rows(read, 0, len(tensor)), tensor), read
            columns = (slice(5, 40),) if tensor.dim() == 2 else ()
            assert torch.equal(checkpoint.rows(read, 7, 50, columns), tensor[(slice(7, 50), *columns)]), read
    assert checkpoint.tensors[f"{LAYER}.3.up_proj.weight"].dtype == ("BF16" if is_quantised else "F32")


def test_there_and_back_again(tmp_path):
    model = make_model("gpt-oss", tmp_path)
    expected = load_file(model / "model.safetensors")
    plain, target = opened(model), tmp_path / "plain"
    target.mkdir()
    rows = {name: plain.rows(name, 0, tensor.shape[0]).contiguous() for name, tensor in plain.tensors.items()}
    save_file(rows, target / "model.safetensors")
    sizes = read_config(json.loads((model / "config.json").read_text())).weights.sizes
    back = packed.PackedExperts(HuggingFaceCheckpoint.open(target), sizes)
    assert back.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert back.tensors[name].shape == tensor.shape
        assert torch.equal(back.rows(name, 0, tensor.shape[0]), tensor), name


def test_all_numbers_of_four_bits():
    """OCP Microscaling Formats 1.0, E2M1 and E8M0: the lower half of a byte is the first number."""
    blocks = torch.tensor([[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]], dtype=torch.uint8)
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    for exponent in (-120, -1, 0, 3, 60):
        found = packed.dequantised(blocks, torch.tensor([[exponent + 127]], dtype=torch.uint8))
        assert found.dtype == torch.bfloat16
        assert found.tolist() == [[number * 2.0**exponent for number in numbers] * 2]


def test_a_stack_of_another_shape_is_named(tmp_path):
    model = make_model("gpt-oss", tmp_path)
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{LAYER}.down_proj"] = tensors[f"{LAYER}.down_proj"][:3].contiguous()
    save_file(tensors, file)
    with pytest.raises(UserError) as refusal:
        opened(model)
    assert f"unexpected: {LAYER}.down_proj" in str(refusal.value)
    assert f"missing: {LAYER}.0.down_proj.weight" in str(refusal.value)


# FP8 in blocks --------------------------------------------------------------------------------------------------------


def in_blocks(directory: Path) -> dict[str, torch.Tensor]:
    """Put FP8, a scale for each 128 x 128, in the place of a model's matrices; returns what they stand for."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    expected = dict(tensors)
    draw = torch.Generator().manual_seed(1)
    for name, tensor in list(tensors.items()):
        if tensor.dim() != 2 or ("self_attn" not in name and "mlp" not in name) or "mlp.gate." in name:
            continue
        rows, columns = tensor.shape
        eights = (tensor * 4).to(torch.float8_e4m3fn)
        scales = torch.rand(-(-rows // 128), -(-columns // 128), generator=draw) + 0.5
        tensors |= {name: eights, f"{name}_scale_inv": scales}
        whole = eights.float()
        for row, column in itertools.product(range(rows), range(columns)):
            whole[row, column] *= scales[row // 128, column // 128]
        expected[name] = whole.to(torch.bfloat16)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (directory / "config.json").write_text(json.dumps(config))
    return expected


def test_blocks_of_fp8(tmp_path):
    """Matrices of several blocks, the last of them cut off, and any part of them."""
    sizes = {"hidden_size": 160, "intermediate_size": 144, "moe_intermediate_size": 8, "num_hidden_layers": 2}
    model = make_model("deepseek v3", tmp_path, **sizes)
    expected = in_blocks(model)
    checkpoint = opened(model)
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.rows(name, 0, tensor.shape[0]), tensor), name
    name = "model.layers.0.mlp.gate_proj.weight"
    assert expected[name].shape == (144, 160) and checkpoint.tensors[name].dtype == "BF16"
    for rows, columns in (((100, 140), slice(120, 150)), ((128, 144), slice(128, 160)), ((3, 5), slice(0, 1))):
        part = checkpoint.rows(name, *rows, (columns,))
        assert torch.equal(part, expected[name][slice(*rows), columns])


def test_scales_of_other_blocks_are_named(tmp_path):
    model = make_model("deepseek v3", tmp_path)
    in_blocks(model)
    file = model / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[f"{name}_scale_inv"] = torch.ones(2, 1)
    save_file(tensors, file)
    with pytest.raises(UserError) as refusal:
        opened(model)
    assert f"unexpected: {name}_scale_inv" in str(refusal.value)
    assert f"{name} F8_E4M3" in str(refusal.value)


# Exports --------------------------------------------------------------------------------------------------------------

EP2 = ["--expert-model-parallel-size", "2"]


@pytest.mark.parametrize(
    ("name", "quantise"), [("gpt-oss", quantised), ("deepseek v3", in_blocks)], ids=["MXFP4", "FP8"]
)
def test_exports_of_quantised_models_are_not_quantised(ranks, tmp_path, name, quantise):
    """In bf16, as transformers reads them."""
    model, target = make_model(name, tmp_path), tmp_path / "out"
    expected = quantise(model)
    ranks(2)(export, ["--hf-model", str(model), "--bf16", *EP2], target)
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    files = [load_file(file) for file in target.glob("*.safetensors")]
    found = {key: tensor for file in files for key, tensor in file.items()}
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        # The biases that experts are chosen with stay in fp32.
        assert torch.equal(found[key].to(torch.bfloat16), tensor.to(torch.bfloat16)), key
    assert load_model(target).config.model_type == json.loads((model / "config.json").read_text())["model_type"]


def test_kimi_k2_is_exported_as_what_transformers_knows(ranks, tmp_path):
    model, target = make_model("deepseek v3", tmp_path), tmp_path / "out"
    config = json.loads((model / "config.json").read_text())
    code = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    (model / "config.json").write_text(json.dumps(config | {"model_type": "kimi_k2", "auto_map": code}))
    ranks(1)(export, ["--hf-model", str(model)], target)
    written = json.loads((target / "config.json").read_text())
    assert written["model_type"] == "deepseek_v3" and "auto_map" not in written
    expected = load_file(model / "model.safetensors")
    found = load_model(target).state_dict()
    assert torch.equal(found["model.embed_tokens.weight"], expected["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek v3"])
def test_adapters_are_refused_by_name(ranks, tmp_path, name):
    model = make_model(name, tmp_path)
    (message,) = ranks(1)(refusal, ["--hf-model", str(model), "--lora-rank", "4"])
    assert "no adapters for models of the family" in message and "Leave --lora-rank and --lora-start out" in message
