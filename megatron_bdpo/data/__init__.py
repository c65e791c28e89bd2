"""Preference rows to tokens to packs: everything between a file on disk and the tensors of a microbatch.

What is named here is of use without a training job, and needs NumPy only:

    sizes = group_tokens(lengths, share_prompts=True)                   # lengths [P, 3]: prompt, chosen, rejected
    plan = plan_steps(sizes, PlanSettings(64, data_parallel=1, max_pack_length=4096), num_steps=100)
    for pair_ids in plan.packs(step=0, rank=0):
        pack = lay_out([groups[pair] for pair in pair_ids], length=4096)
"""

from megatron_bdpo.data.bin_packing import pack_all
from megatron_bdpo.data.packs import Group, Pack, group_tokens, lay_out
from megatron_bdpo.data.step_plan import PlanSettings, StepPlan, plan_steps

__all__ = ["Group", "Pack", "PlanSettings", "StepPlan", "group_tokens", "lay_out", "pack_all", "plan_steps"]
