"""Callbacks that other packages offer; examples/own_callback is one, installed in test_docs.py."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

from megatron_bdpo.errors import UserError
from tests.harness.jobs import own_process

POINT = "tests.unit.training.callbacks.test_entry_points"


def one(settings: Any, job: Any) -> Any:
    from megatron_bdpo.training.callbacks.callback import Callback

    class Theirs(Callback):
        told = (settings, job)

    return Theirs()


def installed(points_here: list[tuple[str, str]], elsewhere: list[tuple[str, str]] | None = None) -> Any:
    """What a run has of these entry points, (name, value) each; the second rank may have others."""
    from unittest import mock

    from megatron_bdpo.training.callbacks import entry_points
    from megatron_bdpo.training.distributed import process_groups

    own = elsewhere if elsewhere is not None and os.environ["RANK"] == "1" else points_here
    points = [importlib.metadata.EntryPoint(name, value, entry_points.GROUP) for name, value in own]
    with process_groups(own_process()), mock.patch.object(entry_points, "entry_points", lambda group: points):
        try:
            return [each.told for each in entry_points.callbacks_of_packages(1, 2)]
        except UserError as error:
            return str(error)


def test_it_is_made_with_settings_and_job(ranks):
    assert ranks(1)(installed, [("theirs", f"{POINT}:one")]) == [[(1, 2)]]


def test_it_has_to_be_a_callback(ranks):
    (said,) = ranks(1)(installed, [("theirs", "builtins:divmod")])
    assert "TypeError: it returns a tuple, which is no Callback" in said
    (said,) = ranks(1)(installed, [("theirs", "nowhere:make")])
    assert "an unnamed distribution offers the callback 'theirs' (nowhere:make), but it cannot be used" in said


def test_all_ranks_have_them_in_one_order(ranks):
    """Whatever the order in which a node's file system lists what is installed."""
    a, b = ("a", f"{POINT}:one"), ("b", "nowhere:make")
    said = ranks(2)(installed, [a, b], [b, a])
    assert said[0] == said[1] and "'b' (nowhere:make)" in said[0]


def test_a_node_without_one_is_refused(ranks):
    said = ranks(2)(installed, [("theirs", f"{POINT}:one")], [])
    assert said[0] == said[1]
    assert f"has other callbacks than the first node: none here, theirs ({POINT}:one) there" in said[0]
