"""Measure how far the losses are from their oracles, for docs/losses.md:

    python tools/loss_errors.py     writes tests/oracles/loss_errors.json; `make pages` makes tables of it

An error is the largest difference of a loss or of a gradient in a log-prob, over all pairs, groups or labelled answers
and options that are tried: absolute below 1 and relative above, rounded up to one digit.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the tests' oracles

from megatron_bdpo import losses  # noqa: E402
from tests.harness import answer_forms, group_cases  # noqa: E402
from tests.harness.answer_forms import ANSWER_CASES  # noqa: E402
from tests.harness.closed_forms import CASES  # noqa: E402
from tests.harness.group_forms import GROUP_CASES, GROUP_FORMS, with_nll  # noqa: E402
from tests.harness.loss_cases import EXTREME, MODIFIERS, PAIRS, evaluate, expected, inputs, of_beginnings  # noqa: E402
from tests.harness.trl_losses import COUNTERPARTS, Counterpart, Lengths, apart, log_probs, ours  # noqa: E402
from tests.harness.trl_losses import PAIRS as TRL_PAIRS  # noqa: E402

FILE = ROOT / "tests" / "oracles" / "loss_errors.json"

#: Options of many losses -> a loss with them, TRL's too.
TRIED: dict[str, dict[str, Any]] = {
    "--f-divergence forward_kl": {"f_divergence": "forward_kl"},
    "--f-divergence js_divergence": {"f_divergence": "js_divergence"},
    "--f-divergence alpha_divergence": {"f_divergence": "alpha_divergence"},
    "--reference-free": {"reference_free": True},
    "--ld-alpha 0.5": {"ld_alpha": 0.5},
    "--use-weighting": {"use_weighting": True},
}


def measured() -> dict[str, Any]:
    """What the file is to hold."""
    return {
        "trl": importlib.metadata.version("trl"),
        "losses": {name: _of_loss(name) for name in losses.names()},
        "options": {flag: _of_option(given) for flag, given in TRIED.items()},
    }


def _of_loss(name: str) -> dict[str, Any]:
    every_case = [*CASES, *GROUP_CASES, *ANSWER_CASES]
    cases = [given for each, given in every_case if each == name and not MODIFIERS & given.keys()]
    found: dict[str, Any] = {"closed form": max(_from_closed_form(name, given) for given in cases)}
    if name in COUNTERPARTS:
        found |= _from_trl(name, COUNTERPARTS[name], COUNTERPARTS[name].of_ours, {})
    return found


def _of_option(given: dict[str, Any]) -> dict[str, Any]:
    """With DPO. TRL's weights are told apart from its settings; it has no `reference_free` any more."""
    cases = [case for name, case in CASES if name == "dpo" and given.items() <= case.items()]
    found: dict[str, Any] = {"closed form": max(_from_closed_form("dpo", case) for case in cases)}
    if given == {"use_weighting": True}:
        entropies = 4 * torch.rand(2, TRL_PAIRS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found |= _from_trl("dpo", COUNTERPARTS["dpo"], {}, {"collision_entropies": entropies})
    elif "f_divergence" in given:
        found |= _from_trl("dpo", COUNTERPARTS["dpo"], given, given)
    elif "ld_alpha" in given:
        lengths = torch.randint(1, 6, (2, TRL_PAIRS), generator=torch.Generator().manual_seed(1))
        found |= _from_trl("dpo", COUNTERPARTS["dpo"], given, given, [lengths])
    return found


def _from_closed_form(name: str, given: dict[str, Any]) -> float:
    spec = losses.get(name)
    both = {"pairs": _of_pairs, "groups": _of_groups, "answers": _of_answers}[spec.takes]
    off = [((own - one).abs() / one.abs().clamp(min=1)).max().item() for own, one in both(name, given)]
    return rounded_up(max(off))


def _of_pairs(name: str, given: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Losses and gradients, and what the closed form has in their place."""
    pairs = PAIRS[: -len(EXTREME)] if name == "alphapo" else PAIRS  # its reward overflows there
    found, _ = evaluate(name, given, inputs(pairs, torch.float64))
    yield from zip(found, expected(name, given, pairs), strict=True)
    if "ld_alpha" in given:
        yield from zip(*of_beginnings(name, given, pairs), strict=True)


def _of_groups(name: str, given: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    options = asdict(losses.build_options(name, given))
    weight = options.pop("nll_weight")
    found, _ = group_cases.evaluate(name, given, group_cases.inputs(group_cases.GROUPS, torch.float64))
    for row, group in enumerate(group_cases.GROUPS):
        loss, slopes = with_nll(group, GROUP_FORMS[name](group, **options), weight)
        yield found.loss[row], torch.tensor(loss, dtype=torch.float64)
        yield found.gradient[row, : len(group)], torch.tensor(slopes, dtype=torch.float64)


def _of_answers(name: str, given: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """As a step, and where no step is looked at."""
    answers = answer_forms.random_answers(100) + answer_forms.EXTREME
    for step in (answers, []):
        *found, _ = answer_forms.evaluate(losses.get(name), given, answers, step)
        wanted = torch.tensor(answer_forms.expected(name, given, answers, step), dtype=torch.float64)
        yield from zip(found, wanted.unbind(1), strict=True)


def _from_trl(
    name: str,
    theirs: Counterpart,
    options: dict[str, Any],
    more: dict[str, Any],
    lengths: Sequence[Lengths] = (1, 3),
) -> dict[str, Any]:
    """In both precisions; alone the alpha divergence of TRL takes no float64."""
    found: dict[str, Any] = {"TRL's": theirs.name}
    for title, dtype in {"fp64": torch.float64, "fp32": torch.float32}.items():
        more = {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in more.items()}
        own_more = {key: value for key, value in more.items() if key == "collision_entropies"}
        if not (dtype == torch.float64 and more.get("f_divergence") == "alpha_divergence"):
            found[title] = rounded_up(
                max(
                    apart(
                        partial(ours, name, options, tokens, **own_more),
                        partial(theirs.loss, tokens, **more),
                        # Far from the reference a divergence's exponentials are all that there is.
                        partial(log_probs, dtype, -2.0 if "f_divergence" in more else -8.0),
                    )
                    for tokens in lengths
                )
            )
    return found


def rounded_up(error: float) -> float:
    """To one digit."""
    if error == 0:
        return 0.0
    unit = 10.0 ** math.floor(math.log10(error))
    return float(f"{math.ceil(error / unit * (1 - 1e-12)) * unit:.0e}")


if __name__ == "__main__":
    FILE.write_text(json.dumps(measured(), indent=1, ensure_ascii=False) + "\n", "utf-8")
