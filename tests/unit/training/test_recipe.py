"""Recipes: a YAML file says what a command line can say, and what it says wrong is refused with file, line and key."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_bdpo.errors import UserError
from megatron_bdpo.training.flags import recipe

RECIPES = Path(__file__).parents[3] / "recipes"


def make_parser() -> argparse.ArgumentParser:
    """One flag of each kind that Megatron's parser has."""

    def refuse(message: str) -> None:
        raise UserError(message)

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--save")
    parser.add_argument("--reference", choices=("precomputed", "resident"), default="precomputed")
    parser.add_argument("--pair-data", nargs="+")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    parser.add_argument("--pack-pairs", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--round", action="store_true", default=True)
    parser.add_argument("--no-round", action="store_false", dest="round")
    parser.add_argument("--persist", action="store_true", default=True)
    parser.error = refuse  # type: ignore[assignment]
    return parser


@pytest.fixture
def expand(tmp_path):
    """The flags of recipes, given as texts, and of a command line after them."""

    def run(*recipes: str, rest: tuple[str, ...] = ()) -> list[str]:
        flags = []
        for number, text in enumerate(recipes):
            path = tmp_path / f"{number}.yaml"
            path.write_text(text)
            flags += ["--recipe", str(path)]
        return recipe.expand(make_parser(), [*flags, *rest])

    return run


@pytest.mark.parametrize(
    ("text", "expected_flags"),
    [
        ("num-layers: 80", ["--num-layers=80"]),
        ("lr: 5e-7", ["--lr=5e-7"]),
        ("lr: -1", ["--lr=-1"]),
        ("save: '8'", ["--save=8"]),
        ("save: 'yes'", ["--save=yes"]),
        ("pair-data: a.jsonl", ["--pair-data=a.jsonl"]),
        ("pair-data: [2, a.jsonl, 0.5, b c.jsonl]", ["--pair-data", "2", "a.jsonl", "0.5", "b c.jsonl"]),
        ("bf16: true", ["--bf16"]),
        ("bf16: false", []),
        ("bf16: null", []),
        ("disable-bias-linear: true", ["--disable-bias-linear"]),
        ("disable-bias-linear: false", []),
        ("pack-pairs: false", ["--no-pack-pairs"]),
        ("no-pack-pairs: true", ["--no-pack-pairs"]),
        ("no-pack-pairs: false", ["--pack-pairs"]),
        ("round: false", ["--no-round"]),
    ],
)
def test_a_line_is_its_flag(expand, text, expected_flags):
    assert expand(text) == expected_flags


def test_later_recipes_win_and_the_command_line_wins_over_all(expand):
    flags = expand(
        '{num-layers: 80, lr: 1, bf16: true, pack-pairs: false, save: "${UNSET_HERE}"}',
        "{lr: 2, bf16: false, no-pack-pairs: false}",
        rest=("--num-layers", "4", "--save=here"),
    )
    args = make_parser().parse_args(flags)
    assert (args.num_layers, args.lr, args.bf16, args.pack_pairs, args.save) == (4, 2.0, False, True, "here")


def test_recipes_on_the_command_line(tmp_path):
    (tmp_path / "a.yaml").write_text("lr: 1\nbf16: true")
    flags = ["--num-layers=2", f"--recipe={tmp_path}/a.yaml", "--recipe", "{lr: null, bf16: null}"]
    assert recipe.expand(make_parser(), flags) == ["--num-layers=2"]


def test_values_from_the_environment(expand, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("UNSET_HERE", raising=False)
    assert expand("pair-data: ['${DATA}/a', '${RECIPE_DIR}/b', ~/c, '${UNSET_HERE:-org/d}', $DATA, e~/f]") == [
        "--pair-data", "/data/a", f"{tmp_path}/b", "/home/someone/c", "org/d", "$DATA", "e~/f",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected_words"),
    [
        ("bf16: true\nnum_layers: 4", ["0.yaml, line 2, num_layers", "Did you mean num-layers?"]),
        ("nothing-like-it: 4", ["0.yaml, line 1, nothing-like-it", "no flag of that name"]),
        ("recipe: other.yaml", ["line 1, recipe", "no flag of that name"]),
        ("help: true", ["line 1, help", "no flag of that name"]),
        ("\nlr: fast", ["0.yaml, line 2, lr", "invalid float value: 'fast'"]),
        ("num-layers: 4.5", ["line 1, num-layers", "invalid int value: '4.5'"]),
        ("reference: none", ["line 1, reference", "invalid choice: 'none'"]),
        ("bf16: 1", ["line 1, bf16", "takes true or false"]),
        ("bf16: [true]", ["line 1, bf16", "a list of numbers and strings"]),
        ("save: true", ["line 1, save", "takes a value (in quotes"]),
        ("lr: [1, 2]", ["line 1, lr", "takes one value, not a list"]),
        ("pair-data: []", ["line 1, pair-data", "expected at least one argument"]),
        ("lr: {a: 1}", ["line 1, lr", "a value is a number"]),
        ("persist: false", ["line 1, persist", "on by default", "no flag to switch it off"]),
        ("lr: 1\nbf16: true\nlr: 2", ["0.yaml, line 3, lr", "line 1 too"]),
        ("lr: 1\n lr: 2", ["0.yaml, line 2", "not YAML"]),
        ("lr: @x", ["0.yaml, line 1", "not YAML"]),
        ("- lr", ["0.yaml", "a recipe is a mapping"]),
        ("", ["0.yaml", "a recipe is a mapping"]),
        ("? [a, b]\n: 1", ["line 1", "a key has to be a flag"]),
        ("save: ${UNSET_HERE}/x", ["0.yaml, line 1, save", "no UNSET_HERE", "override --save"]),
    ],
)
def test_mistakes_are_refused_with_file_line_and_key(expand, text, expected_words):
    with pytest.raises(UserError) as refused:
        expand(text)
    assert [word for word in expected_words if word not in str(refused.value)] == []


@pytest.mark.parametrize("flags", [["--recipe"], ["--recipe", "not/there.yaml"], ["--recipe", "/"]])
def test_a_recipe_that_is_not_there(flags):
    with pytest.raises(UserError, match="--recipe"):
        recipe.expand(make_parser(), flags)


EVERYTHING = [
    "--num-layers", "80", "--lr=5e-7", "--save", "true", "--reference", "precomputed", "--pair-data", "2", "a b.jsonl",
    "null", "--bf16", "--disable-bias-linear", "--no-pack-pairs", "--no-round",
]  # fmt: skip


def test_what_was_given_comes_back_as_a_recipe(expand):
    text = recipe.to_yaml(recipe.given(make_parser(), EVERYTHING))
    assert "num-layers: 80\nlr: 5e-7\n" in text
    assert make_parser().parse_args(expand(text)) == make_parser().parse_args(EVERYTHING)


def test_each_start_that_differs_is_kept(tmp_path):
    first = recipe.keep(tmp_path, {"lr": "1"}, {"ranks": 8})
    again = recipe.keep(tmp_path, {"lr": "1"}, {"ranks": 8})
    more_ranks = recipe.keep(tmp_path, {"lr": "1"}, {"ranks": 16})
    back = recipe.keep(tmp_path, {"lr": "1"}, {"ranks": 8})
    assert [path.name for path in (first, again, more_ranks, back)] == [
        "recipe.yaml", "recipe.yaml", "recipe.2.yaml", "recipe.3.yaml",
    ]  # fmt: skip
    assert first.read_text() == "# ranks: 8\n\nlr: 1\n"
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "recipe.2.yaml", "recipe.3.yaml"}


def parsed(flags: list[str]) -> dict[str, object]:
    from megatron_bdpo.training.flags.arguments import Arguments
    from megatron_bdpo.training.flags.refusals import refuse_what_cannot_be_honoured

    arguments = Arguments.parse(flags)
    if not arguments.settings.model.hf_model:
        refuse_what_cannot_be_honoured(arguments.megatron)
    return arguments.recipe


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_megatron_knows_the_flags_of_the_shipped_recipes(ranks, path):
    """That whole jobs of them pass every check is seen in test_dry_run."""
    named = ["--pair-data", "pairs.jsonl", "--save", "run", "--load", "run"]
    (found,) = ranks(1)(parsed, ["--recipe", str(path), *(named if "RUN_DIR" in path.read_text() else [])])
    assert found["seq-length"].isdigit()
    assert found["lr"]


def start_and_parse_again(flags: list[str], directory: str) -> tuple[dict[str, object], dict[str, object]]:
    """The arguments of a job that is run, and those of the recipe that it leaves behind."""
    from megatron_bdpo.training import entry
    from megatron_bdpo.training.flags.arguments import Arguments

    entry.train(flags)
    given, kept = (Arguments.parse(each) for each in (flags, ["--recipe", f"{directory}/recipe.yaml"]))
    return vars(given.megatron), vars(kept.megatron)


def test_what_a_run_keeps_starts_it_again(ranks, tmp_path):
    save = tmp_path / "run"
    job = f"--train-iters 1 --max-pairs 32 --eval-iters 0 --save-interval 1 --pair-cache-dir {tmp_path} --no-pack-pairs"
    flags = ["--recipe", str(RECIPES / "tiny.yaml"), "--recipe", "{lr-warmup-fraction: null}", *job.split()]
    ((given, kept),) = ranks(1)(start_and_parse_again, [*flags, "--save", str(save)], str(save))
    assert kept == given
    text = (save / "recipe.yaml").read_text()
    assert text.startswith("# ranks: 1\n# started in: ")
    assert "# megatron-core: 0.19" in text
    assert "lr-warmup-fraction" not in text
