"""Our group of command-line flags beside Megatron's, and the defaults that a preference run needs.

Nothing here imports Megatron at module level: :func:`parse` does, after the platform is prepared.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_bdpo.errors import UserError
from megatron_bdpo.logprobs import KERNELS
from megatron_bdpo.losses import registry
from megatron_bdpo.model.attention_backends import BACKENDS
from megatron_bdpo.training.flags import recipe
from megatron_bdpo.training.flags.secrets import refuse_secrets

#: What Megatron's local (non-TE) layers need; chosen for the user where Transformer Engine is not installed.
LOCAL_LAYER_DEFAULTS = {
    "transformer_impl": "local",
    "no_persist_layer_norm": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_gelu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
}

CPU_DEFAULTS = {
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "num_workers": 0,
}

#: Megatron's defaults that are wrong for preference pairs. ``None`` marks what the step plan sets, so that a value
#: given by the user is seen and refused.
PAIR_DEFAULTS = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "calculate_per_token_loss": True,  # exact per-pair normalisation: see training.forward
    "micro_batch_size": None,
    "global_batch_size": None,
    "dataloader_type": None,
    "eval_iters": None,
    "log_interval": 1,
    "eval_interval": 100,
    # Validate every step, the first too, and stop at once. Megatron's own default repeats the step, saves, and goes on
    # only on another GPU.
    "rerun_mode": "disabled",
}


def parse(argv: Sequence[str] | None = None, defaults: Mapping[str, Any] | None = None) -> argparse.Namespace:
    """Parse Megatron's flags and ours, those of recipes included; Megatron has not validated them yet.

    Args:
        argv: the flags, without the program name; ``sys.argv`` when None.
        defaults: default values by argument name.

    Returns:
        The arguments. Among them ``given_flags``: argument name -> flag, of what was given, and ``recipe``: what was
        given as a recipe has it.

    Raises:
        UserError: an unknown flag, a wrong type, a secret, a default that names no argument, a recipe that cannot be
            used.
        SystemExit: argparse's own, for ``--help``.
    """
    from megatron.training.arguments import parse_args

    parsers: list[argparse.ArgumentParser] = []
    program = sys.argv
    flags = program[1:] if argv is None else argv

    def provide(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parsers.append(parser)
        add_preference_arguments(parser)
        parser.error = functools.partial(_refuse, parser)  # type: ignore[method-assign]
        _mend_help(parser)
        known = {action.dest for action in parser._actions}
        for group in _default_groups(defaults or {}):
            if unknown := group.keys() - known:
                raise UserError(f"defaults for unknown arguments: {', '.join(sorted(unknown))}")
            parser.set_defaults(**group)
        sys.argv = [program[0], *recipe.expand(parser, flags)]  # which is what Megatron's parser reads
        return parser

    try:
        args = parse_args(extra_args_provider=provide)
        args.recipe = recipe.given(parsers[0], sys.argv[1:])
        refuse_secrets(args.recipe)
        args.given_flags = {parsers[0]._option_string_actions[f"--{key}"].dest: f"--{key}" for key in args.recipe}
        return args
    finally:
        sys.argv = program


def log_to_wandb_too(args: argparse.Namespace) -> None:
    """Megatron writes metrics to W&B only beside TensorBoard's files: give those a place where the user has not."""
    if args.wandb_project and not args.tensorboard_dir:
        args.tensorboard_dir = str(Path(args.save or args.wandb_save_dir) / "tensorboard")


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """In place of argparse's own way out, which is to print 700 lines of usage on every rank."""
    flags = [flag for action in parser._actions for flag in action.option_strings]
    words = [word.strip(":,") for word in message.split()]
    unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in flags]
    near = [match for word in unknown for match in difflib.get_close_matches(word.split("=")[0], flags, n=1)]
    raise UserError(
        f"{message}." + (f" Did you mean {', '.join(near)}?" if near else "") + " (--help lists all flags.)"
    )


def _mend_help(parser: argparse.ArgumentParser) -> None:
    """A help text of Megatron's holds a bare per cent sign, on which argparse fails: --help would be a traceback."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        try:
            formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = (action.help or "").replace("%", "%%")


def _default_groups(own: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    from megatron_bdpo.platform import cpu

    groups: list[Mapping[str, Any]] = [PAIR_DEFAULTS]
    if importlib.util.find_spec("transformer_engine") is None:
        groups.append(LOCAL_LAYER_DEFAULTS)
    if cpu.is_active():
        groups.append(CPU_DEFAULTS)
    return [*groups, own]


def add_preference_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every flag of ours to ``parser``: one group for the job, one for the options of the losses."""
    group = parser.add_argument_group("preference pairs (megatron_bdpo)")
    add = group.add_argument
    add(
        recipe.FLAG,
        action="append",
        metavar="FILE",
        help="flags in a YAML file, or in braces: '{lr: 1e-6}'. Later recipes win, the command line wins over all",
    )
    add(
        "--pair-data",
        nargs="+",
        metavar="[WEIGHT] PATH",
        help="training pairs: JSONL(.gz), Parquet, Arrow, Hugging Face data sets; each with an optional weight",
    )
    add(
        "--eval-pair-data",
        nargs="+",
        metavar="[WEIGHT] PATH",
        help="held-out pairs, evaluated every --eval-interval steps",
    )
    add(
        "--eval-share",
        type=float,
        default=0.0,
        help="share of the training pairs to hold out instead of --eval-pair-data",
    )
    add(
        "--pair-cache-dir",
        default=None,
        help="where tokenised pairs and reference values are kept; every node must see it (default: beside --save, "
        "else ./runs/cache)",
    )
    add("--max-prompt-length", type=int, help="truncate prompts to this many tokens, keeping their end")
    add("--max-response-length", type=int, help="truncate responses to this many tokens, keeping their start")
    add("--max-pairs", type=int, help="use only the first N usable training pairs")
    add("--long-pairs", choices=("error", "drop"), default="error", help="pairs that do not fit a pack of --seq-length")
    add("--max-malformed-share", type=float, default=0.0, help="share of unreadable rows above which the run stops")
    add("--max-dropped-share", type=float, default=0.5, help="share of unusable rows above which the run stops")
    add("--pairs-per-step", type=int, help="preference pairs per optimizer step, over all ranks; exact")
    add("--pair-epochs", type=_finite, help="train for this many passes over the pairs instead of --train-iters")
    add("--pack-pairs", action=argparse.BooleanOptionalAction, default=True, help="several pairs in one pack")
    add(
        "--fixed-pack-length",
        action="store_true",
        help="pad every pack to --seq-length, in scoring and evaluation too; --tp-comm-overlap needs it",
    )
    add(
        "--share-prompts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="encode each prompt once for both answers",
    )
    add(
        "--hf-model",
        metavar="PATH_OR_NAME",
        help="Hugging Face model (directory or hub name) that the policy starts from and the reference is: sets the "
        "model's arguments and the tokenizer, and is read into each rank's part directly",
    )
    add("--save-hf", metavar="DIR", help="at the end of training, write the policy as a Hugging Face model")
    add("--scale-embeddings", action="store_true", help="multiply embeddings by the root of the hidden size (Gemma)")
    add("--geglu-tanh", action="store_true", help="with --swiglu: tanh-approximated GELU in the place of SiLU (Gemma)")
    add("--preference-loss", default="bdpo", help=f"one of: {', '.join(registry.names())}")
    add(
        "--reference",
        choices=("precomputed", "resident"),
        default="precomputed",
        help="score the reference once before training, or keep a frozen copy beside the policy",
    )
    add("--reference-cache", metavar="DIR", help="where the reference scores of this data and model are kept")
    add(
        "--stop-file",
        nargs="+",
        metavar="PATH",
        help="when one of these files appears, save a checkpoint after the current step and end, as SIGTERM does",
    )
    add(
        "--megatron-output",
        choices=("file", "terminal"),
        default="file",
        help="where Megatron's own lines go: megatron.log in the directory of --save (without one they are dropped), "
        "or between ours",
    )
    add(
        "--checkpoint-checksums",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the digests of a checkpoint's files beside them, and compare them before a checkpoint is used",
    )
    add(
        "--save-every-minutes",
        type=_minutes,
        metavar="N",
        help="save a checkpoint when the last one began this long ago: beside --save-interval, or in its place",
    )
    add(
        "--keep-checkpoints",
        type=int,
        metavar="N",
        help="keep this many of the newest checkpoints and the multiples of --save-retain-interval, delete older ones "
        "(default: keep all; with --save-retain-interval: 1)",
    )
    add(
        "--eval-every-minutes",
        type=_minutes,
        metavar="N",
        help="evaluate when the last evaluation is this long ago: beside --eval-interval, or in its place",
    )
    add("--eval-at-start", action="store_true", help="evaluate the held-out pairs before the first step, too")
    add(
        "--eval-prompts",
        metavar="FILE",
        help="prompts (rows as in --pair-data, without answers) that the policy answers greedily at every evaluation; "
        "kept in generations.jsonl in the directory of --save",
    )
    add("--eval-prompt-tokens", type=int, metavar="N", help="longest answer to them, in tokens (default: 64)")
    add(
        "--step-zero-check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="check at the first step that the policy equals its reference",
    )
    add(
        "--pair-attention",
        choices=("auto", *BACKENDS),
        default="auto",
        help="what computes attention; auto: on a GPU in half precision varlen, te where torch has none; else sdpa",
    )
    add(
        "--fuse-local-layers",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the small functions of layers that are not Transformer Engine's: rotary embedding, SwiGLU, "
        "dropout and residual. Default: on a GPU",
    )
    add(
        "--log-probs",
        choices=tuple(KERNELS),
        default="fused",
        help="fused: output layer and log-softmax in one, a chunk of the vocabulary at a time, so that the logits "
        "never exist as a whole; plain: make the logits of the scored positions, for Megatron's cross entropy",
    )
    add(
        "--log-prob-chunk-size",
        type=int,
        metavar="N",
        help="vocabulary rows in a chunk of the fused log-probs (default: as many as fill 64 MiB of fp32 logits)",
    )
    add(
        "--log-prob-kept-mib",
        type=int,
        metavar="N",
        help="most memory for the softmax of a pack's scored positions, in the model's precision, that the fused "
        "log-probs keep for the backward pass; where it is more, the logits are made a second time (default: 2560)",
    )
    add(
        "--log-entropy",
        action="store_true",
        help="report the policy's entropy per response token, of chosen and rejected",
    )
    _add_loss_options(parser)
    _add_dry_run(parser)


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("dry run (megatron_bdpo)", "All but --dry-run are refused without it.")
    group.add_argument(
        "--dry-run",
        nargs="?",
        type=int,
        const=0,
        metavar="RANKS",
        help="check the whole job as one process on a CPU, for this many ranks (default: WORLD_SIZE), without weights: "
        "flags, layout, data, steps; and estimate time and memory",
    )
    group.add_argument("--gpus-per-node", type=int, help="for the report: which ranks share a node")
    group.add_argument("--gpu-memory", type=float, metavar="GB", help="refuse a job that is estimated to need more")
    group.add_argument("--gpu-tflops", type=float, help="peak of a GPU for the estimated time (default: 989, an H100)")
    group.add_argument("--assumed-mfu", type=float, help="share of that peak to assume (default: 0.35)")


def _minutes(text: str) -> float:
    if not 0 <= (number := float(text)) < math.inf:
        raise ValueError
    return number


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


def _add_loss_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "options of the preference losses (megatron_bdpo)", "An option that the chosen loss does not use is refused."
    )
    for option in registry.option_fields().values():
        defaults = ", ".join(f"{loss} {value}" for loss, value in option.defaults.items())
        keywords: dict[str, Any] = {
            "dest": option.name,
            "default": None,
            "help": f"{option.help} (default: {defaults})",
        }
        if option.type is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            parse = functools.partial(_number_or_word, option.type, option.words) if option.words else option.type
            keywords |= {"type": parse, "choices": option.choices}
        group.add_argument(option.flag, **keywords)


def _number_or_word(number: type, words: Sequence[str], text: str) -> Any:
    if text in words:
        return text
    try:
        return number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number and not {' or '.join(words)}") from None


def given_loss_options(args: argparse.Namespace) -> dict[str, object]:
    """The loss options that the user set, by field name."""
    values = {name: getattr(args, name) for name in registry.option_fields()}
    return {name: value for name, value in values.items() if value is not None}
