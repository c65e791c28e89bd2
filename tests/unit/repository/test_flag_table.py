"""The table of flags is what the parsers say."""

from __future__ import annotations

from megatron_bdpo.training.flags import flag_table


def written_anew() -> str:
    """On a rank."""
    import runpy

    from megatron_bdpo.losses import registry
    from tests.harness.documents import ROOT

    registry.use_file(None)  # of a job that this rank has run before
    return runpy.run_path(str(ROOT / "tools" / "flag_table.py"))["text"]()


def test_it_is_what_the_parsers_say(ranks):
    (text,) = ranks(1)(written_anew)
    assert flag_table.FILE.read_text("utf-8") == text, "python tools/flag_table.py writes it anew"


def test_a_package_that_adds_losses_has_the_last_word(monkeypatch):
    """Its options are flags that the table does not know."""
    assert flag_table.read().is_of_this_installation
    monkeypatch.setattr(flag_table.importlib.metadata, "entry_points", lambda group: ["own"])
    assert not flag_table.read().is_of_this_installation
