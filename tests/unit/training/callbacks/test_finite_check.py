"""An update that is not finite ends the run; whole runs with broken numbers are in reliability/test_numbers.py."""

from __future__ import annotations

import math

from megatron_bdpo.errors import UserError


def after_norms(norms: list[float]) -> list[str]:
    from megatron_bdpo.training.callbacks.finite_check import FiniteCheck

    check = FiniteCheck(lambda iteration: [iteration, 7], "pair {}".format, suspect="")
    said = []
    for iteration, norm in enumerate(norms, 1):
        try:
            check.after_update(norm, iteration)
            said.append("")
        except UserError as error:
            said.append(str(error))
    return said


def test_the_steps_pairs_are_named(ranks):
    (said,) = ranks(1)(after_norms, [1.0, math.inf, math.nan])
    assert said[0] == ""
    assert "the gradient of step 2 is not finite" in said[1] and "pair 2" in said[1] and "pair 7" in said[1]
    assert "the gradient of step 3 is not finite" in said[2]
