"""Adapters as PEFT keeps them: ``adapter_config.json``, and the tensors' names in ``adapter_model.safetensors``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.json_shape import Maybe, is_count, is_number, schema_error
from megatron_bdpo.model.hf.checkpoint import HuggingFaceCheckpoint, read_json
from megatron_bdpo.model.hf.tensors import Rule, WeightMap
from megatron_bdpo.model.lora.lora_config import GROUPS, LINEARS, OTHER_NAMES, PROJECTIONS, LoraConfig
from megatron_bdpo.model.shards import ADAPTER

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

#: How PEFT's names of tensors begin, and how that of DoRA's m ends.
PREFIX, MAGNITUDE = "base_model.model.", ".lora_magnitude_vector"

#: A file of our own beside PEFT's, which PEFT does not look at: fingerprint (``model.digest``) and type of the base's
#: weights. In the header of the weights' file the order of entries would be another in every process.
BASE_FILE = "base_weights.json"

#: Fields of PEFT's configuration (0.11 to 0.21) that make another model of it, and the values that do not.
_HONOURED: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", None),  # others change the base's weights
    **dict.fromkeys(
        (
            "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_bias",
            "exclude_modules", "target_parameters", "trainable_token_indices", "layer_replication", "use_qalora",
            "alora_invocation_tokens", "megatron_config", "use_bdlora", "arrow_config", "ensure_weight_tying",
        ),
        (None, False, {}, []),
    ),
}  # fmt: skip


def adapter_map(weights: WeightMap, config: LoraConfig) -> WeightMap:
    """Adapters' weights by Megatron's names, as PEFT's tensors.

    Args:
        weights: of the model that the adapters stand in.
    """
    refuse_targets(weights, config)
    rules: dict[str, Rule] = {}
    for key, projection, name, size, of in _projections(weights):
        if projection in config.targets:
            own, theirs = f"{key}{ADAPTER}.{projection}", f"{PREFIX}{name}"
            rules[f"{own}_A"] = Rule({f"{theirs}.lora_A.weight": "rank"}, of.columns, layers=of.layers)
            rules[f"{own}_B"] = Rule({f"{theirs}.lora_B.weight": size}, "rank", layers=of.layers)
            if config.kind == "dora":
                rules[f"{own}_magnitude"] = Rule({f"{theirs}{MAGNITUDE}": size}, layers=of.layers)
    return WeightMap(rules, dataclasses.replace(weights.sizes, rank=config.rank))


def _projections(weights: WeightMap) -> Iterator[tuple[str, str, str, str | tuple[str, ...], Rule]]:
    """Of the model's linear layers: Megatron's name, ours of a projection, Hugging Face's, its rows, and its rule."""
    for key, rule in weights.rules.items():
        layer, _, last = key.rpartition(".")
        projections = LINEARS.get(layer.rpartition(".")[2], ()) if last == "weight" else ()
        # The first linear layer of an MLP without a gate has the other projection alone.
        for projection, (name, size) in zip(projections[-len(rule.rows) :], rule.rows.items(), strict=False):
            yield layer, projection, name.removesuffix(".weight"), size, rule


def refuse_targets(weights: WeightMap, config: LoraConfig) -> None:
    """Refuse adapters for which PEFT has no place, or reads only in part.

    Raises:
        UserError: saying which targets there are.
    """
    for key, rule in weights.rules.items():
        own = LINEARS.get(key.split(".")[-2], ())
        fused = [name.split(".")[-2] for name, size in rule.rows.items() if not isinstance(size, str)]
        if fused and set(own) & set(config.targets):
            raise UserError(
                f"the model keeps {', '.join(own)} in one tensor ({fused[0]}), beside which PEFT has one adapter for "
                "all. Name other projections with --lora-targets (o_proj,down_proj), or train all weights: leave "
                "--lora-rank out."
            )
    sizes = weights.sizes
    if sizes.experts and (sizes.sparse or sizes.shared_ffn) and set(GROUPS["mlp"]) & set(config.targets):
        raise UserError(
            "the model has experts and other MLPs, whose projections have the same names: beside transformers 5 PEFT "
            "reads adapters of either the ones or the others. Give --lora-targets attention, or train all weights: "
            "leave --lora-rank out."
        )


def config_json(config: LoraConfig, weights: WeightMap, base: str) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    Args:
        weights: of the model.
        base: its directory or hub name.
    """
    names = {name.rpartition(".")[2]: None for _, own, name, _, _ in _projections(weights) if own in config.targets}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha.is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(names),
        "use_rslora": config.scaling == "sqrt-rank",
        "use_dora": config.kind == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }


def read_config(directory: Path) -> LoraConfig:
    """The adapters that a directory of PEFT's describes.

    Raises:
        UserError: there are none, or they are of a kind that is not supported.
    """
    path = directory / CONFIG
    content = read_json(path)
    options = {"lora_dropout": Maybe(is_number), "use_rslora": Maybe(bool), "use_dora": Maybe(bool)}
    content = {**dict.fromkeys(options), **content}
    shape = {"r": is_count, "lora_alpha": is_number, "target_modules": _are_names, **options}
    if wrong := schema_error(content, shape):
        raise UserError(f"{path} describes no LoRA adapter: {wrong}.")
    for key, honoured in _HONOURED.items():
        if content.get(key, honoured[0]) not in honoured:
            raise UserError(f"{path}: {key} is {content[key]!r}, which is not supported. Possible: {honoured[0]!r}.")
    try:
        return LoraConfig(
            rank=content["r"],
            alpha=float(content["lora_alpha"]),
            targets=_targets(content["target_modules"]),
            dropout=float(content.get("lora_dropout") or 0.0),
            scaling="sqrt-rank" if content.get("use_rslora") else "rank",
            kind="dora" if content.get("use_dora") else "lora",
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _targets(named: str | list[str]) -> tuple[str, ...]:
    names = GROUPS.get(named, (named,)) if isinstance(named, str) else named
    found = {OTHER_NAMES.get(name, name) for name in names}
    if others := sorted(found - set(PROJECTIONS)):
        raise UserError(
            f"target_modules names {', '.join(others[:3])}: only whole projections of all layers are supported: "
            f"{', '.join(PROJECTIONS)}."
        )
    return tuple(name for name in PROJECTIONS if name in found)


def base_json(fingerprint: str, dtype: str) -> dict[str, str]:
    """The content of ``BASE_FILE``."""
    return {"fingerprint": fingerprint, "dtype": dtype}


def base_of(directory: Path, dtype: str) -> str:
    """Fingerprint of the weights that the adapters were trained beside; "" where nothing tells, or of another type.

    Raises:
        UserError: the file that tells is damaged.
    """
    path = directory / BASE_FILE
    if not path.exists():
        return ""
    content = read_json(path)
    if wrong := schema_error(content, {"fingerprint": str, "dtype": str}):
        raise UserError(f"{path} does not say which weights the adapters stand beside: {wrong}.")
    return str(content["fingerprint"]) if content["dtype"] == dtype else ""


def open_weights(directory: Path, weights: WeightMap) -> HuggingFaceCheckpoint:
    """The tensors of a directory of PEFT's, compared with those that there should be.

    Args:
        weights: :func:`adapter_map`.

    Raises:
        UserError: a file is missing or no safetensors file, or its tensors are of another model.
    """
    checkpoint = HuggingFaceCheckpoint.of_file(_weights_file(directory))
    checkpoint.check(weights.shapes(), described_by=f"{CONFIG} and the base model")
    return checkpoint


def _weights_file(directory: Path) -> Path:
    if not (directory / WEIGHTS).is_file():
        raise UserError(
            f"{directory} has no {WEIGHTS}. PEFT writes it (save_pretrained), and so does --save-hf of a LoRA run."
        )
    return directory / WEIGHTS
