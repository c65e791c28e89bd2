"""A dry run checks the whole job, at the real number of ranks, in one process and without weights."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DATA = ROOT / "examples" / "data"

#: config.json of Meta's Llama-3.1-70B-Instruct.
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 28672,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA_8B = LLAMA_70B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
}
SMOLLM2_135M = LLAMA_70B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}
QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def report(flags: list[str], environment: dict[str, str]) -> str:
    """What the job prints, and behind it the exit code or the refusal that it ends with."""
    from megatron_bdpo.errors import UserError
    from megatron_bdpo.training import entry

    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises((SystemExit, UserError)) as ended:
            entry.train(flags)
    return f"{output.getvalue()}ended: {ended.value}"


@pytest.fixture
def dry_run(ranks, tmp_path):
    """The report of a shipped recipe with the example's pairs, or what it is refused with."""

    def run(recipe: str, *flags: str, config: dict[str, object] | None = None) -> str:
        environment = {"RUN_DIR": str(tmp_path / "run"), "PAIR_DATA": str(DATA / "train.jsonl")}
        words = ["--recipe", str(ROOT / "recipes" / recipe)]
        if config:
            model = tmp_path / "model"
            model.mkdir(exist_ok=True)
            (model / "config.json").write_text(json.dumps(config))
            environment["HF_MODEL"] = str(model)
            words += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(DATA / "tokenizer.model")]
        return ranks(1)(report, [*words, *flags], environment)[0]

    return run


def test_what_the_run_needs_on_its_disk(dry_run):
    """70.55 billion parameters of 14 bytes; two checkpoints stay while a third is written."""
    printed = dry_run("llama3_70b.yaml", "--dry-run", "64", config=LLAMA_70B)
    assert re.search(r"disk of \S+/run: checkpoints \(3 of 987\.8 GB\) 2,963\.4 GB.*TOO LITTLE", printed), printed


@pytest.mark.parametrize(
    ("recipe", "config", "world_size", "expected_layout"),
    [
        ("llama3_70b.yaml", LLAMA_70B, 64, "4 tensor x 4 pipeline x 5 virtual stages x 2 context x 2 data"),
        ("llama3_70b_lora.yaml", LLAMA_70B, 8, "4 tensor x 2 pipeline x 8 virtual stages"),
        ("llama3_8b.yaml", LLAMA_8B, 8, "2 tensor x 4 data"),
        ("qwen2_7b.yaml", QWEN2_7B, 8, "2 tensor x 4 data"),
        ("reward_8b.yaml", LLAMA_8B, 8, "2 tensor x 4 data"),
        ("tiny.yaml", None, 1, "one rank"),
    ],
)
def test_the_shipped_recipes_pass(dry_run, recipe, config, world_size, expected_layout):
    printed = dry_run(recipe, "--dry-run", str(world_size), "--gpus-per-node", str(min(8, world_size)), config=config)
    assert f"layout: {expected_layout}\n" in printed
    assert printed.endswith("ended: 0")
    assert "396 kept of 396 rows" in printed
    assert "Assumed, not measured" in printed
    assert len(printed.splitlines()) < 40, "Megatron's 700 lines of arguments are left out"


def test_only_the_tokens_are_written(dry_run, tmp_path):
    for _ in range(2):
        printed = dry_run("llama3_70b.yaml", "--dry-run", "64", config=LLAMA_70B)
    assert printed.endswith("ended: 0")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["cache"]


def test_keys_without_effect_are_said_once(dry_run):
    printed = dry_run("llama3_70b.yaml", "--dry-run", "64", config=LLAMA_70B | {"activation": "swiglu", "note": 1})
    lines = [line for line in printed.splitlines() if "without effect" in line]
    assert [line.rpartition(": ")[2] for line in lines] == ["activation, note"]
    assert printed.endswith("ended: 0")


def test_memory_of_the_fullest_gpu(dry_run):
    """Beside Megatron's report, which has the same weights, gradients and optimizer."""
    printed = dry_run("llama3_70b.yaml", "--dry-run", "64", "--gpu-memory", "80", config=LLAMA_70B)
    assert "GB on the fullest GPU, stage 0; estimated" in printed
    assert "weights 9.1, gradients 18.2, optimizer 13.6, activations " in printed
    # It has the optimizer's 12 bytes a parameter shared by the two data-parallel ranks, we by the context-parallel too.
    assert "Megatron's report: weights, gradients and optimizer 54.5" in printed
    assert "and without context parallelism" in printed
    assert re.search(r"step on H100: \d\.\d\d s, [\d,]+ tokens/s/GPU, MFU \d+%; by arithmetic", printed)
    tensor = ["--tensor-model-parallel-size", "8", "--context-parallel-size", "1"]
    printed = dry_run("llama3_70b.yaml", "--dry-run", "64", *tensor, config=LLAMA_70B)
    assert "weights 4.5, gradients 9.1, optimizer 13.6, activations " in printed
    assert "Megatron's report: weights, gradients and optimizer 27.3" in printed
    refused = dry_run("llama3_70b.yaml", "--dry-run", "64", "--gpu-memory", "24", config=LLAMA_70B)
    assert "this job does not fit --gpu-memory 24 (GB)" in refused.rpartition("ended: ")[2]


def test_adapters_need_no_more_than_their_own(dry_run):
    """Gradients and optimizer are theirs, a resident reference is none, and frozen weights have no gradients to
    compute."""
    flags = ["--dry-run", "8", "--gpu-memory", "80", "--reference", "resident"]
    printed = dry_run("llama3_70b_lora.yaml", *flags, config=LLAMA_70B)
    assert printed.endswith("ended: 0")
    assert "trained: LoRA of rank 16, 207 million parameters; the model is frozen" in printed
    assert "weights 17.7, gradients 0.2, optimizer 0.6, activations " in printed
    assert "for training all weights: it knows no adapters" in printed
    whole = ["--recipe", "{lora-rank: null, lora-alpha: null}"]
    refused = dry_run("llama3_70b_lora.yaml", *flags, *whole, config=LLAMA_70B)
    assert "this job does not fit --gpu-memory 80 (GB)" in refused.rpartition("ended: ")[2]
    flags = ["--dry-run", "8", "--reference", "resident", *whole]
    printed_of_whole = dry_run("llama3_70b_lora.yaml", *flags, config=LLAMA_70B)
    assert "weights 17.6, gradients 35.3, optimizer 105.8, reference 17.6" in printed_of_whole
    assert "knows no adapters" not in printed_of_whole
    # A little more than two thirds: attention has no weights.
    assert 2 / 3 < petaflops(printed)[0] / petaflops(printed_of_whole)[0] < 0.68
    assert petaflops(printed)[1] == petaflops(printed_of_whole)[1]


#: Forward passes by loss: of the policy over each step beside training, of the reference over all pairs, and of a
#: resident one over each step.
PASSES = {"dpo": (0, 1, 1), "bdpo": (0, 2, 2), "aot": (1, 1, 1), "kto": (1, 2, 2), "bco": (1, 1, 2)}


@pytest.mark.parametrize("loss", PASSES)
def test_passes_of_a_loss(dry_run, loss):
    """A forward pass is a third of a step's arithmetic."""

    def of(*flags: str) -> tuple[float, float]:
        return petaflops(dry_run("llama3_70b.yaml", "--dry-run", "64", "--preference-loss", *flags, config=LLAMA_70B))

    plain, looking = of("apo_zero_unpaired"), PASSES[loss][0]
    resident = of("apo_zero_unpaired", "--reference", "resident")
    for found, of_one, passes in (
        (of(loss), plain, PASSES[loss][1]),
        (of(loss, "--reference", "resident"), resident, PASSES[loss][2]),
    ):
        assert found[0] == pytest.approx(plain[0] * (1 + looking / 3), rel=1e-2)
        assert found[1] == pytest.approx(of_one[1] * passes, rel=1e-2)


def test_what_a_loss_of_labelled_answers_needs_of_the_prompts(dry_run, tmp_path):
    """It is asked for before a model is loaded."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Well?", "completion": "Yes.", "label": true}\n' * 4, "utf-8")
    flags = ["--preference-loss", "kto", "--pair-data", str(rows), "--pairs-per-step", "2"]
    assert f"all rows of {rows} have one prompt" in dry_run("tiny.yaml", "--dry-run", *flags)


def test_labels_are_counted_as_a_loss_reads_them(dry_run, tmp_path):
    """Two pairs have two answers each; three ranked answers make three pairs, and the second best is both."""
    answers = {"prompt": "Well?", "responses": ["Yes.", "No.", "Perhaps."], "scores": [3, 1, 2]}
    pair = {"prompt": "How so?", "chosen": "Like this.", "rejected": "Like that."}
    rows = [
        pair,
        pair | {"prompt": "And?"},
        *({"prompt": f"{n}?", "completion": "One.", "label": n > 2} for n in range(4)),
    ]
    files = {"ranked.jsonl": [answers], "rows.jsonl": rows}
    for name, lines in files.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    named = [str(tmp_path / name) for name in files]
    flags = ["--preference-loss", "kto", "--pairs-from", "all", "--pairs-per-step", "2", "--pair-data", *named]
    printed = dry_run("tiny.yaml", "--dry-run", *flags)
    assert "answers: 6 desirable, 8 undesirable to train on; 1 of them both" in printed, printed


def petaflops(printed: str) -> tuple[float, float]:
    """Of training and of scoring."""
    found = re.search(r"arithmetic: ([\d.]+) PFLOP of training, at most ([\d.]+) of scoring", printed)
    assert found
    return float(found[1]), float(found[2])


@pytest.mark.parametrize(
    ("flags", "expected_reason"),
    [
        ("--dry-run 60", "60 ranks cannot be split into model replicas of 32"),
        ("--dry-run 64 --gpus-per-node 12", "do not fill nodes of --gpus-per-node 12"),
        ("--dry-run 96 --pipeline-model-parallel-size 3", "80 layers cannot be split evenly over 3 pipeline stages"),
        ("--dry-run -1", "must be at least 1"),
        ("--dry-run 64 --num-layers 8", "contradict --hf-model"),
        ("--dry-run 64 --overlap-param-gather-with-optimizer-step", "Megatron refused the arguments"),
    ],
)
def test_jobs_that_cannot_run_are_refused(dry_run, flags, expected_reason):
    printed = dry_run("llama3_70b.yaml", *flags.split(), config=LLAMA_70B)
    assert expected_reason in printed.rpartition("ended: ")[2]


def test_prompts_to_be_answered_are_checked(dry_run, tmp_path):
    prompts = tmp_path / "ask.jsonl"
    prompts.write_text(json.dumps({"prompt": "User: Hello?\nAssistant:"}) + "\n")
    flags = ["--dry-run", "64", "--eval-prompts", str(prompts)]
    printed = dry_run("llama3_70b.yaml", *flags, config=LLAMA_70B)
    assert re.search(rf"prompts: 1 of {prompts}, of up to \d+ tokens, answered with up to 64, at every eval", printed)
    refused = dry_run("llama3_70b.yaml", *flags, "--eval-prompt-tokens", "4096", config=LLAMA_70B)
    assert "an answer's 4096 do not fit --seq-length 4096" in refused.rpartition("ended: ")[2]
    refused = dry_run("llama3_70b.yaml", *flags, "--recipe", "{eval-share: null}", config=LLAMA_70B)
    assert "there are no held-out pairs" in refused.rpartition("ended: ")[2]


def test_overlap_of_tensor_parallelism_is_planned_without_its_buffers(dry_run):
    flags = ["--dry-run", "64", "--tp-comm-overlap", "--fixed-pack-length"]
    assert "fixed length of packs: the fullest one" in dry_run("llama3_70b.yaml", *flags, config=LLAMA_70B)


def test_tensor_parallelism_across_nodes_is_noted(dry_run):
    layout = ["--tensor-model-parallel-size", "16", "--context-parallel-size", "1"]
    flags = ["--dry-run", "64", "--gpus-per-node", "8", *layout, "--pairs-per-step", "256"]
    assert "16 tensor-parallel ranks cross nodes of 8" in dry_run("llama3_70b.yaml", *flags, config=LLAMA_70B)


@pytest.mark.parametrize(("extra", "expected_code"), [([], 0), (["--seq-length", "64"], 2)])
def test_exit_codes_of_the_program(tmp_path, extra, expected_code):
    command = [sys.executable, str(ROOT / "examples" / "pretrain_bdpo.py"), "--dry-run", "2", *extra]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    flags = ["--pair-cache-dir", str(tmp_path)]
    ended = subprocess.run([*command, *flags], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ended.returncode == expected_code, ended.stderr
    assert ("dry run of 2 ranks" in ended.stdout) == (expected_code == 0)


def test_one_of_several_processes_is_refused(ranks):
    flags = ["--recipe", str(ROOT / "recipes" / "tiny.yaml"), "--dry-run"]
    (ending,) = ranks(1)(report, flags, {"LOCAL_WORLD_SIZE": "2"})
    assert "plays all ranks in one process" in ending
