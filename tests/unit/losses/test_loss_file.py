"""A loss in a plain file: used like any other, its digest is part of the run, and what it lacks is told."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from megatron_bdpo.errors import UserError
from megatron_bdpo.losses import PairLogProbs, registry

EXAMPLE = Path(__file__).parents[3] / "examples" / "own_loss" / "own_loss" / "__init__.py"

#: A whole file; the cases below spoil a line of it.
SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
from megatron_bdpo.losses import LossOptions, LossSpec, PairLosses, Requirements, option

@dataclass(frozen=True)
class Options(LossOptions):
    shift: float = option(1.0, "what is added")

def shifted(pairs, options):
    gap = pairs.policy_rejected - pairs.policy_chosen
    return PairLosses(gap + options.shift, -gap.detach(), gap.detach())

SPEC = LossSpec("shifted", shifted, Options, lambda options: Requirements(), "a loss of a file", "none")
"""


@pytest.fixture(autouse=True)
def forgotten():
    yield
    registry.use_file(None)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """``my_loss.py`` in the working directory, with this text."""
    monkeypatch.chdir(tmp_path)

    def write(text: str = SOURCE) -> str:
        Path("my_loss.py").write_text(text)
        return "my_loss.py"

    return write


def test_a_loss_of_a_file_is_one_of_all(file):
    found = registry.use_file(file())
    assert found is not None and found.digest == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert registry.file_of("shifted") is found and registry.file_of("dpo") is None
    assert "shifted" in registry.names() and registry.option_fields()["shift"].defaults == {"shifted": 1.0}
    options = registry.build_options("shifted", {"shift": 0.25})
    one = torch.ones(1, dtype=torch.int64)
    losses = registry.get("shifted").function(
        PairLogProbs(torch.tensor([-5.0]), torch.tensor([-9.0]), one, one), options
    )
    assert losses.loss.item() == -9.0 + 5.0 + 0.25
    with pytest.raises(UserError, match="--shift must be of type float"):
        registry.build_options("shifted", {"shift": "much"})


def test_another_file_takes_its_place(file):
    registry.use_file(file())
    registry.use_file(file(SOURCE.replace('"shifted"', '"moved"')))
    assert "moved" in registry.names() and "shifted" not in registry.names()
    registry.use_file(None)
    assert "moved" not in registry.names()


def test_the_example_is_a_file_too():
    assert registry.use_file(str(EXAMPLE)) and "exponential" in registry.names()


def changed(before: str, after: str) -> str:
    assert before in SOURCE
    return SOURCE.replace(before, after)


OF_GROUPS = """
from megatron_bdpo.losses import GroupLosses, LossOptions, LossSpec, Requirements

def spread(groups, options):
    delta = (groups.policy - groups.reference) * groups.present
    return GroupLosses(delta.var(1), delta.detach())

SPEC = LossSpec("spread", spread, LossOptions, lambda options: Requirements(reference=True), "", "", takes="groups")
"""

WRONG_OF_GROUPS = {
    "pairs": ("groups.policy", "groups.policy_chosen", "cannot be computed: AttributeError"),
    "no-result": ("return GroupLosses", "GroupLosses", "returns a NoneType. Return GroupLosses(loss, reward, ...)."),
    "mean": ("delta.var(1)", "delta.var()", "loss of two groups is [], not [2]. Give a value per group"),
    "reward": ("delta.detach()", "delta.detach().mean(1)", "reward of two groups is [2], not [2, 3]"),
    "carried": ("delta.detach()", "delta", "reward carries a gradient. Detach it"),
    "constant": (
        "delta.var(1)",
        "delta.detach().var(1)",
        "its loss has no gradient. Compute it from policy, in torch.",
    ),
    "unread": ("reference=True", "", "Say in requirements what it reads"),
}


def test_a_loss_of_groups_in_a_file(file):
    found = registry.use_file(file(OF_GROUPS))
    assert found is not None and found.spec.takes == "groups" and "spread" in registry.names()


OF_ANSWERS = """
from megatron_bdpo.losses import AnswerLosses, LossOptions, LossSpec, Requirements

def pulled(answers, options):
    delta = answers.policy - answers.reference
    return AnswerLosses((delta - (0 if answers.shift is None else answers.shift)) ** 2, delta.detach())

def mean(answers, options):
    return (answers.policy - answers.reference).mean()

READS = Requirements(reference=True)
SPEC = LossSpec("pulled", pulled, LossOptions, lambda options: READS, "", "", takes="answers", step_shift=mean)
"""

WRONG_OF_ANSWERS = {
    "no-result": ("return AnswerLosses", "AnswerLosses", "returns a NoneType. Return AnswerLosses(loss, reward, ...)."),
    "mean": (") ** 2", ").mean() ** 2", "loss of two answers is [], not [2]. Give a value per answer"),
    "carried": ("delta.detach()", "delta", "reward carries a gradient. Detach it"),
    "unread": ("reference=True", "", "Say in requirements what it reads"),
    "without-a-step": ("0 if answers.shift is None else ", "", "cannot be computed: TypeError"),
    "shift": (").mean()", ")", "step_shift of two answers is [2], not []. Give one number for the step"),
    "no-shift": ("return (answers.policy - answers.reference).mean()", "return 0.5", "of two answers is float, not []"),
}


def test_a_loss_of_answers_in_a_file(file):
    found = registry.use_file(file(OF_ANSWERS))
    assert found is not None and found.spec.takes == "answers" and "pulled" in registry.names()


OF_STEPS = """
from megatron_bdpo.losses import LossOptions, LossSpec, PairLosses, Requirements

def aimed(pairs, options):
    gap = pairs.policy_rejected - pairs.policy_chosen
    aim = 0 if pairs.chosen_target is None else pairs.rejected_target - pairs.chosen_target
    return PairLosses((gap - aim) ** 2, -gap.detach(), gap.detach())

def targets(pairs, options):
    return pairs.policy_chosen.sort().values, pairs.reference_rejected.sort().values

READS = Requirements(reference=True)
SPEC = LossSpec("aimed", aimed, LossOptions, lambda options: READS, "", "", step_targets=targets)
"""

WRONG_OF_STEPS = {
    "one": (", pairs.reference_rejected.sort().values", "", "step_targets of two pairs is [2], not [[2], [2]]. Give"),
    "a-number": ("reference_rejected.sort().values", "reference_rejected.mean()", "of two pairs is [[2], []], not"),
    "unread": ("reference=True", "", "Say in requirements what it reads"),
    "always-aimed": ("0 if pairs.chosen_target is None else ", "", "cannot be computed: TypeError"),
    "square": ("- pairs.chosen_target", "- pairs.chosen_target[:, None]", "loss of two pairs is [2, 2], not [2]"),
}


def test_a_loss_that_looks_at_steps_in_a_file(file):
    found = registry.use_file(file(OF_STEPS))
    assert found is not None and found.spec.step_targets and "aimed" in registry.names()


WRONG_OF = {
    f"{kind} {case}": (source, *wrong)
    for kind, source, cases in (
        ("groups", OF_GROUPS, WRONG_OF_GROUPS),
        ("answers", OF_ANSWERS, WRONG_OF_ANSWERS),
        ("steps", OF_STEPS, WRONG_OF_STEPS),
    )
    for case, wrong in cases.items()
}


@pytest.mark.parametrize("case", WRONG_OF)
def test_what_is_wrong_with_a_loss_of_another_kind(file, case):
    source, before, after, expected = WRONG_OF[case]
    assert before in source
    names = registry.names()
    with pytest.raises(UserError) as caught:
        registry.use_file(file(source.replace(before, after)))
    assert expected in str(caught.value) and registry.names() == names


WRONG = {
    "no-python": (changed("def shifted(", "def shifted"), r", line \d+: cannot be run: "),
    "raises": (
        changed("from dataclasses", "import no_such_module\nfrom dataclasses"),
        ", line 3: cannot be run",
    ),
    "no-spec": (changed("SPEC =", "LOSS ="), " defines no SPEC. Add `SPEC = LossSpec(name="),
    "no-loss-spec": (changed("SPEC =", "SPEC = shifted\nOTHER ="), ": SPEC is a function. Make it a LossSpec"),
    "too-few-fields": (changed(', "none")', ")"), ", line 14: cannot be run: TypeError: .*'source'"),
    "taken": (changed('"shifted"', '"dpo"'), ": the loss name 'dpo' is taken. Choose another one"),
    "thawed": (
        changed("(frozen=True)", "(frozen=False)").replace("(LossOptions)", ""),
        "have to be a frozen",
    ),
    "no-default": (
        changed('= option(1.0, "what is added")', ""),
        ": the option --shift of loss .* has no default",
    ),
    "unknown-type": (changed("shift: float", "shift: Flaot"), ": name 'Flaot' is not defined"),
    "another-beta": (
        changed("shift: float", "beta: int").replace("1.0,", "1,").replace(".shift", ".beta"),
        "--beta has",
    ),
    "mean": (
        changed("(gap + options.shift,", "((gap + options.shift).mean(),"),
        r"loss of two pairs is \[\], not \[2\]",
    ),
    "no-result": (changed("return PairLosses", "PairLosses"), "its function returns a NoneType. Return PairLosses"),
    "no-gradient": (changed("(gap + options", "(gap.detach() + options"), "its loss has no gradient. Compute it from"),
    "rewards": (changed("-gap.detach()", "-gap"), "chosen_reward carries a gradient. Detach it"),
    "reads-more": (
        changed("gap = pairs.policy_rejected", "gap = pairs.reference_rejected"),
        ", line 11: the loss 'shifted' cannot be computed: TypeError: .* Say in requirements what it reads",
    ),
    "requirements": (changed("Requirements(),", "None,"), "requirements returns a NoneType. Return Requirements"),
}


@pytest.mark.parametrize("case", sorted(WRONG))
def test_what_is_wrong_with_a_file(file, case):
    text, expected = WRONG[case]
    with pytest.raises(UserError, match=r"^--loss-file my_loss\.py.*" + expected.replace("(", r"\(")):
        registry.use_file(file(text))
    assert "shifted" not in registry.names()


def test_files_that_cannot_be_read(tmp_path):
    for path in ("nowhere.py", str(tmp_path)):
        with pytest.raises(UserError, match=r"cannot be read: .*\. Give a Python file\."):
            registry.use_file(path)


def starts(flags: list[str]) -> list[tuple[str, dict[str, object], str]]:
    """Loss, its given options and its file's digest, as parsed; with a recipe the flag stands in that."""
    from megatron_bdpo.training.flags.arguments import Arguments

    found = [Arguments.parse(each.split()).settings.loss for each in flags]
    return [(loss.name, dict(loss.options), loss.digest) for loss in found]


def test_flags(ranks, tmp_path):
    path, recipe = tmp_path / "my_loss.py", tmp_path / "job.yaml"
    path.write_text(SOURCE)
    recipe.write_text("loss-file: ${RECIPE_DIR}/my_loss.py\nshift: 0.5\n")
    flags = [f"--loss-file {path} --shift 2", f"--recipe {recipe}", f"--loss-file={path} --preference-loss dpo", ""]
    digest = hashlib.sha256(SOURCE.encode()).hexdigest()
    expected = [
        ("shifted", {"shift": 2.0}, digest),
        ("shifted", {"shift": 0.5}, digest),
        ("dpo", {}, ""),
        ("bdpo", {}, ""),
    ]
    assert ranks(1)(starts, flags) == [expected]


def test_a_run_that_goes_on_with_a_changed_file_says_so(ranks, tmp_path):
    path, save = tmp_path / "my_loss.py", ["--save", str(tmp_path / "run"), "--save-interval", "1"]
    path.write_text(SOURCE)
    flags = ["--loss-file", str(path), *save, "--lr-decay-style", "constant"]
    ((first, _),) = ranks(1)(run_told, [*flags, "--train-iters", "1"])
    path.write_text(SOURCE + "\n# another one\n")
    ((again, said),) = ranks(1)(run_told, [*flags, "--load", save[1], "--train-iters", "2"])
    assert [len(first), len(again)] == [1, 1] and "WARNING: the resumed run used the loss shifted" in said
    assert hashlib.sha256(SOURCE.encode()).hexdigest() in said


def run_told(flags: list[str]) -> tuple[list[dict[str, float]], str]:
    """The steps of the tiny job, and what it has said."""
    import contextlib
    import io

    from tests.harness.jobs import train

    with contextlib.redirect_stdout(io.StringIO()) as said:
        steps = train(flags).steps
    return steps, said.getvalue()
