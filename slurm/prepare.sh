#!/usr/bin/env bash
# Tokenizes all pairs ahead of a training run, on CPU nodes:    RUN_DIR=... sbatch slurm/prepare.sh [flags for the trainer]
# Each node does its part, and a stop loses a minute's work. The tokens go to the cache in RUN_DIR, where the training run
# with the same recipe finds them. Settings: slurm/README.md.
#SBATCH --job-name=prepare
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@120

BDPO_HOME=${BDPO_HOME:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "$0")/.." && pwd)}}
if [ ! -r "$BDPO_HOME/slurm/lib.sh" ]; then
  echo "bdpo: no slurm/lib.sh in $BDPO_HOME. Submit from the repository, or set BDPO_HOME to it." >&2
  exit 2
fi
# shellcheck source=slurm/lib.sh
. "$BDPO_HOME/slurm/lib.sh"

export BDPO_DEVICE=cpu BDPO_RANKS_PER_NODE=1
settings
bdpo_run prepare -m megatron_bdpo.tokenize --recipe "${RECIPE:-recipes/llama3_8b.yaml}" "$@"
