#!/usr/bin/env bash
# What the batch scripts share: settings, claiming the run directory, preflight, launch, and what to do when it ends.
# Sourced by them on the first node; run as `lib.sh preflight` and `lib.sh node ...` on every node. See README.md.
set -u -o pipefail

say() { echo "bdpo: $*"; }
die() { echo "bdpo: $*" >&2; exit 2; }

# ---- settings: the environment, then slurm/site.sh, then these defaults -------------------------------------------------

settings() {
  BDPO_SITE=${BDPO_SITE:-$BDPO_HOME/slurm/site.sh}
  # shellcheck source=slurm/site.example.sh
  if [ -r "$BDPO_SITE" ]; then . "$BDPO_SITE"; fi
  : "${BDPO_PYTHON:=$BDPO_HOME/.venv/bin/python}"
  : "${RUN_DIR:=$BDPO_HOME/runs/${SLURM_JOB_NAME:-$(basename "$0" .sh)}}"
  : "${BDPO_RANKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-8}}"
  : "${BDPO_DEVICE:=gpu}"               # cpu: for trials
  : "${BDPO_CONTAINER:=}" "${BDPO_CONTAINER_MOUNTS:=}" "${BDPO_PREFLIGHT:=}"
  : "${BDPO_MAX_STALLED:=3}"            # attempts in a row without progress before giving up
  : "${BDPO_REQUEUE:=1}"                # 0: exit with 75 instead, for a chain of dependent jobs
  export BDPO_HOME BDPO_PYTHON RUN_DIR BDPO_RANKS_PER_NODE BDPO_DEVICE BDPO_PREFLIGHT
  [ -n "$BDPO_CONTAINER" ] || [ -x "$BDPO_PYTHON" ] ||
    die "BDPO_PYTHON=$BDPO_PYTHON is not a program. Run 'make install' in $BDPO_HOME, or name another in $BDPO_SITE."
}

# ---- the batch script ---------------------------------------------------------------------------------------------------

# bdpo_run TASK PROGRAM ARGUMENT...: train or score, to the end, to a stop, or to giving up. After `settings`. Does not return.
bdpo_run() {
  TASK=$1; shift
  [ -n "${SLURM_JOB_ID:-}" ] || outside_slurm "$@"
  ATTEMPT=${SLURM_RESTART_COUNT:-0}
  TAG=$SLURM_JOB_ID.$ATTEMPT
  CONTROL=$RUN_DIR/slurm/$TASK             # what this script remembers between attempts
  LOGS=$CONTROL/logs/$TAG
  STOP_FILE=$CONTROL/stop.$TAG                  # a stale attempt cannot stop a newer one, nor the other way round
  KILL_SWITCH=$RUN_DIR/STOP
  BDPO_STATUS_FILE=$CONTROL/status.json
  [ "$TASK" != train ] || BDPO_STATUS_FILE=$RUN_DIR/status.json
  export LOGS BDPO_STATUS_FILE
  mkdir -p "$LOGS" || die "RUN_DIR=$RUN_DIR cannot be written."
  claim
  [ "$(status state)" != finished ] || conclude 0 "finished already$(place); remove $BDPO_STATUS_FILE to go on from there"
  [ ! -e "$KILL_SWITCH" ] || conclude 0 "not started: $KILL_SWITCH is there"
  trap 'say "asked to stop"; touch "$STOP_FILE"' USR1
  BEFORE=$(progress)
  BDPO_HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  BDPO_TAIL=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tail -n 1)
  export BDPO_HEAD BDPO_TAIL
  say "job $SLURM_JOB_ID, attempt $ATTEMPT, $TASK on $SLURM_JOB_NODELIST: $RUN_DIR, step $(last_checkpoint)"
  preflight
  if [ -e "$STOP_FILE" ]; then again "stopped before it began"; fi
  rm -f "$BDPO_STATUS_FILE"
  launch "$@"
  what_next $?
}

# One job per run directory. `ln` makes the claim in one piece, also over NFS.
claim() {
  local claim=$CONTROL/job owner
  echo "$SLURM_JOB_ID" > "$claim.$TAG"
  if ! ln "$claim.$TAG" "$claim" 2> /dev/null; then
    owner=$(cat "$claim")
    if [ "$owner" != "$SLURM_JOB_ID" ] && is_queued "$owner"; then
      rm -f "$claim.$TAG"
      die "refused: job $owner is using $RUN_DIR. Cancel it (scancel $owner), or set another RUN_DIR."
    fi
    mv -f "$claim.$TAG" "$claim"
    [ "$(cat "$claim")" = "$SLURM_JOB_ID" ] || die "refused: another job took $RUN_DIR just now."
  fi
  rm -f "$claim.$TAG"
}

# Whether a job may still run. Where the controller does not answer, it may.
is_queued() {
  local answer
  answer=$(squeue --noheader --job "$1" --format %T 2>&1) || [[ $answer != *"Invalid job id"* ]] || return 1
  [ -n "$answer" ]
}

last_checkpoint() { cat "$RUN_DIR/latest_checkpointed_iteration.txt" 2> /dev/null || echo 0; }

# Changes whenever something was gained: a checkpoint, or files of tokens and reference values.
progress() { echo "$(last_checkpoint) $(find "$RUN_DIR/cache" -type f ! -name '*.partial' 2> /dev/null | wc -l)"; }

# A field of the run's status file; empty where there is none.
status() { sed -nE "s/.*\"$1\": \"?(([^\"\\\\,}]|\\\\.)*).*/\1/p" "$BDPO_STATUS_FILE" 2> /dev/null; }
place() { [ "$(status of)" = 0 ] || echo ", step $(status step) of $(status of)"; }

# Start in the background and wait: a trap runs only between commands, and ends `wait` early.
in_background() {
  local pid code
  "$@" & pid=$!
  while :; do
    wait $pid; code=$?
    kill -0 $pid 2> /dev/null || return $code
  done
}

# srun_nodes LOG COMMAND...: once on every node, in the container if there is one.
srun_nodes() {
  local log=$1 container=(); shift
  [ -z "$BDPO_CONTAINER" ] || container=(--container-image="$BDPO_CONTAINER" --no-container-mount-home
    --container-mounts="$BDPO_HOME:$BDPO_HOME,$RUN_DIR:$RUN_DIR${BDPO_CONTAINER_MOUNTS:+,$BDPO_CONTAINER_MOUNTS}")
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}    # srun no longer takes it from the job
  in_background srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --output="$LOGS/$log" "${srun_options[@]}" \
    ${container[0]+"${container[@]}"} bash "$BDPO_HOME/slurm/lib.sh" "$@" 2> "$LOGS/srun.log"
  local code=$?
  cat "$LOGS/srun.log" >&2
  return $code
}

# Each node is looked at by itself; those that do not say they are well are left out of the next attempt.
preflight() {
  local node bad=() srun_options=(--kill-on-bad-exit=0)
  mkdir -p "$LOGS/well"
  srun_nodes preflight-%N.log preflight
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    [ -e "$LOGS/well/$node" ] || bad+=("$node")
  done
  if [ ${#bad[@]} -gt 0 ]; then
    for node in "${bad[@]}"; do say "preflight: $node: $(tail -n 1 "$LOGS/preflight-$node.log" 2> /dev/null)"; done
    EXCLUDE=$(IFS=,; echo "${bad[*]}")
    again "preflight failed on $EXCLUDE"
  fi
}

# launch PROGRAM ARGUMENT...: one torchrun per node.
launch() {
  local srun_options=(--kill-on-bad-exit=1 --wait=60)
  BDPO_RENDEZVOUS=$TAG
  BDPO_PORT=$((20000 + (SLURM_JOB_ID * 8 + ATTEMPT) % 20000))
  export BDPO_RENDEZVOUS BDPO_PORT
  say "logs: $LOGS"
  srun_nodes %N.log node "$@" --save "$RUN_DIR" --load "$RUN_DIR" --stop-file "$STOP_FILE" "$KILL_SWITCH"
}

# what_next EXIT_CODE: of srun.
what_next() {
  case $(status state) in
    finished) conclude 0 "finished$(place)" ;;
    refused) conclude 2 "refused, not tried again: $(status reason)" ;;
  esac
  if [ -e "$KILL_SWITCH" ]; then conclude 0 "stopped by $KILL_SWITCH at step $(last_checkpoint); remove it and submit again to go on"; fi
  if [ -e "$STOP_FILE" ] || [ "$(status state)" = stopped ]; then again "stopped, checkpoint of step $(last_checkpoint)"; fi
  again "crashed, last checkpoint of step $(last_checkpoint): $(cause "$1")"
}

# The first failure that any torchrun has seen, and what that rank said. Of several in one second a signal comes first:
# that its peers then lose the connection is the consequence.
cause() {
  local host rank code words=''
  read -r _ _ host rank code < <(awk '
    /Root Cause/ { inside = 1 }
    inside && $2 == ":" { value[$1] = $3 }
    inside && $1 == "exitcode" { print value["time"], ($3 > 0), value["host"], value["rank"], $3; inside = 0 }
  ' "$LOGS"/*.log | sort | head -n 1)
  if [ "${code:-1}" -gt 0 ]; then
    words=$(grep -hsE "^(\[rank${rank:-[0-9]+}\]: )?([A-Za-z_.]*(Error|Exception)|error): ?" "$LOGS"/*.log | head -n 1)
  fi
  local where
  if [ -n "$code" ]; then where="rank $rank on $host ended with $code"; else where=$(first_torchrun); fi
  echo "${where:-srun ended with $1}${words:+: $words}"
}

# The torchrun that ended first, where none told of a rank. srun's own code is the highest of all: those it killed then count.
first_torchrun() {
  sed -nE 's/^srun: error: ([^ :]+): tasks? [^:]*: (Exited with exit code |)(.*)/torchrun on \1 ended with \3/p' "$LOGS/srun.log" | head -n 1
}

# again WHY: requeue, unless too many attempts in a row have gained nothing.
again() {
  local stalled=0
  if [ "$(progress)" = "$BEFORE" ]; then stalled=$(($(cat "$CONTROL/stalled" 2> /dev/null || echo 0) + 1)); fi
  echo "$stalled" > "$CONTROL/stalled"
  if [ "$stalled" -ge "$BDPO_MAX_STALLED" ]; then
    rm -f "$CONTROL/stalled"
    conclude 1 "gave up after $stalled attempts without progress: $1"
  fi
  [ "$BDPO_REQUEUE" = 1 ] || conclude 75 "$1; submit again to go on"
  note "$1; requeued${EXCLUDE:+ without $EXCLUDE}"
  [ -z "${EXCLUDE:-}" ] || trap '' TERM # the requeue ends this shell, but not before the node is left out
  scontrol requeue "$SLURM_JOB_ID" || conclude 1 "$1; could not be requeued"
  [ -z "${EXCLUDE:-}" ] || exclude "$EXCLUDE"
  [ -n "${EXCLUDE:-}" ] || sleep 600
  exit
}

# Refused as long as the job runs, so until the requeue has taken hold.
exclude() {
  local before try
  before=$(scontrol show job "$SLURM_JOB_ID" | sed -nE 's/.*ExcNodeList=([^ ]*).*/\1/p' | grep -v '(null)')
  for try in {1..60}; do
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="${before:+$before,}$1" 2> /dev/null && return
    sleep 0.5
  done
  say "$1 could not be left out after $try attempts"
}

# One line, to the job's log and to the run's history.
note() { say "job $SLURM_JOB_ID, attempt $ATTEMPT: $1" | tee -a "$CONTROL/history"; }
conclude() { note "$2"; exit "$1"; }

# outside_slurm PROGRAM ARGUMENT...: `bash slurm/bdpo_70b.sh --dry-run` checks the job here, on one CPU process.
outside_slurm() {
  local nodes
  [[ " $* " == *" --dry-run "* ]] || die "submit this with sbatch, or check the job here first: bash $0 --dry-run"
  nodes=${SBATCH_NODES:-$(sed -n 's/^#SBATCH --nodes=//p' "$0")}
  cd "$BDPO_HOME" || die "no directory: $BDPO_HOME"
  exec "$BDPO_PYTHON" "$@" --dry-run $((nodes * BDPO_RANKS_PER_NODE)) --gpus-per-node "$BDPO_RANKS_PER_NODE" --save "$RUN_DIR" --load "$RUN_DIR"
}

# ---- on every node ------------------------------------------------------------------------------------------------------

# Says that this node is well by leaving a file, or why it is not in the last line of its log.
on_preflight() {
  if [ "$BDPO_DEVICE" = gpu ]; then
    local found
    found=$(nvidia-smi --list-gpus 2>&1 | grep -c '^GPU')
    [ "$found" -ge "$BDPO_RANKS_PER_NODE" ] || die "nvidia-smi sees $found GPUs, not $BDPO_RANKS_PER_NODE"
    ! dmesg --since '1 hour ago' 2> /dev/null | grep 'NVRM: Xid' || die "the driver has reported an Xid in the last hour"
    timeout 300 "$BDPO_PYTHON" - <<'PYTHON' || die "a GPU does not compute"
import torch
for index in range(torch.cuda.device_count()):
    ones = torch.ones(4096, 4096, device=f"cuda:{index}", dtype=torch.bfloat16)
    assert (ones @ ones).float().mean().item() == 4096, f"GPU {index} computes wrongly"
PYTHON
  fi
  network
  (cd "$BDPO_HOME" && timeout 300 "$BDPO_PYTHON" -c 'import megatron_bdpo') || die "$BDPO_PYTHON cannot import megatron_bdpo"
  if [ -n "$BDPO_PREFLIGHT" ]; then bash -c "$BDPO_PREFLIGHT" || die "BDPO_PREFLIGHT failed: $BDPO_PREFLIGHT"; fi
  touch "$LOGS/well/$SLURMD_NODENAME" || die "the run directory cannot be written from here"
}

# The interface that gloo is to use, in GLOO_SOCKET_IFNAME; or why those that are set cannot be used. By itself gloo takes
# the address that the node's own name has, which on many clusters is the loopback's or that of another network. What
# NCCL is told names beginnings of interfaces, "=" whole ones, "^" those to leave out.
network() {
  [ "${SLURM_NNODES:-1}" -gt 1 ] || return 0
  local peer=$BDPO_HEAD answer
  [ "${SLURM_NODEID:-0}" != 0 ] || peer=$BDPO_TAIL
  answer=$("$BDPO_PYTHON" - "$peer" 2>&1 <<'PYTHON'
import fcntl, os, socket, struct, sys
here = [name for _, name in socket.if_nameindex()]
gloo, nccl = os.environ.get("GLOO_SOCKET_IFNAME", ""), os.environ.get("NCCL_SOCKET_IFNAME", "")
missing = [f"GLOO_SOCKET_IFNAME={name}" for name in filter(None, gloo.split(",")) if name not in here]
names, whole = nccl.lstrip("=").split(","), nccl.startswith("=")
if nccl and not nccl.startswith("^") and not any(name == each or not whole and each.startswith(name) for name in names for each in here):
    missing.append(f"NCCL_SOCKET_IFNAME={nccl}")
if missing:
    sys.exit(f"{', '.join(missing)}: no such interface; there are {' '.join(here)}. Set one that all nodes have, in slurm/site.sh")
if gloo:
    sys.exit(print(gloo))
try:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:  # sends nothing: the kernel chooses the way there
        asking.connect((sys.argv[1], 9))
        own, names = asking.getsockname()[0], []
        for name in here:
            try:
                answer = fcntl.ioctl(asking, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            except OSError:  # it has no address
                continue
            names += [name] * (socket.inet_ntoa(answer[20:24]) == own)
    print(names[0] if names else "")
except OSError as error:
    sys.exit(f"there is no way to {sys.argv[1]} ({error}). Set GLOO_SOCKET_IFNAME in slurm/site.sh to the interface that gloo is to use")
PYTHON
  ) || die "$answer"
  [ -z "$answer" ] || export GLOO_SOCKET_IFNAME=$answer
}

# on_node PROGRAM ARGUMENT...: this node's torchrun.
on_node() {
  local is_head=0 scratch=${TMPDIR:-/tmp}/bdpo-$BDPO_RENDEZVOUS
  [ "$SLURM_NODEID" != 0 ] || is_head=1
  export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(threads)}
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}          # Megatron asserts it with TP or CP
  # Hopper: leave SMs to communication that overlaps with the norms; no NVLink SHARP, which takes memory.
  export NVTE_FWD_LAYERNORM_SM_MARGIN=${NVTE_FWD_LAYERNORM_SM_MARGIN:-20} NVTE_BWD_LAYERNORM_SM_MARGIN=${NVTE_BWD_LAYERNORM_SM_MARGIN:-20}
  export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0} NCCL_GRAPH_REGISTER=${NCCL_GRAPH_REGISTER:-0}
  export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1} TORCH_NCCL_HIGH_PRIORITY=${TORCH_NCCL_HIGH_PRIORITY:-1}
  # After a time-out every rank leaves its last 2,000 collectives beside the logs.
  export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-2000} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}
  export TORCH_NCCL_DEBUG_INFO_TEMP_FILE=${TORCH_NCCL_DEBUG_INFO_TEMP_FILE:-$LOGS/nccl_trace_rank_}
  export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$scratch/triton} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}
  export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}  # a checkpoint takes longer than 30 s
  cd "$BDPO_HOME" || die "$BDPO_HOME is not there on $SLURMD_NODENAME"
  network
  # Naming address and head spares torchrun reverse DNS look-ups, which hang for half a minute where there is no DNS.
  exec "$BDPO_PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "$BDPO_RANKS_PER_NODE" --max-restarts 0 \
    --rdzv-id "$BDPO_RENDEZVOUS" --rdzv-backend c10d --rdzv-endpoint "$BDPO_HEAD:$BDPO_PORT" --rdzv-conf "is_host=$is_head" \
    --local-addr "$SLURMD_NODENAME" "$@"
}

threads() {
  local each=$((${SLURM_CPUS_ON_NODE:-1} / BDPO_RANKS_PER_NODE))
  echo $((each > 1 ? each : 1))
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  case ${1:-} in
    preflight | node) "on_$1" "${@:2}" ;;
    *) die "this file is for the batch scripts beside it" ;;
  esac
fi
