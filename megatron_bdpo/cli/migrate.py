"""``megatron-bdpo migrate``: another trainer's configuration as a recipe of ours."""

from __future__ import annotations

import json
from pathlib import Path

import click

from megatron_bdpo.artifact import write_whole
from megatron_bdpo.cli.common import PATH, POSITIVE, example
from megatron_bdpo.display import show
from megatron_bdpo.errors import UserError
from megatron_bdpo.migrate import reading, recipe_text, translation
from megatron_bdpo.migrate.tables import SOURCES

_BY_NAME = {source.name: source for source in SOURCES}


@click.command("migrate", epilog=example("megatron-bdpo migrate dpo.yaml --processes 8 -o recipe.yaml"))
@click.argument("file", type=PATH)
@click.option("--from", "source", type=click.Choice(list(_BY_NAME)), help="Whose it is (default: by its keys).")
@click.option("-o", "--output", type=PATH, metavar="FILE", help="Where the recipe goes (default: to the terminal).")
@click.option(
    "--processes",
    type=POSITIVE,
    metavar="N",
    help="Data-parallel processes of that job, where its batch size is that of one of them.",
)
@click.option("--partial", is_flag=True, help="Write what can be translated; the rest as comments.")
@click.option("--json", "as_json", is_flag=True, help="For programs: what became of each key.")
def migrate(
    file: Path, source: str | None, output: Path | None, processes: int | None, partial: bool, as_json: bool
) -> None:
    """Turn another trainer's configuration into a recipe.

    FILE is YAML, or a shell script that starts a training run, of TRL, ms-swift, LLaMA-Factory, axolotl, NeMo-RL or
    OpenRLHF. Each of its keys becomes a flag, has no effect here, for a reason that is told, or is refused by its name.
    """
    found, program = reading.read(file, {each.name: each.program for each in SOURCES})
    name = source or program
    table = _BY_NAME[name] if name else translation.recognise(found, SOURCES)
    result = translation.translate(found, table, processes)
    if as_json:
        print(json.dumps(recipe_text.summary(result), indent=1))
    elif result.refused and not partial:
        _refuse(result)
    else:
        _write(result, file, output)


def _refuse(result: translation.Translation) -> None:
    if len(result.refused) == 1:
        raise UserError(next(iter(result.refused.values())))
    show("cannot be translated:", *(f"  {why}" for why in result.refused.values()))
    raise UserError(
        f"{len(result.refused)} keys cannot be translated: {', '.join(result.refused)}. Change them as is said above, "
        "or add --partial, which writes the rest."
    )


def _write(result: translation.Translation, file: Path, output: Path | None) -> None:
    text = recipe_text.recipe_text(result, file.name)
    if output is None:
        click.echo(text, nl=False)
        return
    try:
        write_whole(output, text)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error}. Give another --output.") from error
    show(
        f"{output}: {len(result.settings)} flags, from {result.source.title}; {len(result.unneeded)} keys without "
        f"effect here and {len(result.refused)} that are not translated are comments at its end.",
        f"What it comes to: megatron-bdpo train --recipe {output} --dry-run RANKS",
    )
