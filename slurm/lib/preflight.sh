# shellcheck shell=bash disable=SC2034  # srun_options are read by on_all_nodes
# Looking at the nodes before a launch, and which of them are left out of the next attempt.

# ---- the batch script ---------------------------------------------------------------------------------------------------

# Returns when all nodes are well, or when a stop is asked for. Few bad nodes, or faults of a node's own GPUs: requeued without
# them. More than may be left out, or all: the cause is one that they share, which passes; they are looked at again, later and
# later. Of a job of one node nobody can tell: after all these looks it is the node's.
preflight() {
  local tries=1 wait=$BDPO_PREFLIGHT_WAIT bad=() own=() names
  while :; do
    look_at_nodes
    [ ${#bad[@]} -gt 0 ] || look_at_links
    [ ${#bad[@]} -gt 0 ] && [ ! -e "$STOP_FILE" ] || return 0
    names=$(IFS=,; echo "${bad[*]}")
    if [ ${#bad[@]} -le "$(most_left_out)" ] && { [ "$SLURM_NNODES" -gt 1 ] || [ "$tries" -ge "$BDPO_PREFLIGHT_TRIES" ]; }; then
      own=("${bad[@]}")
    fi
    if [ ${#own[@]} -eq ${#bad[@]} ] || [ "$tries" -ge "$BDPO_PREFLIGHT_TRIES" ]; then break; fi
    say "preflight: ${#bad[@]} of $SLURM_NNODES nodes fail: a cause that they share is waited for, $wait s"
    pause "$wait"
    tries=$((tries + 1)) wait=$((wait * 2))
  done
  [ ${#own[@]} -eq 0 ] || strike "${own[@]}"
  again "preflight failed on $names"
}

# Fills `bad` with the nodes that do not say that they are well, `own` with those of them that say that it is theirs alone. Each
# looks at itself.
look_at_nodes() {
  local node srun_options=(--kill-on-bad-exit=0)
  rm -rf "$LOGS/well" "$LOGS/own"
  mkdir -p "$LOGS/well" "$LOGS/own"
  on_all_nodes 1800 preflight-%N.log preflight
  bad=() own=()
  for node in $(nodes); do
    [ -e "$LOGS/well/$node" ] || bad+=("$node")
    [ ! -e "$LOGS/own/$node" ] || own+=("$node")
  done
  [ ! -e "$STOP_FILE" ] || return 0
  for node in ${bad[0]+"${bad[@]}"}; do say "preflight: $node: $(tail -n 1 "$LOGS/preflight-$node.log" 2> /dev/null)"; done
}

# Fills `bad` with the nodes that no neighbour can exchange data with, or only slowly. See links.py.
look_at_links() {
  local node said srun_options=(--kill-on-bad-exit=0)
  [ "$BDPO_LINKS" = 1 ] || return 0
  [ "$SLURM_NNODES" -gt 1 ] || [ "$BDPO_DEVICE" = gpu ] || return 0    # it has none
  rm -rf "$LOGS/links"
  mkdir -p "$LOGS/links"
  on_all_nodes $((BDPO_LINKS_SECONDS * 6 + 180)) links-%N.log links
  [ ! -e "$STOP_FILE" ] || return 0
  while read -r node said; do
    say "preflight: $node: $said"
    bad+=("$node")
  done < <(judge_links)
}

# The nodes whose best exchange failed, or ran at less than a quarter of the median's rate: NODE, and what is the matter.
judge_links() {
  local node
  for node in $(nodes); do
    awk -v node="$node" '
      $2 == "failed" { $2 = ""; why = why ($1 " ") ; next }
      $2 > best { best = $2 }
      END { print node, best + 0, NR ? "no exchange with " why : "no answer" }
    ' "$LOGS/links/$node" 2> /dev/null || echo "$node 0 no answer"
  done | sort -k2,2n | awk '
    { name[NR] = $1; rate[NR] = $2; why[NR] = $0; sub(/^[^ ]+ [^ ]+ +/, "", why[NR]); sub(/ +$/, "", why[NR]) }
    END {
      middle = rate[int((NR + 1) / 2) + (NR % 2 == 0)]
      for (i = 1; i <= NR; i++) {
        if (rate[i] == 0) print name[i], why[i]
        else if (rate[i] < middle / 4) printf "%s exchanges %.3g GB/s, where %.3g are usual\n", name[i], rate[i], middle
      }
    }'
}

nodes() { scontrol show hostnames "$SLURM_JOB_NODELIST"; }

# pause SECONDS: or until a stop is asked for.
pause() {
  local end=$((SECONDS + $1))
  while [ $SECONDS -lt $end ] && [ ! -e "$STOP_FILE" ]; do sleep 1; done
}

# ---- strikes: which nodes are left out, and for how long ----------------------------------------------------------------

# No more nodes than this share of the allocation are left out at a time; one at least.
most_left_out() {
  local most=$((SLURM_NNODES * BDPO_EXCLUDE_PERCENT / 100))
  echo $((most > 1 ? most : 1))
}

strike() {
  local node
  for node in "$@"; do echo "$(date +%s) $node $TAG" >> "$CONTROL/strikes"; done
}

# The nodes that are left out now, one a line. A strike counts for a day; a node is left out for an hour after its last one, and
# for as many hours as it has strikes. Those with most strikes come first, as many as may be, and as the partition can spare.
left_out() {
  local most spare
  [ -s "$CONTROL/strikes" ] || return 0
  most=$(most_left_out)
  spare=$(spare_nodes)
  awk -v now="$(date +%s)" -v minutes="$BDPO_STRIKE_MINUTES" '
    now - $1 < 86400 { count[$2]++; last[$2] = $1 }
    END { for (node in count) if (now - last[node] < 60 * minutes * count[node]) print count[node], last[node], node }
  ' "$CONTROL/strikes" | sort -k1,1nr -k2,2nr | head -n $((spare < most ? spare : most)) | awk '{ print $3 }'
}

# How many nodes of the partition can be done without. With none a job that leaves a node out would wait for ever: nobody is
# there to lift what a waiting job excludes.
spare_nodes() {
  local usable
  usable=$(sinfo --noheader --Node --partition "$SLURM_JOB_PARTITION" --format '%N %t' 2> /dev/null |
    awk '$2 ~ /^(idle|alloc|mix|comp|plnd|resv)[~#]?$/ { print $1 }' | sort -u | grep -vcxF -e "$(excluded_by_user)")
  if [ "$usable" -eq 0 ]; then echo "$SLURM_NNODES"; else echo $((usable > SLURM_NNODES ? usable - SLURM_NNODES : 0)); fi
}

# The nodes that the job excludes, without those that this launcher leaves out.
excluded_by_user() {
  local now
  now=$(scontrol show job -o "$SLURM_JOB_ID" 2> /dev/null | sed -nE 's/.* ExcNodeList=([^ ]*).*/\1/p')
  [ -z "$now" ] || [ "$now" = "(null)" ] ||
    scontrol show hostnames "$now" | grep -vxF -e "$(cat "$CONTROL/left_out.$SLURM_JOB_ID" 2> /dev/null)"
}

# ---- on every node ------------------------------------------------------------------------------------------------------

# Xid errors that mean the GPU, its memory, its links or its firmware, by NVIDIA's catalogue (https://docs.nvidia.com/deploy/
# xid-errors, names in open-gpu-kernel-modules' nverror.h): 48 double-bit ECC, 62 PMU halted, 63 and 64 rows remapped and not
# to be, 74 NVLink, 79 fallen off the bus, 92 many single-bit errors, 94 and 95 contained and uncontained ECC, 119 and 120 GSP,
# 140 ECC not recovered, 143 initialization. Not here: what a program may cause (13, 31, 43, 45 and others).
HARDWARE_XIDS="48|62|63|64|74|79|92|94|95|119|120|140|143"

# Says that this node is well by leaving a file, or why it is not in the last line of its log.
on_preflight() {
  local seconds=$BDPO_PREFLIGHT_SECONDS
  remove_old_scratch
  if [ "$BDPO_DEVICE" = gpu ]; then
    touch "$LOGS/own/$SLURMD_NODENAME"
    look_at_gpus
    timeout -k 5 300 "$BDPO_PYTHON" "$LIBRARY/gpus.py" || die "a GPU does not compute"
    rm -f "$LOGS/own/$SLURMD_NODENAME"
  fi
  network
  (cd "$BDPO_HOME" && timeout -k 5 300 "$BDPO_PYTHON" -c 'import megatron_bdpo') || die "$BDPO_PYTHON cannot import megatron_bdpo"
  if [ -n "$BDPO_PREFLIGHT" ]; then
    timeout -k 5 "$seconds" bash -c "$BDPO_PREFLIGHT"
    case $? in
      0) ;;
      124 | 137) die "BDPO_PREFLIGHT took longer than $seconds s: $BDPO_PREFLIGHT" ;;
      *) die "BDPO_PREFLIGHT failed: $BDPO_PREFLIGHT" ;;
    esac
  fi
  touch "$LOGS/well/$SLURMD_NODENAME" || die "the run directory cannot be written from here"
}

# What the driver says of them, since this job began on its first nodes.
look_at_gpus() {
  local found listed xid
  listed=$(timeout -k 5 "$BDPO_PREFLIGHT_SECONDS" nvidia-smi --list-gpus 2>&1) ||
    die "nvidia-smi ended with $? (124: no answer in $BDPO_PREFLIGHT_SECONDS s): $(tail -n 1 <<< "$listed")"
  found=$(grep -c '^GPU' <<< "$listed")
  [ "$found" -ge "$BDPO_RANKS_PER_NODE" ] || die "nvidia-smi sees $found GPUs, not $BDPO_RANKS_PER_NODE"
  xid=$(timeout 60 dmesg --since "$(date -d "@$BDPO_BEGAN" '+%F %T')" 2> /dev/null |
    grep -E "NVRM: Xid \([^)]*\): ($HARDWARE_XIDS)," | tail -n 1)
  [ -z "$xid" ] || die "the driver has reported a fault of a GPU: ${xid#*NVRM: }"
}

on_links() {
  ulimit -n "$(ulimit -Hn)"
  network
  cd "$BDPO_HOME" || die "$BDPO_HOME is not there on $SLURMD_NODENAME"
  # shellcheck disable=SC2086  # a word for each
  timeout -k 5 $((BDPO_LINKS_SECONDS * 6 + 120)) "$BDPO_PYTHON" "$LIBRARY/links.py" "$LOGS/links" "$SLURM_NODEID" $BDPO_NODES
}
