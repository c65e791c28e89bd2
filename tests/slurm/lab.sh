#!/usr/bin/env bash
# A real SLURM cluster (munged, slurmctld, NODES x slurmd) in private namespaces of this machine, up in a second.
#
#   lab.sh up                  write the configuration, start NODES nodes, wait until all are idle
#   lab.sh exec CMD...         run CMD on the login node (sbatch, squeue, scontrol ...)
#   lab.sh on node2 CMD...     run CMD on a compute node
#   lab.sh kill-node node2     power a node off: its processes die, its network vanishes
#   lab.sh start-node node2    bring it back
#   lab.sh down                stop everything
#
# Each node has its own PID, network, UTS and mount namespace: own hostname, own address (10.77.0.0/24 on a bridge that
# exists only in the lab), own /tmp and /dev/shm. Everything else is shared, like a cluster's file system. Outside
# nothing is changed: /etc/hosts and /etc/slurm are bind mounts inside, and no interface, process or file stays but $LAB.
# Needs root and the Debian packages slurm-wlm munge iproute2 util-linux.
set -euo pipefail

LAB=${LAB:?a directory for the state of the lab}
NODES=${NODES:-11}
CPUS=64                  # what each node claims; nothing is enforced
GPUS=8                   # fake ones
SLURMD_TIMEOUT=5         # seconds until a silent node is DOWN; real clusters: 300
KILL_WAIT=10             # seconds from SIGTERM to SIGKILL; real clusters: 30
CRED_EXPIRE=5            # a requeued job waits this long + 1; real clusters: 120; less is not accepted
SELF=$(readlink -f "${BASH_SOURCE[0]}")
FREEZER=/sys/fs/cgroup/freezer
# Like a real cluster where a v1 freezer exists.
if [ -w $FREEZER/cgroup.procs ]; then PROCTRACK=cgroup; else PROCTRACK=linuxproc; fi
CGROUP=slurmlab-$(echo -n "$LAB" | cksum | cut -d' ' -f1)
export LAB NODES

die() { echo "lab: $*" >&2; exit 1; }

configure() {
  mkdir -p "$LAB"/{etc/slurm,run,log,state,spool,dev}
  local i
  {
    printf '127.0.0.1 localhost\n10.77.0.1 login\n'
    for ((i = 1; i <= NODES; i++)); do echo "10.77.0.$((10 + i)) node$i"; done
  } > "$LAB/etc/hosts"
  echo "nameserver 127.0.0.1" > "$LAB/etc/resolv.conf"       # no DNS in here: fail at once, not after 10 s
  dd if=/dev/urandom of="$LAB/etc/munge.key" bs=128 count=1 status=none
  chmod 400 "$LAB/etc/munge.key"
  for ((i = 0; i < GPUS; i++)); do                           # gres.conf wants device nodes: twins of /dev/null
    [ -e "$LAB/dev/nvidia$i" ] || mknod "$LAB/dev/nvidia$i" c 1 3
  done
  cat > "$LAB/etc/slurm/slurm.conf" << CONF
ClusterName=lab
SlurmctldHost=login
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$LAB/run/munge.socket,cred_expire=$CRED_EXPIRE
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$LAB/state
SlurmdSpoolDir=$LAB/spool/%n
SlurmctldPidFile=$LAB/run/slurmctld.pid
SlurmdPidFile=$LAB/run/slurmd.%n.pid
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
ProctrackType=proctrack/$PROCTRACK
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
PriorityType=priority/basic
SlurmdTimeout=$SLURMD_TIMEOUT
SlurmctldTimeout=30
MessageTimeout=5
KillWait=$KILL_WAIT
InactiveLimit=0
MinJobAge=86400
ReturnToService=2
JobRequeue=1
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node[1-$NODES] CPUs=$CPUS Boards=1 SocketsPerBoard=2 CoresPerSocket=$((CPUS / 2)) ThreadsPerCore=1 RealMemory=1000000 Gres=gpu:$GPUS State=UNKNOWN
PartitionName=debug Nodes=node[1-4] Default=YES MaxTime=INFINITE State=UP
PartitionName=small Nodes=node[5-10] MaxTime=INFINITE State=UP
PartitionName=free Nodes=node[11-$NODES] MaxTime=INFINITE State=UP
CONF
  printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n' > "$LAB/etc/slurm/cgroup.conf"
  echo "Name=gpu File=$LAB/dev/nvidia[0-$((GPUS - 1))]" > "$LAB/etc/slurm/gres.conf"
}

# ---- inside the namespaces: what is PID 1 there -------------------------------------------------------------------------

idle_loop() { while :; do wait -n 2> /dev/null || sleep 0.5; done; }

__login() {
  hostname login
  mount --make-rprivate /
  mount --bind "$LAB/etc/hosts" /etc/hosts
  mount --bind "$LAB/etc/resolv.conf" /etc/resolv.conf
  mkdir -p /etc/slurm
  mount --bind "$LAB/etc/slurm" /etc/slurm
  ip link set lo up
  ip link add br0 type bridge
  ip addr add 10.77.0.1/24 dev br0
  ip link set br0 up
  munged --foreground --force --socket="$LAB/run/munge.socket" --key-file="$LAB/etc/munge.key" \
    --pid-file="$LAB/run/munged.pid" --log-file="$LAB/log/munged.log" --seed-file="$LAB/run/munged.seed" \
    >> "$LAB/log/munged.err" 2>&1 &
  for _ in $(seq 100); do munge -S "$LAB/run/munge.socket" -n > /dev/null 2>&1 && break; sleep 0.05; done
  slurmctld -D >> "$LAB/log/slurmctld.err" 2>&1 &
  idle_loop
}

# Into an own freezer cgroup, and a cgroup namespace rooted there.
__node() {
  if [ "$PROCTRACK" = cgroup ]; then
    mkdir -p "$FREEZER/$CGROUP/$1"
    echo 0 > "$FREEZER/$CGROUP/$1/cgroup.procs"
    exec unshare -C bash "$SELF" __node_in_cgroup "$1"
  fi
  __node_in_cgroup "$1"
}

__node_in_cgroup() {
  hostname "$1"
  mount --make-rprivate /
  if [ "$PROCTRACK" = cgroup ]; then
    mount -t tmpfs tmpfs /sys/fs/cgroup
    mkdir $FREEZER
    mount -t cgroup -o freezer freezer $FREEZER
  fi
  own_tmp "$1"
  for _ in $(seq 100); do ip link show eth0 > /dev/null 2>&1 && break; sleep 0.05; done
  ip link set lo up
  ip addr add "10.77.0.$((10 + ${1#node}))/24" dev eth0
  ip link set eth0 up
  ip route add default via 10.77.0.1
  slurmd -D >> "$LAB/log/slurmd.$1.err" 2>&1 &
  idle_loop
}

# Private /tmp and /dev/shm; what of /tmp must stay shared (SHARED, ':'-separated) is bound back in.
own_tmp() {
  local new=$LAB/run/$1.tmp directory
  mkdir -p "$new"
  mount -t tmpfs -o mode=1777 tmpfs "$new"
  while read -r directory; do
    case $directory in /tmp/?*) mkdir -p "$new${directory#/tmp}"; mount --bind "$directory" "$new${directory#/tmp}" ;; esac
  done < <(echo "$LAB:${SHARED:-}" | tr ':' '\n' | xargs -r -d '\n' readlink -f)
  mount --move "$new" /tmp
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  cd /
}

# ---- from outside -------------------------------------------------------------------------------------------------------

is_running() { [ -s "$1" ] && grep -qs __ "/proc/$(cat "$1")/cmdline"; }
login_pid() { is_running "$LAB/run/login.init" || die "not up"; cat "$LAB/run/login.init"; }
node_pid() { is_running "$LAB/run/$1.init" || die "$1 is not up"; cat "$LAB/run/$1.init"; }

first_child() {
  local children
  for _ in $(seq 100); do
    children=$(cat "/proc/$1/task/$1/children" 2> /dev/null || true)
    [ -z "$children" ] || { echo "${children%% *}"; return; }
    sleep 0.05
  done
  die "process $1 has no child"
}

# enter PID CMD...: in that process's namespaces, in the same directory.
enter() {
  local pid=$1; shift
  # shellcheck disable=SC2016
  exec nsenter -t "$pid" -n -m -u -p --wd=/ -- sh -c 'cd "$1" 2> /dev/null || cd /; shift; exec "$@"' sh "$PWD" "$@"
}

start_node() {
  local name=$1 login outer init
  ! is_running "$LAB/run/$name.init" || die "$name is up already"
  login=$(login_pid)
  nsenter -t "$login" -n ip link del "v-$name" 2> /dev/null || true
  setsid nsenter -t "$login" -n -m -u -p --wd=/ -- \
    unshare -n -m -u -p --fork --kill-child --mount-proc -- bash "$SELF" __node "$name" \
    < /dev/null >> "$LAB/log/$name.init.log" 2>&1 &
  outer=$!
  disown
  init=$(first_child "$(first_child "$outer")")
  nsenter -t "$login" -n ip link add "v-$name" type veth peer name eth0 netns "$init"
  nsenter -t "$login" -n ip link set "v-$name" master br0 up
  echo "$init" > "$LAB/run/$name.init"
}

up() {
  ! is_running "$LAB/run/login.init" || die "already up"
  rm -rf "${LAB:?}"/{state,run,log,spool}
  configure
  setsid unshare -n -m -u -p --fork --kill-child --mount-proc -- bash "$SELF" __login \
    < /dev/null >> "$LAB/log/login.init.log" 2>&1 &
  local outer=$! i
  disown
  first_child "$outer" > "$LAB/run/login.init"
  for _ in $(seq 100); do ("$SELF" exec scontrol ping 2> /dev/null | grep -q UP) && break; sleep 0.1; done
  for ((i = 1; i <= NODES; i++)); do start_node "node$i"; done
  for _ in $(seq 300); do
    [ "$("$SELF" exec sinfo -h -N -t idle -o %N 2> /dev/null | sort -u | wc -l)" != "$NODES" ] || return 0
    sleep 0.2
  done
  tail -n 15 "$LAB"/log/* >&2
  die "the nodes did not come up"
}

# One SIGKILL: the PID namespace takes the rest with it.
down() {
  local pid
  if is_running "$LAB/run/login.init"; then
    pid=$(cat "$LAB/run/login.init")
    kill -KILL "$pid"
    for _ in $(seq 100); do kill -0 "$pid" 2> /dev/null || break; sleep 0.1; done
  fi
  rm -f "$LAB"/run/*.init
  if [ -d "$FREEZER/$CGROUP" ]; then find "$FREEZER/$CGROUP" -depth -type d -exec rmdir {} + 2> /dev/null || true; fi
}

command=${1:?up, exec, on, kill-node, start-node or down}; shift
case $command in
  exec) enter "$(login_pid)" "$@" ;;
  on) pid=$(node_pid "$1"); shift; enter "$pid" "$@" ;;
  kill-node) kill -KILL "$(node_pid "$1")"; rm -f "$LAB/run/$1.init" ;;
  start-node) start_node "$1" ;;
  up | down | __login | __node | __node_in_cgroup) "$command" "$@" ;;
  *) sed -n '2,11p' "$SELF"; exit 2 ;;
esac
