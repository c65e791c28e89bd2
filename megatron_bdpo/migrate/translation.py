"""A configuration by its trainer's table: settings of a recipe, what has no effect here, and what is refused.

Every key of the configuration ends in one of the three.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_bdpo.errors import UserError
from megatron_bdpo.migrate import entries
from megatron_bdpo.migrate.entries import Default, Source
from megatron_bdpo.migrate.reading import Given
from megatron_bdpo.training.flags import flag_table


@dataclass
class Translation:
    """What became of a configuration."""

    source: Source
    settings: dict[str, bool | str | list[str]] = field(default_factory=dict)
    """The recipe."""
    origins: dict[str, str] = field(default_factory=dict)
    """Flag -> the keys that it comes from."""
    notes: dict[str, str] = field(default_factory=dict)
    """Flag -> what is not quite the same there."""
    unneeded: dict[str, str] = field(default_factory=dict)
    """Key -> why it has no effect."""
    refused: dict[str, str] = field(default_factory=dict)
    """Key -> what is wrong with it, and what to do."""

    def set(self, flag: str, value: bool | str | list[str], given: Given) -> None:
        """Make it the flag's value, unless another key has made it another one: that is refused."""
        before = self.settings.get(flag)
        if before is not None and before != value:
            other = f"{self.origins[flag]} makes it {_short(str(before))}"
            self.refuse(given, f"makes --{flag} {_short(str(value))}, and {other}. Keep one.")
            return
        origin = given.where if given.is_default else given.key
        before_it = self.origins.get(flag)
        self.settings[flag] = value
        self.origins[flag] = origin if before_it in (None, origin) else f"{before_it}, {origin}"

    def refuse(self, given: Given, why: str) -> None:
        self.refused[given.key] = f"{given.where}: {why}"


def recognise(keys: Iterable[str], sources: Iterable[Source]) -> Source:
    """The trainer that knows most of the keys, and at least half; of a trainer and its variants, the first.

    Raises:
        UserError: none does, or several know as many.
    """
    keys = tuple(keys)
    known = {source.name: sum(source.entry(key) is not None for key in keys) for source in sources}
    most = max(known.values())
    best = [source for source in sources if known[source.name] == most]
    best = [source for source in best if source.variant_of not in {other.name for other in best}]
    if 2 * most < len(keys):
        raise UserError(f"most of these keys are nobody's. Say whose configuration it is: --from {'|'.join(known)}.")
    if len(best) > 1:
        names = " or ".join(source.name for source in best)
        raise UserError(f"the keys are those of {names}. Say whose configuration it is: --from {best[0].name}.")
    return best[0]


def translate(found: Mapping[str, Given], source: Source, processes: int | None = None) -> Translation:
    """Every key of a configuration by the table, and what the trainer does where keys are not there.

    Args:
        processes: of the configuration's job that each have their own rows, where it is known.
    """
    return _Translator(dict(_without_no(given, source) for given in found.values()), source, processes).result


def _without_no(given: Given, source: Source) -> tuple[str, Given]:
    """A key with its value; ``--no_KEY``, as transformers' parser makes them of switches that are on, is KEY: false."""
    key = given.key.removeprefix("no_")
    if given.value is True and source.entry(given.key) is None and source.entry(key) is not None:
        return key, replace(given, key=key, value=False)
    return given.key, given


class _Translator:
    """One walk over a configuration: the loss first, on which its options depend."""

    def __init__(self, found: Mapping[str, Given], source: Source, processes: int | None) -> None:
        self.source, self.processes = source, processes
        self.result = Translation(source, {**source.always}, dict.fromkeys(source.always, source.title))
        self.loss: str | None = None
        self.factors: dict[str, list[Given]] = {}
        self.all = {**found, **_defaults(source, found)}
        self.replaced = {
            name: given.key
            for given in self.all.values()
            if isinstance(line := source.entry(given.key), entries.To) and not _is_off(given, line.off)
            for name in line.replaces
        }
        for given in sorted(self.all.values(), key=lambda each: not _says_loss(self.source.entry(each.key))):
            self._one(given)
        for key in found.keys() - {given.key for given in self.all.values() if not given.is_default}:
            self.result.unneeded[key] = "not set"
        self._products()
        self._of_policies_alone()

    def _one(self, given: Given) -> None:
        key, line = given.key, self.source.entry(given.key)
        if line is None:
            close = difflib.get_close_matches(key, self.source.keys, n=1, cutoff=0.8)
            advice = f"Did you mean {close[0]}? Or take it out." if close else "Take it out."
            self.result.refuse(given, f"{self.source.title} has no such key that this program knows. {advice}")
        elif not given.is_set:
            self.result.unneeded[key] = "not set"
        elif (shut := self._shut_gate(key)) is not None:
            if not given.is_default:
                self.result.unneeded[key] = f"counts only with {shut}"
        elif key in self.replaced:
            if not given.is_default:
                self.result.unneeded[key] = f"{self.replaced[key]} goes before it"
        else:
            self._by_line(line, given)

    def _shut_gate(self, key: str) -> str | None:
        """What would have to be set for the key to count; None where it does."""
        for gate in self.source.gates:
            if entries.is_among(key, gate.keys):
                held = self.all.get(gate.key) or self.all.get(gate.also)
                value = held.text.lower() if held is not None and held.is_set else gate.default
                if value not in gate.open and not ("*" in gate.open and value not in entries.Refused.off):
                    return gate.key if "*" in gate.open else f"{gate.key}: {' or '.join(gate.open)}"
        return None

    # By the kinds of lines

    def _by_line(self, line: entries.Entry, given: Given) -> None:
        match line:
            case entries.To():
                self._to(line, given)
            case entries.Switch():
                self._switch(line, given)
            case entries.Choice():
                self._choice(line, given)
            case entries.Factor():
                self.factors.setdefault(line.flag, []).append(given)
            case entries.Each():
                values = _items(given)
                if len(values) != len(line.flags) or not all(map(_is_number, values)):
                    self.result.refuse(given, f"{given.text!r} is not {len(line.flags)} numbers. Mend it.")
                for flag, value in zip(line.flags, values, strict=False):
                    self.result.set(flag, value, given)
            case entries.ShareOrCount():
                if not _is_number(given.text):
                    self.result.refuse(given, f"{given.text!r} is no number. Mend it.")
                elif (number := float(given.text)) != 0:
                    self.result.set(line.share if number < 1 else line.count, given.text, given)
                else:
                    self.result.unneeded[given.key] = "0 asks for nothing"
            case entries.Joined():
                self._joined(line, given)
            case entries.Loss():
                self._loss(line, given)
            case entries.Weights():
                self._weights(given)
            case entries.LossOption():
                self._loss_option(line, given)
            case entries.Unneeded():
                self.result.unneeded[given.key] = line.reason
            case entries.Refused():
                if _is_off(given, line.off):
                    self.result.unneeded[given.key] = f"{given.text} asks for nothing"
                else:
                    self.result.refuse(given, f"{_short(given.text)} cannot be had here. {line.advice}")

    def _to(self, line: entries.To, given: Given) -> None:
        if _is_off(given, line.off):
            self.result.unneeded[given.key] = f"{given.text} asks for nothing"
            return
        items = [line.words.get(item, item) for item in _items(given)]
        if isinstance(given.value, bool) or (line.kind not in ("list", "commas") and len(items) > 1):
            self.result.refuse(given, f"{_short(given.text)} is not the one value that --{line.flag} takes. Mend it.")
            return
        if (line.kind == "whole" and not re.fullmatch(r"[+-]?\d+(\.0+)?", items[0])) or (
            line.kind == "number" and not _is_number(items[0])
        ):
            self.result.refuse(given, f"{_short(items[0])} is no {'whole ' * (line.kind == 'whole')}number. Mend it.")
            return
        for part, advice in line.without.items():
            if any(part in item for item in items):
                self.result.refuse(given, f"{_short(given.text)} cannot be had here. {advice}")
                return
        whole = str(int(float(items[0])) * line.times) if line.kind == "whole" else items[0]
        value = {"list": items if len(items) > 1 else items[0], "commas": ",".join(items)}.get(line.kind, whole)
        self.result.set(line.flag, value, given)
        for flag, text in line.beside.items():
            self.result.set(flag, text.format(value), given)
        for flag, share in line.shares.items():
            self.result.set(flag, f"{float(items[0]) * share:g}", given)

    def _switch(self, line: entries.Switch, given: Given) -> None:
        value = {"true": True, "false": False, "auto": True}.get(given.text.lower())
        if value is None:
            self.result.refuse(given, f"{_short(given.text)} is neither true nor false. Mend it.")
        else:
            self.result.set(line.flag, value, given)

    def _choice(self, line: entries.Choice, given: Given) -> None:
        values = {word.lower(): meaning for word, meaning in line.values.items()}
        meaning = values.get(given.text.lower())
        if meaning is None:
            self.result.refuse(given, f"{_short(given.text)} cannot be had here. {line.otherwise}")
        elif isinstance(meaning, str):
            if not given.is_default:
                self.result.unneeded[given.key] = f"{given.text}: {meaning}"
        else:
            for flag, value in meaning.items():
                self.result.set(flag, value, given)
                if flag == "preference-loss":
                    self.loss = str(value)

    def _joined(self, line: entries.Joined, given: Given) -> None:
        names = re.findall(r"\{([\w.]+)\}", line.text)
        lacking = [name for name in names if name not in self.all or not self.all[name].is_set]
        if lacking:
            self.result.refuse(given, f"goes together with {', '.join(lacking)}, which is not there. Give both.")
        else:
            text = re.sub(r"\{([\w.]+)\}", lambda found: self.all[found[1]].text, line.text)
            self.result.set(line.flag, text, given)

    def _loss(self, line: entries.Loss, given: Given) -> None:
        instead = self.all.get(line.unless)
        if instead is not None and instead.is_set:
            self.result.unneeded[given.key] = f"{line.unless} says which loss"
            return
        ours, weights = self._ours(line, given), self.all.get(line.weights)
        if ours is None:
            return
        numbers = _items(weights) if weights is not None and weights.is_set else ["1"] * len(ours)
        if len(numbers) != len(ours) or not all(map(_is_number, numbers)):
            self.result.refuse(given, f"{line.weights} are not {len(ours)} numbers, one for each loss. Mend them.")
            return
        mix = ",".join(f"{own}={number}" for own, number in zip(ours, numbers, strict=True))
        self.loss = mix if len(ours) > 1 else ours[0]
        self.result.set("preference-loss", self.loss, given)
        if notes := [line.notes[own] for own in ours if own in line.notes]:
            self.result.notes["preference-loss"] = notes[0]

    def _ours(self, line: entries.Loss, given: Given) -> list[str] | None:
        """Our names of the losses; None where one is refused."""
        names, ours = self._names_of_losses(line), list[str]()
        for name in _items(given):
            own = names.get(name.lower(), name.lower())
            if isinstance(own, entries.Refused):
                self.result.refuse(given, f"{_short(name)} cannot be had here. {own.advice}")
                return None
            if own not in flag_table.read().losses:
                lists = "`megatron-bdpo losses` lists what there is."
                self.result.refuse(given, f"there is no loss {_short(name)} here. {lists}")
                return None
            ours.append(own)
        return ours

    def _names_of_losses(self, line: entries.Loss) -> dict[str, str | entries.Refused]:
        """Theirs -> ours, as the other keys have it."""
        names = {**line.names}
        for key, by_value in line.by_key.items():
            other = self.all.get(key)
            if other is not None and other.is_set:
                of_any = {} if _is_off(other, entries.Refused.off) else by_value.get("*", {})
                names |= by_value.get(other.text.lower(), of_any)
        return names

    def _weights(self, given: Given) -> None:
        if self.loss is None:
            self.result.unneeded[given.key] = "goes with the losses, which are refused"
        elif "=" in self.loss:
            self.result.set("preference-loss", self.loss, given)
        elif any(not _is_number(each) or float(each) != 1 for each in _items(given)):
            self.result.refuse(given, "the loss is one: its weight scales the gradient alone. Take it out.")
        else:
            self.result.unneeded[given.key] = "the loss is one"

    def _loss_option(self, line: entries.LossOption, given: Given) -> None:
        if _is_off(given, line.off):
            if not given.is_default:
                self.result.unneeded[given.key] = f"{given.text} asks for nothing"
            return
        name = line.by_loss.get(self.loss or "", line.name)
        if self.loss is not None and name not in flag_table.read().options_of(self.loss):
            if not given.is_default:
                self.result.refuse(given, f"the loss {self.loss} does not use it here. Take it out.")
        elif line.kind == "number" and not _is_number(given.text):
            self.result.refuse(given, f"{_short(given.text)} is no number. Mend it.")
        elif line.kind == "switch":
            self._switch(entries.Switch(name.replace("_", "-")), given)
        else:
            self.result.set(name.replace("_", "-"), given.text.lower() if line.kind == "word" else given.text, given)
            if line.note:
                self.result.notes[name.replace("_", "-")] = line.note

    def _of_policies_alone(self) -> None:
        """A reward model has no adapters and no reference."""
        if self.result.settings.get("objective") != "reward":
            return
        why = "is not for reward models: all weights are trained, and there is no reference. Take it out."
        for flag in [flag for flag in self.result.settings if flag.startswith(("lora-", "reference"))]:
            origin = self.result.origins.pop(flag)
            del self.result.settings[flag]
            given = [self.all[key] for key in origin.split(", ") if key in self.all and not self.all[key].is_default]
            for each in given:
                self.result.refuse(each, f"--{flag} {why}")
            if not given and flag == "lora-rank":  # adapters without a rank, which has a default
                self.result.refused[origin] = f"{origin}: --{flag} {why}"

    def _products(self) -> None:
        for flag, parts in self.factors.items():
            product = 1
            for given in parts:
                if not re.fullmatch(r"\d+", given.text) or int(given.text) < 1:
                    self.result.refuse(given, f"{_short(given.text)} is no whole number above 0. Mend it.")
                    continue
                product *= int(given.text)
            lines = [self.source.entry(given.key) for given in parts]
            if any(isinstance(line, entries.Factor) and line.of_each_process for line in lines):
                if self.processes is None:
                    keys, values = (" x ".join(each) for each in zip(*((g.key, g.text) for g in parts), strict=True))
                    self.result.refused[keys] = (
                        f"{keys}: --{flag} is {values} times the number of data-parallel processes. "
                        "Say that: --processes N."
                    )
                    continue
                product *= self.processes
            for given in parts:
                if given.key not in self.result.refused:
                    self.result.set(flag, str(product), given)


def _says_loss(line: entries.Entry | None) -> bool:
    """Whether other keys' meaning hangs on it."""
    if isinstance(line, entries.Choice):
        return any("preference-loss" in value for value in line.values.values() if not isinstance(value, str))
    return isinstance(line, entries.Loss)


def _defaults(source: Source, found: Mapping[str, Given]) -> dict[str, Given]:
    there = {key for key, given in found.items() if not _is_off(given, ("false",))}
    made = {}
    for key, default in source.defaults.items():
        if not (key in found and found[key].is_set) and not there.intersection(default.unless):
            where = f"{source.title}'s default of {key}"
            made[key] = Given(key, _value_of(default, found), where, is_default=True)
    return made


def _value_of(default: Default, found: Mapping[str, Given]) -> Any:
    same, by = found.get(default.same_as), found.get(default.by_key)
    value = default.value if by is None else default.by_value.get(by.text.lower(), default.value)
    return same.value if same is not None and same.is_set else value


def _items(given: Given) -> list[str]:
    return list(given.value) if isinstance(given.value, list) else [given.text]


def _is_off(given: Given, off: tuple[str, ...]) -> bool:
    """Whether it asks for nothing, of a list each item."""
    return not given.is_set or all(item.lower() in off for item in _items(given))


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
