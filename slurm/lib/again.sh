# shellcheck shell=bash
# What comes after an attempt: the end, another start on the same nodes, or a requeue; and who is told.

# what_next EXIT_CODE: of srun.
what_next() {
  case $(status state) in
    finished) conclude 0 finished "finished$(place)" ;;
    refused) conclude 2 refused "refused, not tried again: $(status reason)" ;;
  esac
  if [ -e "$KILL_SWITCH" ]; then conclude 0 stopped "stopped by $KILL_SWITCH at step $(last_checkpoint); remove it and submit again to go on"; fi
  if is_asked_to_stop; then again "stopped, checkpoint of step $(last_checkpoint)"; fi
  again "$(what_happened "$1")"
}

is_asked_to_stop() { [ -e "$STOP_FILE" ] || [ "$(status state)" = stopped ]; }

# restarts_here EXIT_CODE: whether a crash is followed by another start in this allocation. The preflight looks at its nodes before.
restarts_here() {
  case $(status state) in finished | refused) return 1 ;; esac
  if [ -e "$KILL_SWITCH" ] || is_asked_to_stop || [ "$RESTART" -ge "$BDPO_RESTARTS" ]; then return 1; fi
  local what
  what=$(what_happened "$1")
  note "$what; restarted on the same nodes"
  notify restarted "$what"
  RESTART=$((RESTART + 1))
  LOGS=$CONTROL/logs/$TAG+$RESTART
  mkdir -p "$LOGS"
}

what_happened() {
  local why phase
  if [ "$(status state)" = hung ] || [ -n "$(status cause)" ]; then
    why=$(status cause) phase=$(status phase)
    echo "hung${phase:+ in $phase}, last checkpoint of step $(last_checkpoint): ${why:-$(status reason)}"
  else
    echo "crashed, last checkpoint of step $(last_checkpoint): $(cause "$1")"
  fi
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
  local stalled=0 names
  leave_if_succeeded
  has_gained || stalled=$(($(cat "$CONTROL/stalled" 2> /dev/null || echo 0) + 1))
  echo "$stalled" > "$CONTROL/stalled"
  if [ "$stalled" -ge "$BDPO_MAX_STALLED" ]; then
    rm -f "$CONTROL/stalled"
    conclude 1 gave_up "gave up after $stalled attempts without progress: $1"
  fi
  [ "$BDPO_REQUEUE" = 1 ] || conclude 75 stopped "$1; submit again to go on"
  names=$(left_out | paste -sd,)
  note "$1; requeued${names:+ without $names}"
  notify requeued "$1"
  requeue "$1" "$names"
}

# requeue WHY NODES: and leave these out. A controller that is restarted or busy refuses for a while.
requeue() {
  local try wait=$BDPO_RETRY_SECONDS excluded
  excluded=$(new_exclusions "$2")
  [ -z "$excluded" ] || trap '' TERM # the requeue ends this shell, but not before the nodes are left out
  for try in 1 2 3 4 5 6; do
    scontrol requeue "$SLURM_JOB_ID" && break
    [ "$try" -lt 6 ] || conclude 1 gave_up "$1; could not be requeued in $try tries"
    say "not requeued, tried again in $wait s"
    sleep "$wait"
    wait=$((wait * 2))
  done
  if [ -n "$excluded" ]; then exclude "${excluded#=}" "$2"; else sleep 600; fi
  exit
}

# "=" and the job's new list of excluded nodes: those of the user, and these. Empty where it stays as it is.
new_exclusions() {
  local users before after
  users=$(excluded_by_user)
  before=$(printf '%s\n' "$users" "$(cat "$CONTROL/left_out.$SLURM_JOB_ID" 2> /dev/null)" | grep . | sort -u | paste -sd,)
  after=$(printf '%s\n' "$users" "$(tr ',' '\n' <<< "$1")" | grep . | sort -u | paste -sd,)
  [ "$after" = "$before" ] || echo "=$after"
}

# exclude ALL OURS. Refused as long as the job runs, so until the requeue has taken hold.
exclude() {
  local try
  for try in {1..60}; do
    if scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$1" 2> /dev/null; then
      tr ',' '\n' <<< "$2" > "$CONTROL/left_out.$SLURM_JOB_ID"
      return
    fi
    sleep 0.5
  done
  say "the excluded nodes could not be changed to '$1' after $try tries"
}

# ---- who is told --------------------------------------------------------------------------------------------------------

# One line, to the job's log and to the run's history.
note() { say "job $SLURM_JOB_ID, attempt $ATTEMPT: $1" | tee -a "$CONTROL/history"; }

# conclude EXIT_CODE STATE WORDS
conclude() { note "$3"; notify "$2" "$3"; exit "$1"; }

# notify STATE CAUSE: the user's command, which may be slow or broken.
notify() {
  [ -n "$BDPO_NOTIFY" ] || return 0
  local seconds=${BDPO_NOTIFY_SECONDS:-30}
  [ -z "${DEADLINE:-}" ] || [ $((DEADLINE - $(date +%s))) -gt $((4 * seconds)) ] || seconds=3 # what comes next cannot wait
  BDPO_STATE=$1 BDPO_CAUSE=$2 BDPO_STEP=$(last_checkpoint) BDPO_STEPS=$(status of) BDPO_RUN=$RUN_DIR BDPO_JOB=$SLURM_JOB_ID \
    BDPO_ATTEMPT=$ATTEMPT timeout -k 5 "$seconds" bash -c "$BDPO_NOTIFY" < /dev/null >&2 ||
    say "BDPO_NOTIFY ended with $? (124: not done in $seconds s)"
}
