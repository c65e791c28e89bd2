"""The failure matrix: what the batch scripts do on a real SLURM when something breaks, with stand-ins for Python.

A stand-in is a shell script: what it is as torchrun, the case says; as anything else it succeeds. All cases are
submitted at once, and run beside the tests of real trainings, on nodes of their own.
"""

from __future__ import annotations

import os
import re
import sys

import pytest

from tests.slurm.cluster import Case, Job

pytestmark = pytest.mark.slow


#: Of a preflight that fails on the first node, in the first attempt.
FAILS_ONCE = '[ "$SLURM_NODEID$SLURM_RESTART_COUNT" != 0 ]'

#: Of a preflight: $looks is how often this node was looked at.
COUNT = 'looks="$RUN_DIR/looks.$(hostname)"; echo >> "$looks"; looks=$(wc -l < "$looks")'

#: In the place of scontrol: the first so many requeues are refused.
REFUSING = """
if [ "$1" = requeue ] && echo >> $RUN_DIR/asked && [ "$(wc -l < $RUN_DIR/asked)" -le %d ]; then
  echo "slurm_requeue error: Socket timed out" >&2; exit 1
fi
exec /usr/bin/scontrol "$@"
"""

#: In its place: an image is a file that says so.
APPTAINER = """
case $1 in
  pull) echo image > "$2"; echo "$3" >> $RUN_DIR/pulled ;;
  exec) while [[ $1 != *.sif ]]; do shift; done; cat "$1" >> $RUN_DIR/inside; shift; exec "$@" ;;
esac
"""

IMAGE = "nvcr.io#nvidia/pytorch:25.06-py3"

#: In the place of Python: the exchange between the nodes is the real one, but on the third it hangs at first.
LINKS = f"""
if [[ $* = *links.py* ]]; then [ "$node $attempt" != "2 0" ] || exec sleep 60; exec {sys.executable} "$@"; fi
"""

CASES = {
    # A minute's limit, and nobody who hears the signal before it.
    "time_limit": Case(
        "[ $attempt != 0 ] || sleep 1000; finish",
        settings={"BDPO_LAST_SECONDS": "20"},
        options=("--time=1", "--signal=B:USR1@30"),
        nodes=1,
    ),
    # The first attempt's node loses the network, and goes on.
    "cut_off": Case(
        """[ $attempt = 0 ] || finish
        while [ "$1" != --stop-file ]; do shift; done
        ip link set eth0 down
        for i in {1..600}; do
          [ ! -e "$2" ] || { touch $RUN_DIR/stopped; break; }
          sleep 0.1
        done
        sleep 3
        ip link set eth0 up
        ip route add default via 10.77.0.1""",
        nodes=1,
    ),
    "links": Case("finish", other=LINKS, settings={"BDPO_LINKS": "1", "BDPO_LINKS_SECONDS": "8"}, nodes=3),
    "shared_cause_passes": Case(
        "finish", settings={"BDPO_PREFLIGHT": f"{COUNT}; [ $looks -gt 2 ]", "BDPO_PREFLIGHT_WAIT": "1"}
    ),
    "shared_cause_stays": Case(
        settings={
            "BDPO_PREFLIGHT": "false",
            "BDPO_PREFLIGHT_WAIT": "1",
            "BDPO_PREFLIGHT_TRIES": "2",
            "BDPO_MAX_STALLED": "2",
        },
    ),
    "bad_node": Case("finish", settings={"BDPO_PREFLIGHT": FAILS_ONCE}, options=("--exclude=node9",)),
    # Left out for two seconds: at the next requeue no longer.
    "strike_expires": Case(
        "[ $attempt = 2 ] || exit 3; finish", settings={"BDPO_PREFLIGHT": FAILS_ONCE, "BDPO_STRIKE_MINUTES": "0.03"}
    ),
    "check_that_hangs": Case(
        "finish", settings={"BDPO_PREFLIGHT": f"{FAILS_ONCE} || sleep 500", "BDPO_PREFLIGHT_SECONDS": "2"}
    ),
    # What each says of itself alone is no cause that they share: nobody waits.
    "no_gpus": Case(
        "finish",
        programs={"nvidia-smi": '[ -z "$SLURM_RESTART_COUNT" ] && echo "No devices were found" || echo GPU 0: H100'},
        settings={"BDPO_DEVICE": "gpu"},
    ),
    # Half a file of tokens in each attempt, and nothing whole.
    "nothing_completed": Case(
        "half=$RUN_DIR/cache/.tokens.$start.partial; mkdir -p $half; echo > $half/tokens; exit 3",
        settings={"BDPO_MAX_STALLED": "2"},
        nodes=1,
    ),
    # A part of the scores in each attempt, in a cache elsewhere.
    "completed_elsewhere": Case(
        "[ $attempt != 3 ] || finish; echo /elsewhere/part-$attempt > $BDPO_COMPLETED_DIR/rank.$start; exit 3",
        settings={"BDPO_MAX_STALLED": "1"},
        nodes=1,
    ),
    # The same part every time: its cache goes with the node.
    "completed_again": Case(
        "echo /tmp/part-0 > $BDPO_COMPLETED_DIR/rank.$start; exit 3", settings={"BDPO_MAX_STALLED": "1"}, nodes=1
    ),
    "restart_in_place": Case("[ $start = 0+1 ] || exit 3; finish", settings={"BDPO_RESTARTS": "1"}),
    # What crashed has broken the node, too.
    "no_restart_on_a_bad_node": Case(
        "[ $attempt != 1 ] || finish; [ $node = 1 ] || sleep 60; touch /tmp/broken.$SLURM_JOB_ID; exit 3",
        settings={"BDPO_RESTARTS": "2", "BDPO_PREFLIGHT": "[ ! -e /tmp/broken.$SLURM_JOB_ID ]"},
    ),
    "requeue_refused_twice": Case(
        "[ $attempt = 1 ] || exit 3; finish",
        programs={"scontrol": REFUSING % 2},
        settings={"BDPO_RETRY_SECONDS": "1"},
        nodes=1,
    ),
    "requeue_refused": Case(
        "exit 3",
        programs={"scontrol": REFUSING % 99},
        settings={
            "BDPO_RETRY_SECONDS": "0",
            "BDPO_NOTIFY": 'echo "$BDPO_STATE, step $BDPO_STEP: $BDPO_CAUSE" >> $BDPO_RUN/told',
        },
        nodes=1,
    ),
    "stop_in_preflight": Case(
        "finish",
        other='[ "$1" != -c ] || [ $attempt = 1 ] || ask_to_stop; exit 0',
        settings={"BDPO_PREFLIGHT": '[ -n "$SLURM_RESTART_COUNT" ] || sleep 1000', "BDPO_PREFLIGHT_SECONDS": "1000"},
    ),
    "stop_unheard": Case(
        "[ $attempt = 1 ] || { ask_to_stop; sleep 1000; }; finish",
        settings={"BDPO_LAST_SECONDS": str(9 * 366 * 86400)},
    ),
    "hung": Case(
        """[ $attempt = 0 ] || finish
        status hung ', "phase": "scoring", "cause": "rank 1 on node5 stood still for 600 s"'; exit 1""",
        nodes=1,
    ),
    "notified": Case(
        "[ $start = 1+0 ] || exit 3; finish",
        settings={
            "BDPO_RESTARTS": "1",
            "BDPO_NOTIFY_SECONDS": "1",
            "BDPO_NOTIFY": 'echo "$BDPO_STATE of $BDPO_JOB.$BDPO_ATTEMPT, step $BDPO_STEP: $BDPO_CAUSE" >> '
            "$BDPO_RUN/told; [ $BDPO_STATE != requeued ] || sleep 100",
        },
        nodes=1,
    ),
    "scratch": Case(
        """stat -c "%a %u %n" "${TRITON_CACHE_DIR%/triton}" >> $RUN_DIR/scratch
        ulimit -n > $RUN_DIR/files.$node
        echo "$*" > $RUN_DIR/words.$start
        [ $attempt = 0 ] || finish
        [ $node = 1 ] || exec sleep 100
        exit 3"""
    ),
    "cancelled": Case(
        """trap 'echo saved > $RUN_DIR/saved.$node; exit 0' TERM
        touch $RUN_DIR/started.$node
        sleep 1000 &
        if [ $node = 0 ]; then until [ -e $RUN_DIR/started.1 ]; do sleep 0.1; done; scancel $SLURM_JOB_ID; fi
        wait"""
    ),
    "array": Case("finish", options=("--array=0-1",), nodes=1),
    "apptainer": Case(
        "finish",
        programs={"apptainer": APPTAINER},
        settings={"BDPO_CONTAINER": IMAGE, "BDPO_CONTAINER_RUNTIME": "apptainer"},
        nodes=1,
    ),
    "no_pyxis": Case(settings={"BDPO_CONTAINER": IMAGE}, nodes=1),
    "no_apptainer": Case(settings={"BDPO_CONTAINER": IMAGE, "BDPO_CONTAINER_RUNTIME": "apptainer"}, nodes=1),
}


def ended(jobs: dict[str, Job], name: str, state: str = "COMPLETED") -> Job:
    jobs[name].wait(state)
    return jobs[name]


def excluded(job: Job) -> str:
    return re.findall(r"ExcNodeList=(\S+)", job.cluster.lab("exec", "scontrol", "show", "job", str(job.id)))[0]


def strikes(job: Job) -> list[str]:
    path = job.run / "slurm" / "train" / "strikes"
    return path.read_text().splitlines() if path.exists() else []


def test_a_cause_that_all_nodes_share_is_waited_for(jobs):
    job = ended(jobs, "shared_cause_passes")
    assert job.log.count("2 of 2 nodes fail: a cause that they share is waited for") == 2
    assert job.last_line.endswith("attempt 0: finished, step 2 of 2")
    assert strikes(job) == []


def test_a_cause_that_stays_excludes_nobody(jobs):
    job = ended(jobs, "shared_cause_stays", "FAILED")
    assert "gave up after 2 attempts without progress: preflight failed on node" in job.last_line
    assert job.log.count("is waited for") == 2  # once in each attempt
    assert strikes(job) == [] and excluded(job) == "(null)"


def test_a_bad_node_is_left_out_beside_those_of_the_user(jobs):
    job = ended(jobs, "bad_node")
    (bad,) = re.findall(r"attempt 0: preflight failed on (node\d+); requeued without (?=\1$)", job.log, re.MULTILINE)
    assert job.last_line.endswith("attempt 1: finished, step 2 of 2")
    names = job.cluster.lab("exec", "scontrol", "show", "hostnames", excluded(job)).split()
    assert sorted(names) == sorted([bad, "node9"])


def test_an_exclusion_ends(jobs):
    job = ended(jobs, "strike_expires")
    assert re.search(r"attempt 0: preflight failed on (node\d+); requeued without \1$", job.log, re.MULTILINE)
    assert re.search(r"attempt 1: crashed, .*; requeued$", job.log, re.MULTILINE)
    assert excluded(job) == "(null)"
    assert len(strikes(job)) == 1


def test_a_check_that_hangs_is_ended(jobs):
    job = ended(jobs, "check_that_hangs")
    assert "BDPO_PREFLIGHT took longer than 2 s" in job.log
    assert job.last_line.endswith("attempt 1: finished, step 2 of 2")


def test_nodes_without_their_gpus_are_not_waited_for(jobs):
    """Of two, one is left out: no more may be."""
    job = ended(jobs, "no_gpus")
    assert len(strikes(job)) == 2 and "is waited for" not in job.log
    assert job.log.count("nvidia-smi sees 0 GPUs, not 1") == 2
    assert re.search(
        r"attempt 0: preflight failed on node\d+,node\d+; requeued without node\d+$", job.log, re.MULTILINE
    )
    assert job.last_line.endswith("attempt 1: finished, step 2 of 2")


def test_what_is_not_completed_is_no_progress(jobs):
    job = ended(jobs, "nothing_completed", "FAILED")
    assert "attempt 1: gave up after 2 attempts without progress" in job.last_line


def test_what_is_completed_elsewhere_is_progress(jobs):
    job = ended(jobs, "completed_elsewhere")
    assert job.last_line.endswith("attempt 3: finished, step 2 of 2")


def test_what_is_completed_again_is_no_progress(jobs):
    job = ended(jobs, "completed_again", "FAILED")
    assert "attempt 1: gave up after 1 attempts without progress" in job.last_line


def test_a_crash_restarts_in_place(jobs):
    job = ended(jobs, "restart_in_place")
    assert "attempt 0: crashed, last checkpoint of step 0: torchrun on node" in job.log
    assert "; restarted on the same nodes" in job.log
    assert job.last_line.endswith("attempt 0: finished, step 2 of 2")


def test_a_crash_that_broke_its_node_does_not_restart_there(jobs):
    job = ended(jobs, "no_restart_on_a_bad_node")
    assert job.log.count("; restarted on the same nodes") == 1
    assert re.search(r"attempt 0: preflight failed on (node\d+); requeued without \1$", job.log, re.MULTILINE)
    assert job.last_line.endswith("attempt 1: finished, step 2 of 2")


def test_a_refused_requeue_is_tried_again(jobs):
    job = ended(jobs, "requeue_refused_twice")
    assert job.log.count("not requeued, tried again in") == 2
    assert job.last_line.endswith("attempt 1: finished, step 2 of 2")


def test_a_requeue_that_is_refused_for_good_is_told(jobs):
    job = ended(jobs, "requeue_refused", "FAILED")
    assert job.last_line.endswith("could not be requeued in 6 tries")
    told = (job.run / "told").read_text().splitlines()
    assert [line.split(":")[0] for line in told] == ["requeued, step 0", "gave_up, step 0"]


def test_a_stop_ends_the_preflight(jobs):
    """Which would have taken a thousand seconds."""
    job = ended(jobs, "stop_in_preflight")
    assert "attempt 0: stopped before it began; requeued" in job.log
    assert strikes(job) == []


def test_a_stop_that_is_not_heard_is_requeued_before_the_limit(jobs):
    job = ended(jobs, "stop_unheard")
    assert "attempt 0: asked to stop, not done" in job.log
    assert job.last_line.endswith("attempt 1: finished, step 2 of 2")


def test_the_time_limit_itself(jobs):
    job = ended(jobs, "time_limit")
    assert "attempt 0: asked to stop, not done 20 s before the time limit" in job.log
    assert re.search(r"attempt \d: finished, step 2 of 2$", job.last_line), "a late start may not be in time for it"


def test_a_node_that_was_cut_off_is_told_to_stop(jobs):
    """It has no part in what comes next, either."""
    job = ended(jobs, "cut_off")
    job.wait_for((job.run / "stopped").exists, "the stop of the first attempt's ranks")
    job.wait_for(
        lambda: f"attempt {job.id}.0 ends here: {job.id}.1 has gone on from it" in job.log, "the end of its script"
    )
    history = (job.run / "slurm" / "train" / "history").read_text().splitlines()
    assert [line.partition(" attempt ")[2] for line in history] == ["1: finished, step 2 of 2"]


def test_the_history_names_a_hang(jobs):
    job = ended(jobs, "hung")
    words = "hung in scoring, last checkpoint of step 0: rank 1 on node5 stood still for 600 s; requeued"
    assert f"attempt 0: {words}" in job.log
    assert words in (job.run / "slurm" / "train" / "history").read_text()


def test_notify(jobs):
    job = ended(jobs, "notified")
    told = (job.run / "told").read_text().splitlines()
    assert [line.partition(", step")[0] for line in told] == [
        f"{state} of {job.id}.{attempt}" for state, attempt in (("restarted", 0), ("requeued", 0), ("finished", 1))
    ]
    assert "crashed, last checkpoint of step 0: torchrun on node" in told[0]
    assert "BDPO_NOTIFY ended with 124" in job.log


def test_scratch_is_private_and_removed(jobs):
    job = ended(jobs, "scratch")
    made = [line.split(" ", 2) for line in (job.run / "scratch").read_text().splitlines()]
    assert len(made) == 4 and {mode for mode, _, _ in made} == {"700"}
    assert len({path for _, _, path in made}) == 4
    assert all(re.fullmatch(rf"/tmp/bdpo-{job.id}\.\w{{10}}", path) for _, _, path in made)
    assert left(job) == [] and left(jobs["stop_unheard"]) == []


def left(job: Job) -> list[str]:
    """Scratch of the job on any node."""
    find = ("find", "/tmp", "-maxdepth", "1", "-name", f"bdpo-{job.id}*")
    return [line for node in range(5, 11) for line in job.cluster.lab("on", f"node{node}", *find).split()]


def test_limits_and_ports(jobs):
    job = ended(jobs, "scratch")
    hard = os.popen("ulimit -Hn").read()
    assert (job.run / "files.0").read_text() == hard
    ports = [int(re.findall(r"--rdzv-endpoint node\d+:(\d+)", path.read_text())[0]) for path in job.run.glob("words.*")]
    assert len(set(ports)) == 2 and all(20000 <= port < 32768 for port in ports)


def test_scancel_reaches_the_ranks(jobs):
    job = ended(jobs, "cancelled", "CANCELLED")
    job.wait_for(lambda: len(list(job.run.glob("saved.?"))) == 2, "what the ranks do when they are told to end")
    job.wait_for(lambda: left(job) == [], "the end of the scratch")


def test_tasks_of_an_array_have_directories_of_their_own(jobs):
    job = jobs["array"]
    histories = [job.run / f"task-{task}" / "slurm" / "train" / "history" for task in range(2)]
    job.wait_for(lambda: all(path.exists() for path in histories), "both tasks")
    assert all("finished, step 2 of 2" in path.read_text() for path in histories)


def test_apptainer(jobs):
    job = ended(jobs, "apptainer")
    assert (job.run / "pulled").read_text() == "docker://nvcr.io/nvidia/pytorch:25.06-py3\n"  # once for all steps
    assert (job.run / "inside").read_text() == "image\n" * 2  # preflight and launch
    assert job.last_line.endswith("attempt 0: finished, step 2 of 2")


@pytest.mark.parametrize(
    ("name", "words"),
    [("no_pyxis", "pyxis is not installed. With Apptainer:"), ("no_apptainer", "there is no apptainer on node")],
)
def test_a_container_runtime_that_is_not_there_is_said(jobs, name, words):
    job = ended(jobs, name, "FAILED")
    assert words in job.log
    assert "attempt 0:" not in job.log, "nothing was tried"


def test_a_node_whose_links_are_broken_is_left_out(jobs):
    """The real exchange, on three nodes: the last one's does not answer."""
    job = ended(jobs, "links")
    (bad,) = re.findall(r"attempt 0: preflight failed on (node\d+); requeued without (?=\1$)", job.log, re.MULTILINE)
    assert f"preflight: {bad}: no answer" in job.log
    assert job.last_line.endswith("attempt 1: finished, step 2 of 2")
