"""From pairs to packs and steps."""

from __future__ import annotations

import contextlib
import math
from typing import Any

from tests.reliability.fuzz.draw import Draw
from tests.reliability.fuzz.registry import Check, target


@target("groups to packs, and these to context-parallel parts", share=0.06)
def packs() -> Check:
    import numpy as np

    from megatron_bdpo.data.packs import Group, group_tokens, lay_out
    from tests.reliability.fuzz.invariants import check_pack, check_parts

    def check(data: bytes) -> bool:
        draw = Draw(data)
        shared = not draw.chance(3)
        groups, first, used = [], 1, 0
        for _ in range(draw.integer(0, 3)):
            lengths = [draw.pick((1, 1, 2, 3, 4, 7)) for _ in range(1 + draw.pick((1, 2, 2, 3, 5)))]
            ids = np.arange(first, first + sum(lengths), dtype=np.int32)
            prompt, *answers = np.split(ids, np.cumsum(lengths)[:-1])
            groups.append(Group(prompt, answers))
            used += int(group_tokens(np.array([lengths]), share_prompts=shared)[0])
            first += len(ids)
        ranks = draw.integer(1, 4)
        unit = ranks * draw.pick((1, 2, 4, 8))
        length = max(1, -(-(used + draw.integer(0, 9)) // unit)) * unit
        pack = lay_out(groups, length, share_prompts=shared)
        check_pack(pack, groups, length, shared=shared)
        check_parts(pack, ranks)
        if used:
            with contextlib.suppress(ValueError):
                lay_out(groups, used - 1, share_prompts=shared)
                raise AssertionError("more than fits")
        return True

    return check


@target("pairs, weights and settings to step plans", share=0.04)
def plans() -> Check:
    import numpy as np

    from megatron_bdpo.data.step_plan import PlanSettings, epoch_pairs, plan_steps
    from megatron_bdpo.errors import UserError
    from tests.reliability.fuzz.invariants import check_plan, check_same_steps, check_visits, steps_of_whole_epochs

    def check(data: bytes) -> bool:
        draw = Draw(data)
        count = draw.integer(1, 20)
        spread = draw.pick((1, 8, 60))
        sizes = np.array([3 + draw.integer(0, spread) for _ in range(count)], np.int64)
        pools = _pools(draw, count)
        multiple = draw.pick((1, 8, 16))
        longest = int(sizes.max())
        limit = multiple * (-(-longest // multiple) * draw.integer(1, 3) + draw.integer(0, 2) - draw.chance(16))

        def settings() -> PlanSettings:
            return PlanSettings(
                pairs_per_step=per_step,
                data_parallel=draw.integer(1, 4),
                max_pack_length=limit,
                microbatch_multiple=draw.integer(1, 3),
                length_multiple=multiple,
                pipeline_wait=3.0 * draw.chance(3),
                seed=draw.integer(0, 3),
                pack_pairs=not draw.chance(8),
                fixed_length=draw.chance(4),
            )

        per_step = draw.integer(1, 8)
        try:
            chosen = settings()
            steps = steps_of_whole_epochs(pools, per_step, most=24) if epoch_pairs(pools) >= per_step else None
            whole, steps = steps is not None, steps or draw.integer(1, 12)
            plan = plan_steps(sizes, chosen, steps, pools)
        except UserError:
            return False
        check_plan(plan, sizes, chosen, steps)
        if whole:
            check_visits(plan, pools)
        with contextlib.suppress(UserError):
            other = PlanSettings(**{**vars(settings()), "seed": chosen.seed})
            check_same_steps(plan, sizes, chosen, pools, draw.integer(1, steps), other)
        return True

    return check


def _pools(draw: Draw, count: int) -> list[tuple[Any, float]]:
    """All or some of the pairs in one to three sources, with weights."""
    import numpy as np

    cuts = sorted(draw.integer(0, count) for _ in range(draw.integer(1, 3)))
    parts = np.split(np.arange(count), cuts)
    return [(part, draw.pick((1.0, 1.0, 2.0, 0.5, 1.5, 0.01, 3.2))) for part in parts if len(part) or draw.chance(4)]


@target("pairs to the fewest packs, and to even ones", share=0.10)
def packings() -> Check:
    import numpy as np

    from megatron_bdpo.data.bin_packing import pack_all, pack_evenly
    from megatron_bdpo.data.held_out import hold_out
    from megatron_bdpo.errors import UserError

    def check(data: bytes) -> bool:
        draw = Draw(data)
        sizes = np.array([draw.integer(1, 64) for _ in range(draw.integer(0, 24))], np.int64)
        ids = np.arange(len(sizes)) * 3 + 5
        unit, multiple = draw.pick((1, 8)), draw.integer(1, 5)
        limit = unit * -(-draw.integer(64, 200) // unit)
        size_of = dict(zip(ids.tolist(), sizes.tolist(), strict=True))
        tight = pack_all(ids, sizes, limit, multiple)
        even, length = pack_evenly(ids, sizes, limit, multiple, unit)
        assert length <= limit and length % unit == 0
        for packs, most in ((tight, limit), (even, length)):
            assert len(packs) == len(tight) and len(packs) % multiple == 0
            assert sorted(np.concatenate([np.zeros(0, int), *packs]).tolist()) == ids.tolist()
            assert all(sum(size_of[i] for i in pack.tolist()) <= most for pack in packs)
        assert (len(tight) - multiple) * limit < 2 * max(1, sizes.sum()), "half of the packs' room is wasted"
        with contextlib.suppress(UserError):
            prompts = np.array([draw.integer(0, 9) for _ in ids], np.uint64)
            split = hold_out(ids, prompts, draw.pick((0.0, 0.1, 0.5, 0.99, 1.0, -1.0, math.nan)), draw.byte())
            assert sorted([*split.train.tolist(), *split.held_out.tolist()]) == ids.tolist()
            sides = [set(prompts[(side - 5) // 3].tolist()) for side in (split.train, split.held_out)]
            assert all(sides) and not sides[0] & sides[1], "a prompt is on both sides, or a side is empty"
        return True

    return check
