"""Putting a report together and writing its files."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.data.quality import DataQuality
from megatron_bdpo.data.store import PairStore
from megatron_bdpo.display import Block, Facts, plain
from megatron_bdpo.errors import UserError
from megatron_bdpo.losses.bdpo import BdpoOptions
from megatron_bdpo.report import page, text
from megatron_bdpo.report.curves import Curves, read_curves
from megatron_bdpo.report.figures import Picture, comprehension_pictures, quality_pictures, training_pictures
from megatron_bdpo.report.heldout import HeldOutPairs, held_out_pairs
from megatron_bdpo.report.heldout_figures import heldout_pictures, labels_pictures
from megatron_bdpo.report.heldout_labels import HeldOutLabels, held_out_labels
from megatron_bdpo.report.run_files import ReportSources, find_sources
from megatron_bdpo.report.scored_pairs import Comprehension, comprehension_of, has_comprehension
from megatron_bdpo.report.style import require_matplotlib
from megatron_bdpo.training.reference.cache import open_scores
from megatron_bdpo.training.reporting import generations_file, heldout_file
from megatron_bdpo.training.reporting.generations_file import SideBySide, read_generations, side_by_side
from megatron_bdpo.training.reporting.heldout_file import read_heldout

PAGE = "report.html"


@dataclass(frozen=True)
class ReportSettings:
    """What to show.

    Attributes:
        temperature: tau, or "auto" for what the loss would choose; None takes the run's, else the loss's default.
        per_token: comprehension per token, or its sum; None takes the run's, else the default.
        pairs: how many of the most imbalanced pairs to list.
        show_text: their texts too.
        quality: read a run's pairs, and say what is wrong with them.
    """

    temperature: float | Literal["auto"] | None = None
    per_token: bool | None = None
    pairs: int = 20
    show_text: bool = False
    quality: bool = True


@dataclass(frozen=True)
class Report:
    """What a directory has to say."""

    title: str
    facts: dict[str, str]
    comprehension: Comprehension | None
    curves: Curves | None
    trained_on: int | None
    """Pairs of a run that are trained on, where it says so."""
    held_out: HeldOutPairs | None
    labels: HeldOutLabels | None
    """Of held-out answers."""
    answers: SideBySide | None
    quality: DataQuality | None
    texts: dict[int, dict[str, Any]]
    settings: ReportSettings

    def blocks(self) -> list[Block]:
        """For the terminal."""
        parts: list[list[Block]] = [[self.title], [Facts(list(self.facts.items()), indent=0)]]
        if self.comprehension:
            parts.append(text.comprehension_blocks(self.comprehension))
            if self.settings.pairs:
                parts.append(text.largest_blocks(self.comprehension, self.settings.pairs, self.texts))
        if self.curves:
            parts.append(text.curves_blocks(self.curves))
        if self.held_out:
            parts.append(text.heldout_blocks(self.held_out))
        if self.labels:
            parts.append(text.labels_blocks(self.labels))
        if self.answers:
            parts.append(text.answers_blocks(self.answers))
        if self.quality:
            parts.append(self.quality.blocks())
        return [block for part in parts for block in ("", *part)][1:]

    def as_text(self) -> str:
        """The same as lines of text."""
        return plain(self.blocks())

    def write(self, directory: Path) -> list[Path]:
        """Write the page and the pictures; returns the files, the page first.

        Raises:
            UserError: matplotlib is missing, or the directory cannot be written.
        """
        require_matplotlib()
        sections, pictures = self._illustrated()
        tiles = page.tiles(self.curves, self.trained_on) if self.curves else []
        html = page.page(self.title, self.facts, tiles, sections)
        files = [(directory / PAGE, html.encode())]
        files += [(directory / f"{picture.name}.png", picture.png) for picture in pictures]
        try:
            directory.mkdir(parents=True, exist_ok=True)
            for path, data in files:
                write_whole(path, data)
        except OSError as error:
            raise UserError(f"the report cannot be written to {directory}: {error.strerror or error}.") from error
        return [path for path, _ in files]

    def _illustrated(self) -> tuple[list[page.Section], list[Picture]]:
        sections, pictures = [], []
        if self.curves:
            drawn = training_pictures(self.curves)
            pictures += drawn
            sections.append(page.Section("Training", _CURVES_NOTE, drawn))
        if self.held_out:
            drawn = heldout_pictures(self.held_out)
            pictures += drawn
            sections.append(page.heldout_section(self.held_out, drawn))
        if self.labels:
            drawn = labels_pictures(self.labels)
            pictures += drawn
            sections.append(page.labels_section(self.labels, drawn))
        if self.answers:
            sections.append(page.answers_section(self.answers))
        if self.comprehension:
            drawn = comprehension_pictures(self.comprehension)
            pictures += drawn
            sections.append(page.comprehension_section(self.comprehension, drawn))
            if self.settings.pairs:
                sections.append(page.largest_section(self.comprehension, self.settings.pairs, self.texts))
        if self.quality:
            drawn = quality_pictures(self.quality)
            pictures += drawn
            sections.append(page.quality_section(self.quality, drawn))
        return sections, pictures


_CURVES_NOTE = (
    "Each step's metrics are means over its pairs, before its update. Where steps are many, the faint line is every "
    "step and the strong one a running mean."
)


def build_report(directory: Path, settings: ReportSettings, scores: Path | None = None) -> Report:
    """Read everything that the report of a directory needs.

    Args:
        directory: of reference scores, or a run's.
        scores: of a run, where they are not those that it has used.

    Raises:
        UserError: nothing to report on, or something cannot be read.
    """
    sources = find_sources(directory, scores)
    curves = read_curves(sources.run) if sources.run else None
    trained_on = sources.record.get("pairs", {}).get("train")
    rewards = _read(read_heldout, sources.run / heldout_file.NAME) if sources.run else []
    held_out, labels = held_out_pairs(rewards), held_out_labels(rewards)
    answers = _answers(sources.run) if sources.run else None
    pairs = _comprehension(sources, settings, is_wanted=not sources.run or scores is not None)
    texts = pairs.texts(pairs.largest(settings.pairs)) if pairs and settings.show_text else {}
    quality, trouble = _quality(sources.stores) if settings.quality else (None, {})
    what = "Run" if sources.run else "Reference scores"
    if rewards and not (held_out or labels):
        trouble["held-out pairs"] = f"no reward is finite at the latest evaluation, after step {rewards[-1].step}"
    facts = _facts(sources, pairs) | trouble
    return Report(
        f"{what} {directory}", facts, pairs, curves, trained_on, held_out, labels, answers, quality, texts, settings
    )


def _quality(stores: Sequence[Path]) -> tuple[DataQuality | None, dict[str, str]]:
    """Of the pairs, or why there is none: a run's tokens are a cache, which may be gone."""
    try:
        opened = [PairStore.open(directory) for directory in stores]
    except UserError as error:
        return None, {"quality of the pairs": f"not known. {error}"}
    return DataQuality.of(*opened, most_prompts=_MOST_PROMPTS) if opened else None, {}


_MOST_PROMPTS = 100_000  # compared with each other; data stats looks at more


def _answers(run: Path) -> SideBySide | None:
    return side_by_side(_read(read_generations, run / generations_file.NAME))


def _read[Row](read: Callable[[Path], list[Row]], path: Path) -> list[Row]:
    try:
        return read(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _comprehension(sources: ReportSources, settings: ReportSettings, *, is_wanted: bool) -> Comprehension | None:
    """None where there are no scores, or, unless it ``is_wanted``, none of what a loss without comprehension reads."""
    if sources.scores is None:
        return None
    scores = open_scores(sources.scores, unfinished=True)
    if not (is_wanted or has_comprehension(scores)):
        return None
    options, default = sources.record.get("loss_options", {}), BdpoOptions()
    found = _number(options.get("bdpo_temperature")) or _number(default.bdpo_temperature)
    temperature = settings.temperature or found or math.inf
    per_token = settings.per_token
    if per_token is None:
        per_token = options.get("bdpo_comprehension", default.bdpo_comprehension) == "per-token"
    return comprehension_of(scores, temperature, per_token=per_token, where=str(sources.scores))


def _number(value: Any) -> float | None:
    """A temperature as a run's record has it: JSON has no infinity, so that is a word there."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(number) else number


def _facts(sources: ReportSources, pairs: Comprehension | None) -> dict[str, str]:
    facts: dict[str, str] = {}
    if loss := sources.record.get("loss"):
        options = sources.record.get("loss_options", {})
        facts["loss"] = ", ".join([str(loss), *(f"{name} {value}" for name, value in options.items())])
    if pairs:
        facts |= _facts_of_scores(sources, pairs)
    return facts


def _facts_of_scores(sources: ReportSources, pairs: Comprehension) -> dict[str, str]:
    manifest = pairs.manifest
    facts = {
        "scores": str(sources.scores),
        "pairs": f"{len(pairs.ids):,} scored of {pairs.total:,}" + ("" if manifest.get("complete") else ", unfinished"),
        "temperature auto": f"would be {pairs.automatic_temperature:.4g}",
        "data": ", ".join(pairs.source_paths),
    }
    if manifest.get("model"):
        facts["reference"] = str(manifest["model"])
    return facts
