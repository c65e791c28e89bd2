"""Which flag has most likely made a run's numbers what they are not to be.

Rules of thumb, in limits so wide that a healthy run does not meet them. Where one applies, trying once more is in vain.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from megatron_bdpo.losses.options import flag
from megatron_bdpo.training.settings import Settings

#: A hundred times what adapters bear, a thousand times what whole models do.
_HIGHEST_LR = 1e-2
#: An option of a loss is suspected that is this many times its default; of 0, this many times 1.
_TIMES_DEFAULT = 100


def likely_cause(settings: Settings, options: Any) -> str:
    """The flag with its value and what to do about it, as a sentence or two; empty where none stands out.

    Args:
        options: of the loss, with its defaults.
    """
    lr = settings.schedule.lr
    if lr is not None and lr > _HIGHEST_LR:
        return (
            f"--lr {lr:g}. Lower it: preference pairs are learned at 1e-7 to 1e-5 by whole models, at up to 1e-4 by "
            "adapters."
        )
    for each in fields(options):
        value, default = getattr(options, each.name), each.default
        if not isinstance(value, float) or not isinstance(default, float):
            continue
        if value > _TIMES_DEFAULT * (default or 1.0):
            return f"{flag(each.name)} {value:g}. Lower it: {default:g} is the default."
    return ""
