"""The job of the kill matrix, and what must be true of its directory whenever it is not running."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.jobs import DATA, flags_of
from tests.harness.killing import JobTree
from tests.harness.phases import PhaseBoard, show_phases

RANKS = 2
TRACKER = "latest_checkpointed_iteration.txt"

#: Of a record of metrics, what a clock has made.
_TIMES = "throughput"

SETTINGS = (
    "--tokenizer-type SentencePieceTokenizer --seq-length 2048 --max-pairs 40 --pairs-per-step 8 --eval-share 0.2 "
    "--eval-interval 2 --save-interval 2 --lr 1e-3 --lr-decay-style constant "
    "--use-distributed-optimizer"
)


@dataclass(frozen=True)
class Run:
    """One job from its beginning to its end, in a directory of its own.

    It goes through every phase: pairs are tokenised, the reference scored, a tiny model trained with evaluations and
    checkpoints, and exported as a Hugging Face model.
    """

    directory: Path
    model: Path
    board: PhaseBoard
    more: tuple[str, ...] = ()
    """Further flags of the job."""
    steps: int = 6
    pack_seconds: float = 0.0
    """Seconds that the scoring of a pack takes at least, as with a large model. Scores are then written as usual."""

    @property
    def save(self) -> Path:
        return self.directory / "run"

    @property
    def export(self) -> Path:
        return self.directory / "export"

    def flags(self) -> list[str]:
        places = {"hf-model": self.model, "save-hf": self.export, "save": self.save, "load": self.save}
        data = {"pair-data": DATA / "train.jsonl", "tokenizer-model": DATA / "tokenizer.model"}
        return [
            *flags_of(places | data),
            *f"--train-iters {self.steps} {SETTINGS}".split(),
            *self.more,
        ]

    def start(self) -> JobTree:
        self.board.clear()
        return JobTree(RANKS, self._job)

    def _job(self) -> None:
        log = os.open(self.directory / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "MASTER_ADDR": "127.0.0.1"}
        from megatron_bdpo.training.entry import main
        from megatron_bdpo.training.forward import ScoringStep
        from megatron_bdpo.training.reference import scoring_loop

        show_phases(self.board, int(os.environ["RANK"]))
        if self.pack_seconds:
            step = ScoringStep.__call__
            ScoringStep.__call__ = lambda *args: (time.sleep(self.pack_seconds), step(*args))[1]  # type: ignore[method-assign]
        else:
            scoring_loop.FLUSH_SECONDS = 0  # so that kills find a part of the scores on disk
        main(self.flags())
        if os.environ["RANK"] == "0":
            (self.directory / "modules").write_text("\n".join(sys.modules))

    def import_all(self) -> None:
        """In the process that forks the jobs: import what this one, which has ended, has imported on its way."""
        for name in (self.directory / "modules").read_text().split():
            if not name.startswith("__"):
                with contextlib.suppress(Exception):  # some exist under another name only
                    importlib.import_module(name)

    def is_finished(self) -> bool:
        """The export is there, which appears whole or not at all and is the last thing that a job writes."""
        return self.export.exists()

    def reachable(self) -> set[str]:
        """Phases that the next start will come through, with work to do in them."""
        ahead = {"start", "training", "evaluation", "checkpoint", "export", "end"}
        if not list(self.save.glob("cache/*/meta.json")):
            ahead.add("data")
        if not list(self.save.glob("iter_*")):
            ahead.add("scoring")
        return ahead

    def result(self) -> dict[str, bytes]:
        """What must not depend on kills: the exported weights, byte for byte, and every metric of every step."""
        files = {path.name: path.read_bytes() for path in sorted(self.export.glob("*.safetensors"))}
        return files | {"metrics.jsonl": json.dumps(sorted(self._metrics())).encode()}

    def _metrics(self) -> list[str]:
        records: list[dict[str, Any]] = []
        for line in (self.save / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that a kill has cut
                records.append(json.loads(line))
        plain = [{k: v for k, v in each.items() if not k.startswith(_TIMES)} for each in records]
        return [json.dumps(each, sort_keys=True) for each in plain]

    def last_kept(self) -> float:
        """When the last of what a later start goes on from was written: tokens, scores, a checkpoint, the export."""
        kept = [*self.save.glob("cache/*/meta.json"), *self.save.glob("cache/**/part-*"), self.save / TRACKER]
        return max((each.stat().st_mtime for each in [*kept, self.export] if each.exists()), default=0.0)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def named(self) -> int | None:
        """The iteration that Megatron's tracker names; None: it names none, or was cut while it was written."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.save / TRACKER).read_text())
        return None

    def checkpoints(self) -> dict[int, bool]:
        """Iterations that have left something on the disk, and whether their files are those of their manifest."""
        return {int(path.name[5:]): is_whole(path) for path in sorted(self.save.glob("iter_*"))}

    def expected_start(self) -> int:
        """Where the next start must go on: at what the tracker names; where it was cut, at the newest that is whole."""
        if (named := self.named()) is not None:
            return named
        whole = [iteration for iteration, is_whole in self.checkpoints().items() if is_whole]
        return max(whole, default=0) if (self.save / TRACKER).exists() else 0


def is_whole(checkpoint: Path) -> bool:
    """A checkpoint, by its manifest, read and compared here on its own, without the code that is under test."""
    try:
        files = json.loads((checkpoint / "integrity.json").read_bytes())["files"]
        return all(hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == d for name, d in files.items())
    except (OSError, ValueError):
        return False
