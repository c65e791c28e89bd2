# shellcheck shell=bash
# One job per run directory.
#
# The claims of a run directory are files claim.1, claim.2, ... that hold a job's number; the last one counts and none is
# ever removed. A job that finds the last owner gone links the next number: `ln` makes a name once, also over NFS, so of all
# that saw the same owner go, one succeeds it, and the others find a claim of a job that is alive.

claim() {
  local own=$CONTROL/.claim.$TAG.$$ last=0 tries=0 owner
  if ! mkdir -p "$CONTROL/claims" || ! echo "$SLURM_JOB_ID" > "$own"; then die "RUN_DIR=$RUN_DIR cannot be written."; fi
  while :; do
    while [ -e "$CONTROL/claims/claim.$((last + 1))" ]; do last=$((last + 1)); done
    if [ "$last" -gt 0 ]; then
      owner=$(cat "$CONTROL/claims/claim.$last")
      if [ "$owner" = "$SLURM_JOB_ID" ]; then break; fi
      if is_queued "$owner"; then
        rm -f "$own"
        die "refused: job $owner is using $RUN_DIR. Cancel it (scancel $owner), or set another RUN_DIR."
      fi
    fi
    ln "$own" "$CONTROL/claims/claim.$((last + 1))" 2> /dev/null && break
    [ ! -e "$CONTROL/claims/claim.$((last + 1))" ] || continue    # another was first
    # There are no links here; or another's is not seen yet, which over NFS may take some seconds.
    [ $((tries += 1)) -le 30 ] || die "refused: no claim can be made in $CONTROL/claims: does its file system have hard links?"
    sleep 1
  done
  rm -f "$own"
}

# A node that was cut off from the network may go on with an attempt that SLURM has long begun anew elsewhere. Its ranks see their
# stop file, and its batch script that it is no longer the one that decides.
succeed() {
  local before
  before=$(cat "$CONTROL/current" 2> /dev/null)
  [ "${before:-$TAG}" = "$TAG" ] || touch "$CONTROL/stop.$before"
  echo "$TAG" > "$CONTROL/current"
}
leave_if_succeeded() {
  local now
  now=$(cat "$CONTROL/current" 2> /dev/null)    # unreadable where the file system is away: that succeeds nobody
  [ "${now:-$TAG}" = "$TAG" ] || die "attempt $TAG ends here: $now has gone on from it."
}

# Whether a job may still run. Where the controller does not answer, it may.
is_queued() {
  local answer
  answer=$(squeue --noheader --job "$1" --format %T 2>&1) || [[ $answer != *"Invalid job id"* ]] || return 1
  [ -n "$answer" ]
}
