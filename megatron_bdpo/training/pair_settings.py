"""Which pairs a job is given, and how their rows are read."""

# Field types are evaluated: Megatron makes flags of them. So no ``from __future__ import annotations`` here.

from dataclasses import dataclass
from typing import Any, Literal

from megatron_bdpo.data.format_options import PAIRS_FROM, PREFERENCES
from megatron_bdpo.data.formats import AUTO, NAMES
from megatron_bdpo.data.messages import TEMPLATE_KWARGS, template_variables
from megatron_bdpo.data.problems import RowProblem
from megatron_bdpo.errors import UserError
from megatron_bdpo.training.flag_fields import flag


@dataclass(frozen=True)
class PairSettings:
    """Which pairs are trained on and held out, and how much of them may be wrong."""

    pair_data: list[str] | None = flag(metavar="[WEIGHT] PATH")
    """training pairs: JSONL(.gz), Parquet, Arrow, Hugging Face data sets; each with an optional weight"""
    eval_pair_data: list[str] | None = flag(metavar="[WEIGHT] PATH")
    """held-out pairs, evaluated every --eval-interval steps"""
    eval_share: float = 0.0
    """share of the training pairs to hold out instead of --eval-pair-data, in whole prompts: no prompt of theirs is
    trained on"""
    eval_seed: int | None = None
    """draws what --eval-share holds out; default: --seed. The same one for runs of several seeds, to compare them"""
    pair_format: str = flag(AUTO, choices=(AUTO, *NAMES))
    """form of the rows; auto: of each source the one that its first readable row has"""
    pair_columns: str | None = flag(metavar="OURS=THEIRS,...")
    """columns of the rows that stand for those of a format: prompt=question,chosen=answer_a"""
    pairs_from: str | None = flag(metavar="{" + ",".join(PAIRS_FROM) + "}")
    """of rows with more than two ranked answers, one pair of the best and the worst, all pairs, all neighbours in rank,
    or all pairs whose scores or ranks are X apart or more (default: best-worst; of losses of a list, all)"""
    pair_preference: str | None = flag(choices=PREFERENCES)
    """of PKU-SafeRLHF, the answer that is chosen (default: better)"""
    pair_cache_dir: str | None = None
    """where tokenised pairs and reference values are kept; every node must see it (default: beside --save, else
    ./runs/cache)"""
    max_prompt_length: int | None = None
    """truncate prompts to this many tokens, keeping their end"""
    max_response_length: int | None = None
    """truncate responses to this many tokens, keeping their start"""
    max_pairs: int | None = None
    """use only the first N usable training pairs"""
    train_on: Literal["all-assistant", "last"] = "all-assistant"
    """which of the assistant's turns are scored in an answer of several: all, or the last one"""
    chat_template_kwargs: str | None = flag(metavar="JSON")
    """variables that the chat template reads, as a JSON object, for example '{"enable_thinking": false}'; a row's own
    column of that name goes before them"""
    unconditional_prompt: Literal["empty", "context"] = "empty"
    """what B-DPO's unconditional log-prob is conditioned on in chats: an empty turn of the user alone, or behind the
    row's system messages and tools"""
    tokenizer_workers: int | None = flag(metavar="N")
    """processes that tokenize on each node (default: one for each core, at most 32)"""
    control_tokens: Literal["count", "refuse"] = "count"
    """texts of rows that spell out a control token, as <|im_start|>, which Hugging Face tokenizers take for a real one:
    count them, or leave these rows out"""
    long_pairs: Literal["error", "drop"] = "error"
    """pairs that do not fit a pack of --seq-length"""
    max_malformed_share: float = 0.0
    """share of unreadable rows above which the run stops"""
    max_dropped_share: float = 0.5
    """share of unusable rows above which the run stops"""

    @property
    def template_variables(self) -> dict[str, Any]:
        """--chat-template-kwargs as an object.

        Raises:
            UserError: it is none.
        """
        if self.chat_template_kwargs is None:
            return {}
        try:
            return template_variables({TEMPLATE_KWARGS: self.chat_template_kwargs})
        except RowProblem as problem:
            told = problem.detail.removeprefix(f"column '{TEMPLATE_KWARGS}' ")
            raise UserError(
                f"--chat-template-kwargs {told}. Give a JSON object: '{{\"enable_thinking\": false}}'."
            ) from problem
