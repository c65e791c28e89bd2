#!/usr/bin/env bash
# What the batch scripts share: settings, and an attempt from its claim to what comes after it. Sourced by them on the
# first node; run as `lib.sh preflight`, `lib.sh links` and `lib.sh node ...` on every node. See README.md.
set -u -o pipefail

say() { echo "bdpo: $*"; }
die() { echo "bdpo: $*" >&2; exit 2; }

LIBRARY=$(dirname "${BASH_SOURCE[0]}")/lib
# shellcheck source=slurm/lib/claim.sh
. "$LIBRARY/claim.sh"
# shellcheck source=slurm/lib/progress.sh
. "$LIBRARY/progress.sh"
# shellcheck source=slurm/lib/preflight.sh
. "$LIBRARY/preflight.sh"
# shellcheck source=slurm/lib/container.sh
. "$LIBRARY/container.sh"
# shellcheck source=slurm/lib/nodes.sh
. "$LIBRARY/nodes.sh"
# shellcheck source=slurm/lib/again.sh
. "$LIBRARY/again.sh"

# ---- settings: the environment, then slurm/site.sh, then these defaults -------------------------------------------------

settings() {
  BDPO_SITE=${BDPO_SITE:-$BDPO_HOME/slurm/site.sh}
  # shellcheck source=slurm/site.example.sh
  if [ -r "$BDPO_SITE" ]; then . "$BDPO_SITE"; fi
  : "${BDPO_PYTHON:=$BDPO_HOME/.venv/bin/python}"
  : "${RUN_DIR:=$BDPO_HOME/runs/${SLURM_JOB_NAME:-$(basename "$0" .sh)}}"
  [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || RUN_DIR=$RUN_DIR/task-$SLURM_ARRAY_TASK_ID    # every task is a run of its own
  : "${BDPO_RANKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-8}}"
  : "${BDPO_DEVICE:=gpu}"               # cpu: for trials
  : "${BDPO_CONTAINER:=}" "${BDPO_CONTAINER_MOUNTS:=}" "${BDPO_CONTAINER_RUNTIME:=pyxis}"
  : "${BDPO_CONTAINER_CACHE:=$BDPO_HOME/runs/images}"
  : "${BDPO_PREFLIGHT:=}" "${BDPO_PREFLIGHT_SECONDS:=120}"
  : "${BDPO_PREFLIGHT_TRIES:=5}" "${BDPO_PREFLIGHT_WAIT:=30}"    # 30 + 60 + 120 + 240 s for a cause that nodes share
  : "${BDPO_LINKS:=1}" "${BDPO_LINKS_SECONDS:=60}"
  : "${BDPO_EXCLUDE_PERCENT:=25}" "${BDPO_STRIKE_MINUTES:=60}"
  : "${BDPO_RESTARTS:=1}"               # starts after a crash in the same allocation
  : "${BDPO_MAX_STALLED:=3}"            # attempts in a row without progress before giving up
  : "${BDPO_REQUEUE:=1}"                # 0: exit with 75 instead, for a chain of dependent jobs
  : "${BDPO_RETRY_SECONDS:=10}"         # before a refused requeue is tried again; then twice that, ...
  : "${BDPO_LAST_SECONDS:=45}"          # before the time limit a job that was asked to stop and has not, is requeued
  : "${BDPO_NOTIFY:=}"
  export BDPO_HOME BDPO_PYTHON RUN_DIR BDPO_RANKS_PER_NODE BDPO_DEVICE BDPO_PREFLIGHT BDPO_PREFLIGHT_SECONDS BDPO_LINKS_SECONDS
  [ -n "$BDPO_CONTAINER" ] || [ -x "$BDPO_PYTHON" ] ||
    die "BDPO_PYTHON=$BDPO_PYTHON is not a program. Run 'make install' in $BDPO_HOME, or name another in $BDPO_SITE."
}

# ---- the batch script ---------------------------------------------------------------------------------------------------

# bdpo_run TASK PROGRAM ARGUMENT...: train or score, to the end, to a stop, or to giving up. After `settings`. Does not return.
bdpo_run() {
  local code
  TASK=$1; shift
  [ -n "${SLURM_JOB_ID:-}" ] || outside_slurm "$@"
  ATTEMPT=${SLURM_RESTART_COUNT:-0}
  RESTART=0
  TAG=$SLURM_JOB_ID.$ATTEMPT
  CONTROL=$RUN_DIR/slurm/$TASK             # what this script remembers between attempts
  LOGS=$CONTROL/logs/$TAG
  STOP_FILE=$CONTROL/stop.$TAG                  # a stale attempt cannot stop a newer one, nor the other way round
  KILL_SWITCH=$RUN_DIR/STOP
  BDPO_STATUS_FILE=$CONTROL/status.json
  [ "$TASK" != train ] || BDPO_STATUS_FILE=$RUN_DIR/status.json
  BDPO_COMPLETED_DIR=$CONTROL/completed
  export LOGS BDPO_STATUS_FILE BDPO_COMPLETED_DIR
  trap 'ask_to_stop' USR1
  make_directories
  claim
  succeed
  [ "$(status state)" != finished ] || conclude 0 finished "finished already$(place); remove $BDPO_STATUS_FILE to go on from there"
  [ ! -e "$KILL_SWITCH" ] || conclude 0 stopped "not started: $KILL_SWITCH is there"
  begin_to_count
  BDPO_BEGAN=$(began)
  BDPO_NODES=$(nodes | paste -sd' ')
  BDPO_HEAD=${BDPO_NODES%% *} BDPO_TAIL=${BDPO_NODES##* }
  BDPO_PASS_ON=$(scontrol show config | grep -c '^ProctrackType *= proctrack/cgroup')
  export BDPO_BEGAN BDPO_NODES BDPO_HEAD BDPO_TAIL BDPO_PASS_ON
  container
  say "job $SLURM_JOB_ID, attempt $ATTEMPT, $TASK on $SLURM_JOB_NODELIST: $RUN_DIR, step $(last_checkpoint)"
  while :; do
    set_ports
    preflight
    if [ -e "$STOP_FILE" ]; then again "stopped before it began"; fi
    rm -f "$BDPO_STATUS_FILE"
    launch "$@"; code=$?
    leave_if_succeeded
    restarts_here $code || what_next $code
  done
}

# A file system that is away for a minute comes back.
make_directories() {
  local wait
  for wait in 5 10 20 40 80 0; do
    mkdir -p "$LOGS" "$BDPO_COMPLETED_DIR" && return
    [ "$wait" = 0 ] || { say "RUN_DIR=$RUN_DIR cannot be written; tried again in $wait s"; sleep "$wait"; }
  done
  die "RUN_DIR=$RUN_DIR cannot be written."
}

# When this job began, in all of its attempts.
began() {
  local file=$CONTROL/began.$SLURM_JOB_ID
  [ -s "$file" ] || date +%s > "$file"
  cat "$file"
}

# Sixteen ports for each job, below those that the kernel hands out to others (net.ipv4.ip_local_port_range, from 32768 on).
# The first eight are for the rendezvous of each start, the others for what tries the links.
set_ports() {
  local base=$((20000 + (SLURM_JOB_ID * 2 + ATTEMPT) % 798 * 16))
  BDPO_RENDEZVOUS_PORT=$((base + RESTART % 8)) BDPO_PORT=$((base + 8))
  export BDPO_PORT
}

# On USR1: before the time limit, or from a user.
ask_to_stop() {
  local end
  say "asked to stop"
  touch "$STOP_FILE"
  end=$(scontrol show job -o "$SLURM_JOB_ID" 2> /dev/null | sed -nE 's/.* EndTime=([0-9T:-]+).*/\1/p')
  DEADLINE=$(date -d "${end:-9 years}" +%s)
}

# Start in the background and wait: a trap runs only between commands, and ends `wait` early. Once a stop is asked for, a
# preflight (`ends_on_stop`) is ended, and what has not stopped when the time limit comes is requeued as it is.
in_background() {
  local pid code
  "$@" & pid=$!
  while :; do
    if [ -e "${STOP_FILE:-}" ] && kill -0 $pid 2> /dev/null; then
      [ -z "${ends_on_stop:-}" ] || kill -TERM $pid 2> /dev/null
      [ $((${DEADLINE:-$(date +%s) + 86400} - $(date +%s))) -ge "$BDPO_LAST_SECONDS" ] ||
        again "asked to stop, not done $BDPO_LAST_SECONDS s before the time limit, checkpoint of step $(last_checkpoint)"
      sleep 1
    else
      wait $pid; code=$?
      kill -0 $pid 2> /dev/null || return $code
    fi
  done
}

# on_all_nodes SECONDS LOG COMMAND...: once on every node, in the container if there is one. 0 seconds: without a limit.
on_all_nodes() {
  local seconds=$1 log=$2 limit=() code ends_on_stop=''; shift 2
  [ "$seconds" = 0 ] || { limit=(timeout -k 30 "$seconds") ends_on_stop=1; }
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}    # srun no longer takes it from the job
  in_background ${limit[0]+"${limit[@]}"} srun --nodes="$SLURM_NNODES" --ntasks-per-node=1 --output="$LOGS/$log" "${srun_options[@]}" \
    ${SRUN_CONTAINER[0]+"${SRUN_CONTAINER[@]}"} ${INSIDE[0]+"${INSIDE[@]}"} bash "$BDPO_HOME/slurm/lib.sh" "$@" 2> "$LOGS/srun.log"
  code=$?
  cat "$LOGS/srun.log" >&2
  return $code
}

# launch PROGRAM ARGUMENT...: one torchrun per node.
launch() {
  local srun_options=(--kill-on-bad-exit=1 --wait=60)
  BDPO_RENDEZVOUS=$TAG+$RESTART
  export BDPO_RENDEZVOUS BDPO_RENDEZVOUS_PORT
  say "logs: $LOGS"
  on_all_nodes 0 %N.log node "$@" --save "$RUN_DIR" --load "$RUN_DIR" --stop-file "$STOP_FILE" "$KILL_SWITCH"
}

# outside_slurm PROGRAM ARGUMENT...: `bash slurm/bdpo_70b.sh --dry-run` checks the job here, on one CPU process.
outside_slurm() {
  local nodes
  [[ " $* " == *" --dry-run "* ]] || die "submit this with sbatch, or check the job here first: bash $0 --dry-run"
  nodes=${SBATCH_NODES:-$(sed -n 's/^#SBATCH --nodes=//p' "$0")}
  cd "$BDPO_HOME" || die "no directory: $BDPO_HOME"
  exec "$BDPO_PYTHON" "$@" --dry-run $((nodes * BDPO_RANKS_PER_NODE)) --gpus-per-node "$BDPO_RANKS_PER_NODE" --save "$RUN_DIR" --load "$RUN_DIR"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  case ${1:-} in
    preflight | links | node) "on_$1" "${@:2}" ;;
    *) die "this file is for the batch scripts beside it" ;;
  esac
fi
