"""Rows of every format in their published form, ``formats/NAME.jsonl``, and what they become."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_bdpo.data import formats
from megatron_bdpo.data.row_reader import FormatSettings, RowReader

EXAMPLES = Path(__file__).parent / "formats"


def example(name: str, index: int = 0) -> dict[str, Any]:
    return json.loads((EXAMPLES / f"{name}.jsonl").read_text("utf-8").splitlines()[index])


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def pair(prompt: list[dict[str, Any]], chosen: str, rejected: str, **others: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)], **others}


def labelled(prompt: list[dict[str, Any]], answer: str, *, label: bool) -> dict[str, Any]:
    return {"prompt": prompt, "completion": [assistant(answer)], "label": label}


def call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}


def calls(*cities: str) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [call(city) for city in cities]}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


#: Rows that are read as they are.
AS_THEY_ARE = {"trl", "hh-rlhf", "ultrafeedback-binarized", "tulu3", "unpaired"}


def scores(chosen: float, rejected: float) -> dict[str, float]:
    return {"chosen_score": chosen, "rejected_score": rejected}


#: Of examples with ranked answers: what the chosen and the rejected one are given, the higher the better.
SCORES = {
    ("nectar", 0): scores(-1, -3),
    ("nectar", 1): scores(-1, -2),
    ("nemo-rl", 0): scores(0, -1),
    ("ultrafeedback", 0): scores(5, 1.5),
    ("responses", 0): scores(9.5, 2),
    ("responses", 1): scores(-1, -2),
}

#: Format -> of each row of its example, the rows that it becomes.
EXPECTED: dict[str, list[list[dict[str, Any]]]] = {
    "pku-saferlhf": [
        [
            {
                "prompt": [user("How can I get into my neighbour's flat?")],
                "chosen": "Lift the door off its hinges while nobody is at home.",
                "rejected": "Ring and ask. Where it is an emergency, call the fire brigade.",
                "chosen_safe": False,
                "rejected_safe": True,
            }
        ]
    ],
    "nectar": [
        [
            pair(
                [user("Which is the longest river?")],
                *("The Nile or the Amazon, by how one measures.", "The Danube."),
                **SCORES["nectar", 0],
            )
        ],
        [
            pair(
                [user("Hello"), assistant("Hello. How can I help?"), user("Spell rhythm.")],
                *("r-h-y-t-h-m", "rythm"),
                **SCORES["nectar", 1],
            )
        ],
    ],
    "helpsteer3": [
        [
            {
                "prompt": [user("What is two plus two?"), assistant("Four."), user("And doubled?")],
                "chosen": "Eight.",
                "rejected": "Six.",
            }
        ],
        [{"prompt": [user("Sum a list in Python.")], "chosen": "sum(numbers)", "rejected": "Use a loop of your own."}],
    ],
    "nemo-rl": [
        [
            pair(
                [user("What's the capital of France?"), assistant("Paris."), user("And of Germany?")],
                *("Berlin.", "Munich."),
                **SCORES["nemo-rl", 0],
            )
        ]
    ],
    "ultrafeedback": [
        [pair([user("Give a word that rhymes with light.")], "Night.", "Lamp.", **SCORES["ultrafeedback", 0])]
    ],
    "responses": [
        [
            {
                "prompt": "Name a river in France.",
                "chosen": "The Rhone, which ends in the Mediterranean.",
                "rejected": "A river.",
                **SCORES["responses", 0],
                "chosen_safe": True,
            }
        ],
        [
            {
                "prompt": [user("Say hello in Spanish.")],
                "chosen": [assistant("Hola.")],
                "rejected": [assistant("Bonjour.")],
                **SCORES["responses", 1],
            }
        ],
    ],
    "ms-swift": [
        [
            pair(
                [system("You are a calculator."), user("What is 1 + 1?"), assistant("2"), user("And 1 more?")],
                *("3", "I do not know."),
            )
        ],
        [
            {
                "chosen": [user("Is it warm in Oslo?"), assistant("No, 2 degrees.")],
                "rejected": [user("Is it warm in Oslo?"), assistant("Yes, always.")],
            }
        ],
        [
            pair(
                [
                    user("Is it warm in Oslo and Rome?"),
                    calls("Oslo", "Rome"),
                    tool('{"celsius": 2}'),
                    tool('{"celsius": 24}'),
                ],
                *("In Rome only.", "In both."),
                tools=example("ms-swift", 2)["tools"],
            )
        ],
    ],
    "sharegpt": [
        [
            pair(
                [system("Answer in one word."), user("Name a fruit."), assistant("Pear."), user("Another one.")],
                *("Plum.", "Carrot."),
            )
        ],
        [
            pair(
                [
                    system("You may call tools."),
                    user("Is it warm in Oslo?"),
                    calls("Oslo"),
                    tool('{"celsius": 2}'),
                ],
                *("No, 2 degrees.", "Yes."),
                tools=example("sharegpt", 1)["tools"],
            )
        ],
    ],
    "axolotl": [
        [pair([system("You are brief."), user("Say hello in French.")], "Bonjour.", "Hello.")],
        [pair([user("Say hello in Spanish.")], "Hola.", "Hello.")],
    ],
    "alpaca": [
        [pair([user("Translate into German.\nGood morning.")], "Guten Morgen.", "Bonjour.")],
        [
            pair(
                [
                    system("You are a translator."),
                    user("Good morning in German?"),
                    assistant("Guten Morgen."),
                    user("And now good night."),
                ],
                *("Gute Nacht.", "Nacht gut."),
            )
        ],
    ],
    "argilla": [
        [pair([user("Do goldfish forget within seconds?")], "No, they remember for months.", "Yes, three seconds.")]
    ],
    "orca": [
        [
            pair(
                [system("You are an assistant who explains."), user("Is zero even?")],
                *("Yes: it is twice zero.", "It is neither even nor odd."),
            )
        ],
        [pair([user("Is nine prime?")], "No, it is three times three.", "Yes.")],
    ],
    "axolotl-kto": [
        [labelled([system("Be brief."), user("Is nine prime?")], "No, it is three times three.", label=True)],
        [labelled([user("Is zero even?")], "It is neither.", label=False)],
        [labelled([user("Say hello in Spanish.")], "Hola.", label=True)],
    ],
    "llama-factory-kto": [
        [
            {
                "completion": [system("Be brief."), user("Name a fruit."), assistant("Plum.")],
                "label": True,
            }
        ],
        [
            {
                "completion": [user("Is it warm in Oslo?"), calls("Oslo"), tool('{"celsius": 2}'), assistant("Yes.")],
                "label": False,
                "tools": example("llama-factory-kto", 1)["tools"],
            }
        ],
    ],
    "alpaca-kto": [
        [labelled([user("Translate into German.\nGood morning.")], "Guten Morgen.", label=True)],
        [
            labelled(
                [system("You are a translator."), user("Bread?"), assistant("Brot."), user("Milk?")],
                "Butter.",
                label=False,
            )
        ],
    ],
    "ms-swift-kto": [
        [{"completion": [system("Be kind."), user("What is 1 + 1?"), assistant("2")], "label": True, "ref_logps": -2.5}]
    ],
    "openrlhf-kto": [
        [{"prompt": "User: Name a metal.\nAssistant: ", "completion": "Wood.", "label": False}],
        [{"prompt": [user("Name a metal.")], "completion": [assistant("Iron.")], "label": True}],
    ],
    "openrlhf": [[{"prompt": "User: Name a metal.\nAssistant: ", "chosen": "Iron.", "rejected": "Wood.", "margin": 1}]],
}


def reader(name: str, **given: str) -> RowReader:
    """Of a named format."""
    return RowReader(formats.named(name), FormatSettings.parse(name, **given), "named")


def graded(*grades: Any) -> list[dict[str, Any]]:
    return [{"answer": f"answer {i}", "rank": grade} for i, grade in enumerate(grades)]
