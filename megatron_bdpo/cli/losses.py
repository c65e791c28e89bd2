"""``megatron-bdpo losses``: every loss of the registry, also those that installed packages add."""

from __future__ import annotations

import json
from typing import Any

import click

from megatron_bdpo.cli.common import example
from megatron_bdpo.display import Block, Facts, Table, show


@click.command("losses", epilog=example("megatron-bdpo losses bdpo"))
@click.argument("name", required=False)
@click.option("--loss-file", metavar="FILE", help="Try the loss in a Python file, and explain it.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@click.option("--markdown", is_flag=True, help="A table for a document.")
def losses(name: str | None, loss_file: str | None, as_json: bool, markdown: bool) -> None:
    """List the losses: what each reads, its options, its source.

    With NAME, that loss alone, with the meaning of its options.
    """
    from megatron_bdpo.losses import description, registry  # imports torch

    if as_json and markdown:
        raise click.UsageError("--json and --markdown are two forms of one output. Give one.")
    if loss_file and name:
        raise click.UsageError("NAME and --loss-file each name a loss. Give one.")
    if own := registry.use_file(loss_file):
        name = own.spec.name
    specs = registry.all_specs() if name is None else (registry.get(name),)
    described = [description.describe(spec) for spec in specs]
    if as_json:
        print(json.dumps(described, indent=1))
    elif markdown:
        print("\n".join(_markdown(described)))
    elif name is None:
        show(_table(described), "All options of one, with their meaning: megatron-bdpo losses NAME")
    else:
        show(*_explained(described[0]))


def _with_default(option: dict[str, Any]) -> str:
    """An option with its default: ``--beta 0.1``; a switch as the flag that changes it."""
    flag, default = option["flag"], option["default"]
    if isinstance(default, bool):
        return f"--no-{flag.removeprefix('--')}" if default else flag
    told = f"{flag} {default:g}" if isinstance(default, int | float) else f"{flag} {default}"
    others = [choice for choice in option["choices"] if choice != default]
    return f"{told} (or {', '.join(others)})" if others else told


def _reads(loss: dict[str, Any]) -> str:
    return ", ".join(loss["reads"]) or "nothing but the policy"


def _own(loss: dict[str, Any]) -> list[dict[str, Any]]:
    """The loss's options without those of many losses."""
    return [option for option in loss["options"] if not option["modifier"]]


def _table(described: list[dict[str, Any]]) -> Table:
    rows = [
        [
            loss["name"],
            f"{loss['summary']}\nreads {_reads(loss)}\n{loss['source']}",
            "\n".join(_with_default(option).replace(" (or", "\n  (or") for option in _own(loss)),
        ]
        for loss in described
    ]
    return Table(["name", "what it is", "options (defaults)"], rows, left=range(3), whole=(0, 2))


def _explained(loss: dict[str, Any]) -> list[Block]:
    options = [[_with_default(option), _meaning(option)] for option in loss["options"]]
    return [
        Facts([(loss["name"], loss["summary"]), ("reads", _reads(loss)), ("source", loss["source"])], indent=0),
        "",
        Table(["option (default)", "meaning"], options, left=(0, 1), whole=(0,)),
    ]


def _meaning(option: dict[str, Any]) -> str:
    """A switch that is on is shown as the flag that turns it off."""
    return f"switches this off: {option['help']}" if option["default"] is True else option["help"]


def _markdown(described: list[dict[str, Any]]) -> list[str]:
    rows = [["name", "what it is", "reads", "options (defaults)", "source"], ["---"] * 5]
    for loss in described:
        options = ", ".join(f"`{_with_default(option)}`" for option in _own(loss))
        reads = ", ".join(loss["reads"]) or "nothing"
        rows.append([f"`{loss['name']}`", loss["summary"], reads, options, loss["source"]])
    return [*_lines(rows), "", *_lines(_modifiers(described))]


def _modifiers(described: list[dict[str, Any]]) -> list[list[str]]:
    """Rows of the options that many losses have."""
    options = {option["flag"]: option for loss in described for option in loss["options"] if option["modifier"]}
    rows = [["option (default)", "meaning", "with"], ["---"] * 3]
    for flag, option in options.items():
        names = [loss["name"] for loss in described if flag in (each["flag"] for each in loss["options"])]
        every = names == [loss["name"] for loss in described if loss["of"] == "pairs"]
        losses = "every loss of pairs" if every else ", ".join(f"`{name}`" for name in names)
        rows.append([f"`{_with_default(option)}`", option["help"], losses])
    return rows


def _lines(rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]
