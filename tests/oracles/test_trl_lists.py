"""TRL's TPOTrainer takes the same step on the same three answers to each prompt: see ``test_trl``."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from megatron_bdpo.data.store import PairStore
from tests.harness.huggingface import FAMILIES, VOCABULARY, build_model, to_hugging_face
from tests.harness.jobs import DATA, TINY_MODEL
from tests.harness.recording import merge, train_and_record
from tests.harness.trl_trainer import apart, token_id_tokenizer, trl_tpo_step

pytest.importorskip("trl", reason="the oracle is TRL's TPOTrainer")
pytestmark = pytest.mark.filterwarnings("ignore")  # experimental, it says

GROUPS = 6
BETA = 0.3
TP2_PP2 = (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"])

#: Our flags, TRL's settings, ranks and layout.
CASES = {
    "tpo": (["--nll-weight", "0.5"], {"loss_type": "sigmoid", "tpo_alpha": 0.5}, TP2_PP2),
    "tpo-l": (
        ["--tpo-length-normalized", "--tpo-gamma", "0.4"],
        {"loss_type": "tpo-l", "tpo_alpha": 1.0, "tpo_l_gamma": 0.4},
        (2, ["--context-parallel-size", "2"]),
    ),
}


@pytest.mark.parametrize(("flags", "settings", "layout"), CASES.values(), ids=CASES)
def test_loss_and_gradients(request, ranks, tmp_path, flags, settings, layout):
    pairs = [json.loads(line) for line in (DATA / "train.jsonl").read_text("utf-8").splitlines()[: GROUPS + 1]]
    rows = [
        {
            "prompt": pair["prompt"],
            "responses": [pair["rejected"], other["chosen"], pair["chosen"]],
            "scores": [1, 2, 3],
        }
        for pair, other in itertools.pairwise(pairs)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    model = TINY_MODEL | FAMILIES["llama"]
    job = {"pairs_per_step": GROUPS, "train_iters": 2, "init_method_std": 0.2, "lr": 1e-2, "max_pairs": None}
    job |= {"pair_data": [str(tmp_path / "rows.jsonl")], "pair_cache_dir": str(tmp_path / "cache")}
    flags = ["--preference-loss", "tpo", "--beta", str(BETA), *flags, *layout[1]]
    step = merge(ranks(layout[0])(train_and_record, flags, **model, **job)).steps[1]
    (meta,) = (tmp_path / "cache").glob("*/meta.json")
    expected, in_single = (
        trl_tpo_step(
            build_model("llama", model, step.weights),
            triples_as_text(PairStore.open(meta.parent)),
            token_id_tokenizer(VOCABULARY),
            tmp_path,
            beta=BETA,
            double=double,
            **settings,
        )
        for double in (True, False)
    )
    assert step.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-5)
    for name, theirs in expected.gradients.items():
        assert np.abs(theirs).max() > 1e-4, f"{name}: a gradient that is nearly zero compares nothing"
    gradients = to_hugging_face("llama", step.gradients, model)
    found = [apart(each, expected.gradients) for each in (gradients, in_single.gradients)]
    print(f"{request.node.name}: from TRL in fp64: ours {found[0]}, TRL in fp32 {found[1]}")
    assert found[0][0] <= 2e-5 and found[1][0] <= 1e-4


def triples_as_text(store: PairStore) -> list[dict[str, str]]:
    """The rows as texts whose words are token ids: of three answers' pairs the best, the second and the worst."""

    def text(tokens: np.ndarray) -> str:
        return "".join(f"<{token}>" for token in tokens)

    triples: dict[int, dict[str, str]] = {}
    for index, row in enumerate(store.row.tolist()):
        pair, scores = store.pair(index), store.score[index].tolist()
        names = {3: "reference", 2: "chosen", 1: "rejected"}
        answers = {names[int(score)]: text(part) for score, part in zip(scores, pair.parts[1:], strict=True)}
        triples.setdefault(row, {"prompt": text(pair.prompt)}).update(answers)
    return list(triples.values())
