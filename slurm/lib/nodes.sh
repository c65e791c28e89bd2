# shellcheck shell=bash
# What runs on every node of a launch, in the container if there is one.

# on_node PROGRAM ARGUMENT...: this node's torchrun.
on_node() {
  local is_head=0
  [ "$SLURM_NODEID" != 0 ] || is_head=1
  unset BDPO_NOTIFY               # the batch script calls it, once, when it knows what comes next
  ulimit -n "$(ulimit -Hn)"       # ranks of large jobs hold thousands of sockets and files
  make_scratch
  export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads)}
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}          # Megatron asserts it with TP or CP
  # Hopper: leave SMs to communication that overlaps with the norms; no NVLink SHARP, which takes memory.
  export NVTE_FWD_LAYERNORM_SM_MARGIN=${NVTE_FWD_LAYERNORM_SM_MARGIN:-20} NVTE_BWD_LAYERNORM_SM_MARGIN=${NVTE_BWD_LAYERNORM_SM_MARGIN:-20}
  export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} NCCL_GRAPH_REGISTER=${NCCL_GRAPH_REGISTER:-0}
  export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1} TORCH_NCCL_HIGH_PRIORITY=${TORCH_NCCL_HIGH_PRIORITY:-1}
  # After a time-out every rank leaves its last 2,000 collectives beside the logs.
  export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
  export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$LOGS/nccl_trace_rank_}
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$SCRATCH/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$SCRATCH/inductor}
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}  # a checkpoint takes longer than 30 s
  cd "$BDPO_HOME" || die "$BDPO_HOME is not there on $SLURMD_NODENAME"
  network
  # Naming address and head spares torchrun reverse DNS look-ups, which hang for half a minute where there is no DNS.
  in_background "$BDPO_PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "$BDPO_RANKS_PER_NODE" --max-restarts 0 \
    --rdzv-id "$BDPO_RENDEZVOUS" --rdzv-backend c10d --rdzv-endpoint "$BDPO_HEAD:$BDPO_RENDEZVOUS_PORT" --rdzv-conf "is_host=$is_head" \
    --local-addr "$SLURMD_NODENAME" "$@"
}

threads() {
  local each=$((${SLURM_CPUS_ON_NODE:-1} / BDPO_RANKS_PER_NODE))
  echo $((each > 1 ? each : 1))
}

# ---- scratch: caches of compiled kernels, on the node's own disk --------------------------------------------------------

scratch_root() { if [ -d "${TMPDIR:-}" ]; then echo "$TMPDIR"; else echo /tmp; fi; }

# SCRATCH: a directory that nobody else can have made or can read, and that goes with this shell, which outlives torchrun for
# it. Under proctrack/cgroup SLURM gives its SIGTERM to this shell alone, else to all below it; a second one would keep torchrun
# from waiting for its ranks.
make_scratch() {
  SCRATCH=$(mktemp -d "$(scratch_root)/bdpo-$SLURM_JOB_ID.XXXXXXXXXX") || die "no directory can be made in $(scratch_root)"
  trap 'rm -rf -- "$SCRATCH"' EXIT
  # shellcheck disable=SC2154  # `pid` is that of in_background, where the trap runs once torchrun is there
  trap '[ -n "${pid:-}" ] || exit 143; [ "${BDPO_PASS_ON:-0}" = 0 ] || kill -TERM "$pid" 2> /dev/null' TERM
}

# What an attempt of this job that was killed has left here.
remove_old_scratch() {
  find "$(scratch_root)" -maxdepth 1 -type d -user "$(id -u)" -name "bdpo-$SLURM_JOB_ID.*" -exec rm -rf {} + 2> /dev/null
}

# ---- the network --------------------------------------------------------------------------------------------------------

# The interface that gloo is to use, in GLOO_SOCKET_IFNAME; or why those that are set cannot be used.
network() {
  [ "${SLURM_NNODES:-1}" -gt 1 ] || return 0
  local peer=$BDPO_HEAD answer
  [ "${SLURM_NODEID:-0}" != 0 ] || peer=$BDPO_TAIL
  answer=$("$BDPO_PYTHON" "$LIBRARY/interface.py" "$peer" 2>&1) || die "$answer"
  [ -z "$answer" ] || export GLOO_SOCKET_IFNAME=$answer
}
