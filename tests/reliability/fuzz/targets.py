"""All that is fuzzed: importing the modules registers their targets."""

from tests.reliability.fuzz import files, pairs, plans
from tests.reliability.fuzz.registry import TARGETS

__all__ = ["TARGETS", "files", "pairs", "plans"]
