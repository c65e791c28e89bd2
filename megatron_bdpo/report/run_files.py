"""What a directory given to ``megatron-bdpo report`` is, and where the parts of its report are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.json_shape import Each, parse_json, schema_error
from megatron_bdpo.training.reference.cache import MANIFEST
from megatron_bdpo.training.reporting.metrics_file import NAME as METRICS
from megatron_bdpo.training.reporting.run_record import NAME as RECORD
from megatron_bdpo.user_files import read_regular


@dataclass(frozen=True)
class ReportSources:
    """Where to read from.

    Attributes:
        run: the run directory, if it is one.
        scores: the directory of the training pairs' scores, if there is one.
        record: what the run has put down about itself.
        stores: directories of the tokenized pairs that a run has used, those trained on first, if they are known.
    """

    run: Path | None
    scores: Path | None
    record: dict[str, Any] = field(default_factory=dict)
    stores: tuple[Path, ...] = ()


def find_sources(directory: Path, scores: Path | None = None) -> ReportSources:
    """Look at what a directory holds.

    Args:
        directory: of reference scores, or a run's ``--save``.
        scores: of a run, where the user names them; else those that the run has used.

    Raises:
        UserError: it is neither.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: there is no such directory.")
    if (directory / MANIFEST).is_file():
        return ReportSources(run=None, scores=directory)
    if (directory / METRICS).is_file():
        record = _record(directory)
        stores = record.get("pair_stores", {})
        named = tuple(Path(stores[use]) for use in ("train", "heldout") if use in stores)
        return ReportSources(directory, scores or _scores_of_run(record), record, named)
    patterns = [f"{depth}/{name}" for depth in ("*", "*/*", "*/*/*") for name in (MANIFEST, METRICS)]
    inner = sorted({str(found.parent) for pattern in patterns for found in directory.glob(pattern)})
    advice = f" These can be reported on: {', '.join(inner[:8])}{', ...' if len(inner) > 8 else ''}." if inner else ""
    raise UserError(
        f"{directory} is neither a directory of reference scores (it has no {MANIFEST}) nor of a run (it has no "
        f"{METRICS}).{advice}"
    )


def _record(run: Path) -> dict[str, Any]:
    path = run / RECORD
    try:
        found = parse_json(read_regular(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Mend it, or move it away.") from error
    wrong = schema_error(found, {"reference_scores": Each(str)})
    wrong = wrong or schema_error(found.get("pairs", {}), Each(int), "pairs")
    if wrong := wrong or schema_error(found.get("pair_stores", {}), Each(str), "pair_stores"):  # younger than the file
        raise UserError(f"{path} is not what a run writes: {wrong}. Mend it, or move it away.")
    return dict(found)


def _scores_of_run(record: dict[str, Any]) -> Path | None:
    """Those of the training pairs, if they are still there and the loss has read comprehension."""
    named = record.get("reference_scores", {}).get("train")
    return Path(named) if named and (Path(named) / MANIFEST).is_file() else None
