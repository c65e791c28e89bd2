"""The schema of recipes says what the reader of recipes does, so that an editor's red line means something."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest
import yaml

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.flags import flag_table, recipe
from tests.harness.documents import ROOT
from tools import recipe_schema

RECIPES = sorted(path for place in ("recipes", "examples") for path in (ROOT / place).rglob("*.yaml"))


@pytest.fixture(scope="module")
def wrong_in():
    """What the schema says of a recipe's text: places and messages, none where all is well."""
    content = json.loads(recipe_schema.FILE.read_text("utf-8"))
    jsonschema.Draft7Validator.check_schema(content)
    validator = jsonschema.Draft7Validator(content)

    def wrong(text: str) -> list[str]:
        return [
            f"{'/'.join(map(str, error.path))}: {error.message}"
            for error in validator.iter_errors(yaml.safe_load(text))
        ]

    return wrong


def test_it_is_what_the_table_of_flags_says():
    expected = recipe_schema.text(flag_table.read())
    assert recipe_schema.FILE.read_text("utf-8") == expected, "python tools/flag_table.py writes it anew"


@pytest.mark.parametrize("path", RECIPES, ids=[str(path.relative_to(ROOT)) for path in RECIPES])
def test_every_recipe_names_it_and_keeps_to_it(path, wrong_in):
    text = path.read_text("utf-8")
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert named is not None and (path.parent / named[1]).resolve() == recipe_schema.FILE
    assert wrong_in(text) == []


@pytest.mark.parametrize(
    ("text", "expected_words"),
    [
        ("num_layers: 4", ["'num_layers' was unexpected"]),
        ("pair-dta: a.jsonl", ["'pair-dta' was unexpected"]),
        ("recipe: other.yaml", ["'recipe' was unexpected"]),
        ("num-layers: many", ["num-layers: 'many'"]),
        ("num-layers: 4.5", ["num-layers: 4.5"]),
        ("lr: fast", ["lr: 'fast'"]),
        ("lr: [1, 2]", ["lr: [1, 2]"]),
        ("bf16: 1", ["bf16: 1"]),
        ("save: true", ["save: True"]),
        ("reference: none", ["reference: 'none'"]),
        ("pair-data: []", ["pair-data: []"]),
        ("pair-data: [null]", ["pair-data: [None]"]),
        ("rampup-batch-size: [1, 2]", ["rampup-batch-size: [1, 2]"]),
        ("- lr", ["is not of type 'object'"]),
        ("{preference-loss: 'dpo=0.7, sft=0.3', exponential-cap: 2}", ["'exponential-cap' was unexpected"]),
        ("{preference-loss: exponential, lr: fast}", ["lr: 'fast'"]),
    ],
)
def test_a_wrong_recipe_is_refused(wrong_in, text, expected_words):
    (told,) = wrong_in(text)
    assert all(word in told for word in expected_words), told


@pytest.mark.parametrize(
    "text",
    [
        "{preference-loss: 'dpo=0.7, sft=0.3', beta: 0.1}",
        "{preference-loss: exponential, exponential-cap: 2}",
        "{preference-loss: 'exponential=1,sft=0.1', exponential-cap: 2}",
        "{loss-file: my_loss.py, exponential-cap: 2}",
        "preference-loss: null",
    ],
)
def test_what_it_cannot_know_is_not_refused(wrong_in, text):
    """Mixes, and losses that other packages or a file bring, with their options."""
    assert wrong_in(text) == []


#: Of each shape of flag the first.
SHAPES = {
    (flag.kind, flag.nargs, flag.type, flag.choices is None, flag.names[0][:5] == "--no-"): flag
    for flag in reversed([flag for flags in flag_table.read().groups.values() for flag in flags])
    if recipe.NOT_IN_RECIPES.isdisjoint(flag.names)
}
#: Without 1.0 for a whole number: to a JSON schema it is one.
VALUES = [
    "true", "false", "null", "3", "'3'", "-3", "1_0", "'1_0'", "'3x'", "0.5", "5e-7", ".5", "'1.'", "'1__0'", "inf",
    "-NaN", "word", "''", "${SET}", "[]", "[3]", "[3, 4, 5]", "[0.5]", "[a, b]", "[null]", "[true]", "{a: 1}",
]  # fmt: skip


@pytest.mark.parametrize("flag", SHAPES.values(), ids=[flag.names[0] for flag in SHAPES.values()])
def test_it_takes_what_the_reader_takes(wrong_in, monkeypatch, tmp_path, flag):
    """And nothing else, of every shape of flag there is and under every one of its names."""
    monkeypatch.setenv("SET", "3" if flag.choices is None else flag.choices[0])
    parser = flag_table.read().parser()

    def refuse(message: str) -> None:
        raise UserError(message)

    monkeypatch.setattr(parser, "error", refuse)
    values = [*VALUES, *(json.dumps(choice) for choice in flag.choices or ())]
    for text in (f"{name.removeprefix('--')}: {value}" for name in flag.all_names for value in values):
        (tmp_path / "recipe.yaml").write_text(text)
        try:
            recipe.expand(parser, ["--recipe", str(tmp_path / "recipe.yaml")])
        except UserError as error:
            assert wrong_in(text), f"{text}: {error}"
        else:
            assert wrong_in(text) == [], text
