"""What a table says of a key of another trainer: which flag it is here, why it has no effect, or why it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

type Value = bool | str | list[str] | None
type Settings = Mapping[str, bool | str | list[str]]
"""Of a recipe: flags without their dashes."""


@dataclass(frozen=True)
class To:
    """One flag of the same meaning."""

    flag: str
    kind: Literal["text", "number", "whole", "list", "commas"] = "text"
    """``list``: one value or several; ``commas``: those in one word."""
    words: Mapping[str, str] = field(default_factory=dict)
    """Theirs -> ours, where they differ."""
    off: tuple[str, ...] = ()
    """Values that mean that it is not set."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """Further flags; ``{}`` in their values is the value."""
    replaces: tuple[str, ...] = ()
    """Keys that have no effect where this is set."""
    times: int = 1
    """Of a whole number, what it is multiplied by."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Further flags, whose values are this share of a number."""
    without: Mapping[str, str] = field(default_factory=dict)
    """What must not be in the value -> what to do about it."""


@dataclass(frozen=True)
class Switch:
    """A flag that is on or off."""

    flag: str


@dataclass(frozen=True)
class Choice:
    """Some values, each with what it is here: settings, or the reason why it is nothing."""

    values: Mapping[str, Settings | str]
    otherwise: str
    """What to do about any other value."""


@dataclass(frozen=True)
class Factor:
    """One of the whole numbers whose product is a flag."""

    flag: str
    of_each_process: bool = False
    """The number of processes is another factor."""


@dataclass(frozen=True)
class Each:
    """A list with a number for each flag."""

    flags: tuple[str, ...]


@dataclass(frozen=True)
class ShareOrCount:
    """Below 1 a share, which is one flag, else a number, which is another."""

    share: str
    count: str


@dataclass(frozen=True)
class Joined:
    """A flag whose value is made of several keys."""

    flag: str
    text: str
    """With keys in braces."""


@dataclass(frozen=True)
class Loss:
    """Which loss it is, or which they are. Names that are not here are looked up as they are."""

    names: Mapping[str, str | Refused]
    """Theirs -> ours, or why it is another loss than ours of that name."""
    weights: str = ""
    """The key with the weights of several."""
    unless: str = ""
    """A key that says it instead, where it is set."""
    by_key: Mapping[str, Mapping[str, Mapping[str, str | Refused]]] = field(default_factory=dict)
    """Another key -> its value, or ``*`` for any that asks for something -> what ``names`` are then."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Ours -> what is not quite the same there, for the recipe's reader."""


@dataclass(frozen=True)
class Weights:
    """The weights of several losses."""


@dataclass(frozen=True)
class LossOption:
    """An option of the loss."""

    name: str
    by_loss: Mapping[str, str] = field(default_factory=dict)
    """Loss -> the option's name there, where that is another."""
    off: tuple[str, ...] = ()
    """Values that mean that it is not used."""
    kind: Literal["number", "word", "switch"] = "number"
    note: str = ""
    """What is not quite the same there, for the recipe's reader."""


@dataclass(frozen=True)
class Unneeded:
    """Without effect here."""

    reason: str


@dataclass(frozen=True)
class Refused:
    """Not to be had here."""

    advice: str
    off: tuple[str, ...] = ("false", "no", "none", "0", "0.0")
    """Values that ask for nothing."""


type Entry = (
    To | Switch | Choice | Factor | Each | ShareOrCount | Joined | Loss | Weights | LossOption | Unneeded | Refused
)


@dataclass(frozen=True)
class Default:
    """What a trainer does where a key is not there, and we would do something else."""

    value: str
    unless: tuple[str, ...] = ()
    """Keys that, where they are set, take its place."""
    same_as: str = ""
    """A key whose value it is, where that is given."""
    by_key: str = ""
    """A key on whose value it hangs:"""
    by_value: Mapping[str, str] = field(default_factory=dict)
    """that key's value -> what it then is."""


@dataclass(frozen=True)
class Gate:
    """Keys that count only while another one has certain values."""

    key: str
    open: tuple[str, ...]
    keys: tuple[str, ...]
    """``a.b.*`` is all below ``a.b``."""
    default: str = "false"
    """What the key is where it is not given."""
    also: str = ""
    """Another name of the key."""


@dataclass(frozen=True)
class Source:
    """Another trainer, as a table."""

    name: str
    title: str
    keys: Mapping[str, Entry]
    """Also ``a.b.*``."""
    defaults: Mapping[str, Default]
    gates: tuple[Gate, ...] = ()
    always: Settings = field(default_factory=dict)
    """What its configurations are, whatever their keys say."""
    program: str = ""
    """Regular expression for the words of a shell script behind which its flags stand."""
    variant_of: str = ""
    """Another source that has the same keys, where no key tells them apart."""

    def entry(self, key: str) -> Entry | None:
        """Of a key: its own line, or that of the nearest ``a.b.*`` around it."""
        if key in self.keys:
            return self.keys[key]
        parts = key.split(".")
        around = (".".join([*parts[:count], "*"]) for count in range(len(parts) - 1, 0, -1))
        return next((self.keys[name] for name in around if name in self.keys), None)


def is_among(key: str, names: tuple[str, ...]) -> bool:
    """Whether a key is one of the names, or below one that ends in ``.*``."""
    return any(key == name or (name.endswith(".*") and key.startswith(name[:-1])) for name in names)


def same(names: str, kind: Literal["text", "number", "whole", "list", "commas"] = "text") -> dict[str, Entry]:
    """Lines of a table: keys that are flags of the same name."""
    return {name: To(name.replace("_", "-"), kind) for name in names.split()}


def switches(names: str) -> dict[str, Entry]:
    """Lines of a table: keys that are switches of the same name."""
    return {name: Switch(name.replace("_", "-")) for name in names.split()}


def unneeded(reason: str, names: str) -> dict[str, Entry]:
    """Lines of a table: keys without effect for one reason."""
    return {name: Unneeded(reason) for name in names.split()}


def refused(advice: str, names: str, off: tuple[str, ...] = Refused.off) -> dict[str, Entry]:
    """Lines of a table: keys that are refused with one advice."""
    return {name: Refused(advice, off) for name in names.split()}
