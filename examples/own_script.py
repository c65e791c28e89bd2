"""Preference training in a Megatron script of your own: load pairs, build the model's provider, call ``pretrain``.

python examples/own_script.py --recipe recipes/tiny.yaml
torchrun --nproc-per-node 2 examples/own_script.py --recipe recipes/tiny.yaml --tensor-model-parallel-size 2
"""

# isort: off
from megatron_bdpo import Arguments, PreferenceRun, dataset_provider, in_megatron, process_groups  # before Megatron
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args

arguments = Arguments.parse()  # Megatron's flags and ours
with process_groups(arguments.settings.process):
    run = PreferenceRun(arguments)  # pairs, step plan, checks; run.config builds policy and reference
    with in_megatron(run):  # reference log-probs, callbacks, checkpoints that can be trusted
        pretrain(
            pretrain_cfg_container_from_args(arguments.megatron, run.config),
            dataset_provider(arguments, run.job),
            ModelType.encoder_or_decoder,
            run.step,  # the forward step, with the loss
        )
if run.settings.process.is_last:
    print("held-out loss:", [round(evaluation["loss"], 4) for evaluation in run.progress.evaluations])
