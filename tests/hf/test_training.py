"""A step taken here is the step taken in transformers, and what is exported is what was trained, to the bit."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from megatron_bdpo.data.store import PairStore
from megatron_bdpo.model.hf.card import name_on_hub
from tests.harness.jobs import SGD, last_stage, train
from tests.harness.ranks import RankFailure
from tests.harness.tiny_models import load_model, make_model

transformers = pytest.importorskip("transformers", reason="the oracle is Hugging Face transformers")

TP2_PP2 = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
BETA, LEARNING_RATE, PAIRS = SGD["beta"], SGD["lr"], SGD["max_pairs"]


def safetensors_of(directory: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def step_in_transformers(model, store: PairStore):
    """One step of plain SGD on the mean DPO loss, at policy == reference."""

    def log_prob(prompt, response):
        tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        log_probs = model(input_ids=tokens[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return log_probs.gather(1, tokens[len(prompt) :, None]).sum()

    for row in range(PAIRS):
        pair = store.pair(row)
        margin = log_prob(pair.prompt, pair.chosen) - log_prob(pair.prompt, pair.rejected)
        loss = -torch.nn.functional.logsigmoid(BETA * (margin - margin.detach())) / PAIRS
        loss.backward()
    torch.optim.SGD(model.parameters(), lr=LEARNING_RATE).step()


@pytest.mark.parametrize(
    ("name", "world_size", "flags"),
    [
        ("llama", 4, TP2_PP2),
        ("qwen2", 2, TP2_PP2[:2]),
        ("qwen3", 4, TP2_PP2),
        ("gemma", 2, TP2_PP2[2:]),
        ("mixtral", 2, ["--expert-model-parallel-size", "2"]),
    ],
)
def test_one_step_gives_the_weights_that_transformers_gives(ranks, tmp_path, name, world_size, flags):
    directory, saved, cache = make_model(name, tmp_path), tmp_path / "trained", tmp_path / "cache"
    ranks(world_size)(
        train,
        ["--hf-model", str(directory), "--save-hf", str(saved), *flags],
        pair_cache_dir=str(cache),
        **SGD,
    )
    (meta,) = cache.glob("*/meta.json")
    expected, found = load_model(directory), load_model(saved).state_dict()
    before = {key: value.clone() for key, value in expected.state_dict().items()}
    step_in_transformers(expected, PairStore.open(meta.parent))
    moved = {}
    for key, value in expected.state_dict().items():
        assert (found[key] - value).abs().max() <= 1e-5, key
        moved[key] = float((value - before[key]).abs().max())
    small = [key for key, distance in moved.items() if distance < 2e-5]
    assert not small, "steps that would not be missed compare nothing"


JOB = {"max_pairs": 16, "pairs_per_step": 4, "train_iters": 2, "lr": 1e-3}


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory):
    """A model, and what a job on four ranks made of it: (original, live export, checkpoint, outcomes)."""
    directory = tmp_path_factory.mktemp("trained")
    original = make_model("qwen2", directory)
    (original / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    saved, checkpoint = directory / "saved", directory / "checkpoint"
    flags = ["--hf-model", str(original), "--save-hf", str(saved), "--save", str(checkpoint), "--save-interval", "2"]
    outcomes = ranks(4)(train, [*flags, "--eval-share", "0.3", *TP2_PP2], **JOB)
    return original, saved, checkpoint, outcomes


def convert(*arguments: object) -> tuple[int, str]:
    """The exit code of ``megatron-bdpo convert`` and what it writes to stderr; on a rank, which has Megatron."""
    from megatron_bdpo.cli.main import main

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = main(["convert", *map(str, arguments)])
    return code, errors.getvalue()


def converted(ranks, *arguments: object) -> None:
    ((code, errors),) = ranks(1)(convert, *arguments)
    assert code == 0, errors


def test_live_export_is_what_was_trained(trained):
    """Against the shards, which tests/distributed compares between layouts."""
    original, saved, _, _ = trained
    before, after = safetensors_of(original), safetensors_of(saved)
    assert before.keys() == after.keys()
    assert all(before[name].shape == value.shape and value.dtype == np.float32 for name, value in after.items())
    assert all(not np.array_equal(before[name], value) for name, value in after.items())
    config, expected = (json.loads((path / "config.json").read_text()) for path in (saved, original))
    assert config == expected


def test_export_waits_for_weights_that_are_being_gathered(ranks, tmp_path):
    """With the distributed optimizer each rank has updated a part of the weights when the last step ends."""
    original = make_model("llama", tmp_path)
    found = {}
    for name, flags in (("plain", []), ("overlapped", ["--overlap-grad-reduce", "--overlap-param-gather"])):
        saved = tmp_path / name
        ranks(2)(
            train,
            ["--hf-model", str(original), "--save-hf", str(saved), "--use-distributed-optimizer", *flags],
            **JOB,
        )
        found[name] = safetensors_of(saved)
    for name, value in found["plain"].items():
        assert found["overlapped"][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_export_of_the_checkpoint_is_the_live_export(ranks, trained, tmp_path):
    original, saved, checkpoint, _ = trained
    output = tmp_path / "exported"
    converted(ranks, "export", "--checkpoint", checkpoint, "--hf-model", original, "--output", output)
    found, expected = safetensors_of(output), safetensors_of(saved)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name
    assert (output / "tokenizer_config.json").read_bytes() == (original / "tokenizer_config.json").read_bytes()


def test_experts_in_some_layers_of_a_checkpoint(ranks, tmp_path):
    """Megatron numbers layers that are not alike. The job goes on from the checkpoint, and that is exported."""
    original, saved, checkpoint = make_model("glm4 moe", tmp_path), tmp_path / "saved", tmp_path / "checkpoint"
    cache = {"pair_cache_dir": str(tmp_path / "cache")}
    run = ["--hf-model", str(original), "--save", str(checkpoint), "--save-interval", "1"]
    run += ["--expert-model-parallel-size", "2", *TP2_PP2[2:]]
    ranks(4)(train, [*run, "--exit-interval", "1"], **JOB, **cache)
    ranks(4)(train, [*run, "--load", str(checkpoint), "--save-hf", str(saved)], **JOB, **cache)
    output = tmp_path / "exported"
    converted(ranks, "export", "--checkpoint", checkpoint, "--hf-model", original, "--output", output)
    found, expected = safetensors_of(output), safetensors_of(saved)
    assert found.keys() == expected.keys() == safetensors_of(original).keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


def test_imported_again_it_is_the_same_to_the_bit(ranks, trained, tmp_path):
    """Weights and log-probs of the exported model, read directly and by way of a checkpoint."""
    _, saved, _, _ = trained
    imported = tmp_path / "imported"
    converted(ranks, "import", "--hf-model", saved, "--output", imported, "--dtype", "fp32")
    again, by_checkpoint = tmp_path / "again", tmp_path / "by_checkpoint"
    start = ["--hf-model", str(saved), "--lr", "0", *TP2_PP2[:2]]
    directly = ranks(2)(train, [*start, "--save-hf", str(again)], **JOB)
    flags = ["--load", str(imported), "--finetune", "--save-hf", str(by_checkpoint)]
    from_checkpoint = ranks(2)(train, [*start, *flags], **JOB)
    expected = safetensors_of(saved)
    for output in (again, by_checkpoint):
        found = safetensors_of(output)
        assert all(np.array_equal(found[name], value) for name, value in expected.items())
    for step, other in zip(last_stage(directly).steps, last_stage(from_checkpoint).steps, strict=True):
        assert step["logps/chosen"] == other["logps/chosen"]
        assert step["logps/rejected"] == other["logps/rejected"]


def test_exported_model_generates(trained):
    _, saved, _, _ = trained
    model = load_model(saved)
    assert type(model).__name__ == "Qwen2ForCausalLM"
    tokens = model.generate(torch.tensor([[1, 5, 9]]), max_new_tokens=5, do_sample=False)
    assert tokens.shape == (1, 8)


def test_model_card_says_what_was_done(trained):
    original, saved, _, _ = trained
    card = (saved / "README.md").read_text()
    for said in (
        f"Trained from `{original}`",
        "Loss: bdpo BdpoOptions(beta=0.1",
        "train.jsonl",
        "| pairs_per_step | 4 |",
        "| steps done | 2 |",
        "## Flags as given",
        "save-interval: 2",
    ):
        assert said in card, said
    assert "| rewards/accuracies | " in card, "the last evaluation"
    assert "base_model:" not in card, "the hub takes no path there"


def test_a_checkpoints_card_has_its_own_steps(ranks, trained, tmp_path):
    original, _, checkpoint, _ = trained
    output = tmp_path / "exported"
    converted(ranks, "export", "--checkpoint", checkpoint, "--hf-model", original, "--output", output)
    card = (output / "README.md").read_text()
    assert "| steps done | 2 |" in card and "save-interval: 2" in card


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("/cache/models--org--name/snapshots/abc", "org/name"),
        ("org/name-1.5", "org/name-1.5"),
        ("/data/models/name", ""),
        ("./name", ""),
        ("", ""),
    ],
)
def test_what_the_hub_calls_a_model(model, expected):
    assert name_on_hub(model) == expected


def test_export_without_an_original(ranks, trained, tmp_path):
    _, saved, checkpoint, _ = trained
    output = tmp_path / "exported"
    converted(ranks, "export", "--checkpoint", checkpoint, "--family", "qwen2", "--output", output)
    found = load_model(output).state_dict()
    for name, value in safetensors_of(saved).items():
        assert np.array_equal(found[name].numpy(), value), name
    ids = torch.arange(40)[None]
    assert torch.equal(load_model(output)(input_ids=ids).logits, load_model(saved)(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["gemma3", "olmo2"])
def test_norms_behind_are_in_checkpoints(ranks, tmp_path, name):
    original = make_model(name, tmp_path)
    saved, checkpoint, output = (tmp_path / each for each in ("saved", "checkpoint", "exported"))
    flags = ["--hf-model", str(original), "--save-hf", str(saved), "--save", str(checkpoint), "--save-interval", "2"]
    ranks(2)(train, [*flags, "--tensor-model-parallel-size", "2", "--sequence-parallel"], **JOB)
    converted(ranks, "export", "--checkpoint", checkpoint, "--hf-model", original, "--output", output)
    found, expected, before = map(safetensors_of, (output, saved, original))
    assert found.keys() == expected.keys() == before.keys()
    for key, value in expected.items():
        assert np.array_equal(found[key], value) and not np.array_equal(value, before[key]), key


def test_export_of_another_model_is_refused(ranks, trained, tmp_path):
    _, _, checkpoint, _ = trained
    other = make_model("qwen2 sliding", tmp_path)
    output = tmp_path / "exported"
    ((code, message),) = ranks(1)(
        convert, "export", "--checkpoint", checkpoint, "--hf-model", other, "--output", output
    )
    assert code == 2 and "error: " in message and "window_size: None, but (8, 0) expected" in message
    assert not output.exists() and not output.with_name("exported.partial").exists()


def test_an_export_that_fails_leaves_nothing(ranks, trained, tmp_path):
    """The files of the checkpoint are cut short: found when a layer is read."""
    original, _, checkpoint, _ = trained
    broken, output = tmp_path / "broken", tmp_path / "exported"
    shutil.copytree(checkpoint, broken)
    for file in broken.glob("iter_*/*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 20])
    ((code, message),) = ranks(1)(
        convert,
        *("export", "--checkpoint", broken, "--hf-model", original, "--output", output),
        "--no-checkpoint-checksums",
    )
    assert code == 2 and str(broken) in message
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_damaged_checkpoint_is_not_exported(ranks, trained, tmp_path):
    """One bit is enough; the files of before are not touched."""
    original, _, checkpoint, _ = trained
    damaged, output = tmp_path / "damaged", tmp_path / "exported"
    shutil.copytree(checkpoint, damaged)
    file = sorted(damaged.glob("iter_*/*.distcp"))[-1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    ((code, message),) = ranks(1)(
        convert, "export", "--checkpoint", damaged, "--hf-model", original, "--output", output
    )
    assert code == 2 and f"{file} is not what was written" in message
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_an_imported_checkpoint_has_its_digests_and_is_refused_when_damaged(ranks, trained, tmp_path):
    original, _, _, _ = trained
    imported = tmp_path / "imported"
    converted(ranks, "import", "--hf-model", original, "--output", imported, "--dtype", "fp32")
    manifest = json.loads((imported / "release" / "integrity.json").read_bytes())
    assert sorted([*manifest["files"], "integrity.json"]) == sorted(f.name for f in (imported / "release").iterdir())
    (file,) = (imported / "release").glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(RankFailure, match=r"its checkpoint is damaged:\s+.*distcp is not what was written"):
        ranks(2)(train, ["--hf-model", str(original), "--load", str(imported), "--finetune"], **JOB)


def test_what_is_there_is_not_overwritten(ranks, trained):
    original, saved, _, _ = trained
    with pytest.raises(RankFailure, match=r"UserError: .*saved is there already"):
        ranks(1)(train, ["--hf-model", str(original), "--save-hf", str(saved)], **JOB)


def test_a_finished_run_may_be_started_once_more(ranks, tmp_path):
    """As after a kill at its very end: its export is left as it is. A longer run would write another one: refused."""
    original, saved = make_model("llama", tmp_path), tmp_path / "saved"
    save = ["--save", str(tmp_path / "run"), "--load", str(tmp_path / "run"), "--save-interval", "2"]
    flags = ["--hf-model", str(original), "--save-hf", str(saved), *save]
    ranks(1)(train, flags, **JOB)
    expected = {path.name: path.stat().st_mtime_ns for path in saved.iterdir()}
    assert ranks(1)(train, flags, **JOB)[0].steps == []
    assert {path.name: path.stat().st_mtime_ns for path in saved.iterdir()} == expected
    with pytest.raises(RankFailure, match=r"UserError: .*saved is there already"):
        ranks(1)(train, flags, **(JOB | {"train_iters": 4}))
    shutil.move(saved, tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere", saved)
    with pytest.raises(RankFailure, match=r"UserError: .*saved is there already"):
        ranks(1)(train, flags, **JOB)


# The reference of a resumed run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["precomputed", "resident"])
def test_resumed_run_keeps_its_reference(ranks, tmp_path, reference):
    """The policy comes from the checkpoint; the reference is the Hugging Face model, scored again if it has to be."""
    model = make_model("llama", tmp_path)
    job = JOB | {"train_iters": 4}
    flags = ["--hf-model", str(model), "--save-interval", "2", "--reference", reference]
    whole = ranks(2)(train, [*flags, *TP2_PP2[:2], "--save", str(tmp_path / "whole")], **job)
    resume = [*flags, *TP2_PP2[:2], "--save", str(tmp_path / "parts"), "--load", str(tmp_path / "parts")]
    ranks(2)(train, [*resume, "--exit-interval", "2"], **job)
    for cache in (tmp_path / "parts" / "cache").glob("reference-*"):
        shutil.rmtree(cache)
    steps = last_stage(ranks(2)(train, resume, **job)).steps
    assert [step["iteration"] for step in steps] == [3, 4]
    for step, expected in zip(steps, last_stage(whole).steps[2:], strict=True):
        for name, value in expected.items():
            if not name.startswith("throughput"):
                # Another model object scores the lost values again: its memory is aligned otherwise.
                assert step[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
