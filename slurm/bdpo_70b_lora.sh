#!/usr/bin/env bash
# Balanced DPO of Llama 3 70B with LoRA on one node of 8 x H100 80 GB:  sbatch slurm/bdpo_70b_lora.sh [trainer flags]
# Check the job first, without a GPU and without SLURM:                  bash slurm/bdpo_70b_lora.sh --dry-run
# Account, partition, time, model, data: slurm/site.example.sh. What happens on stop, failure and requeue: slurm/README.md.
#SBATCH --job-name=bdpo_70b_lora
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# Two steps of ten seconds and two checkpoints of adapters fit into 5 minutes before the time limit.
#SBATCH --signal=B:USR1@300

BDPO_HOME=${BDPO_HOME:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
if [ ! -r "$BDPO_HOME/slurm/lib.sh" ]; then
  echo "bdpo: no slurm/lib.sh in $BDPO_HOME. Submit from the repository, or set BDPO_HOME to it." >&2
  exit 2
fi
# shellcheck source=slurm/lib.sh
. "$BDPO_HOME/slurm/lib.sh"

settings
bdpo_run train examples/pretrain_bdpo.py --recipe "${RECIPE:-recipes/llama3_70b_lora.yaml}" "$@"
