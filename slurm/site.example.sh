# Settings of a site. Copy to slurm/site.sh, which the scripts read by themselves. Written like this, what the environment
# sets wins.
# shellcheck shell=bash

# For sbatch: `. slurm/site.sh` before you submit, or give the flags to sbatch.
# export SBATCH_ACCOUNT=... SBATCH_PARTITION=... SBATCH_TIMELIMIT=24:00:00

# Model and data of the recipes.
# export HF_MODEL=${HF_MODEL:-/models/Llama-3.1-70B-Instruct} PAIR_DATA=${PAIR_DATA:-/data/pairs.jsonl}

# A Python >= 3.12 with Megatron, on a file system that all nodes see ...
# : "${BDPO_PYTHON:=/apps/megatron/bin/python}"
# ... or a container (pyxis/enroot; BDPO_CONTAINER_RUNTIME=apptainer); BDPO_PYTHON is then the one inside. The repository and
# the run directory are mounted.
# : "${BDPO_CONTAINER:=nvcr.io#nvidia/pytorch:25.06-py3}" "${BDPO_PYTHON:=python}" "${BDPO_CONTAINER_MOUNTS:=/data:/data}"

# The network.
# export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-bond0} NCCL_IB_HCA=${NCCL_IB_HCA:-mlx5}

# A check of yours beside ours, on each node before every attempt; a node where it fails is left out.
# : "${BDPO_PREFLIGHT:=ibstat | grep -q Active}"

# Who is told of requeues, of giving up, of the end.
# [ -n "${BDPO_NOTIFY:-}" ] || BDPO_NOTIFY='mail -s "$BDPO_RUN: $BDPO_STATE" me <<< "step $BDPO_STEP: $BDPO_CAUSE"'
