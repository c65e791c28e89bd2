# shellcheck shell=bash
# What a run has gained, and what it says of itself.

last_checkpoint() {
  local step
  step=$(cat "$RUN_DIR/latest_checkpointed_iteration.txt" 2> /dev/null)
  case $step in '' | *[!0-9]*) echo 0 ;; *) echo "$step" ;; esac
}

# How many shards of tokens, stores and files of reference values the job's ranks have completed, wherever their caches lie.
# Each rank leaves the names (megatron_bdpo/artifact.py). One that is made again, because its cache went with the node, is
# no gain.
completed() { cat "$BDPO_COMPLETED_DIR"/* 2> /dev/null | sort -u | wc -l; }

# Whether there is more than at the beginning of this attempt.
begin_to_count() { STEP_BEFORE=$(last_checkpoint) COMPLETED_BEFORE=$(completed); }
has_gained() { [ "$(last_checkpoint)" -gt "$STEP_BEFORE" ] || [ "$(completed)" -gt "$COMPLETED_BEFORE" ]; }

# A field of the run's status file, a string or a number; empty where there is none.
status() {
  sed -nE 's/.*"'"$1"'": ("(([^"\\]|\\.)*)"|([^",}]*)).*/\2\4/p' "$BDPO_STATUS_FILE" 2> /dev/null | sed -E '/^null$/d; s/\\(["\\\/])/\1/g'
}
place() { [ "$(status of)" = 0 ] || echo ", step $(status step) of $(status of)"; }
