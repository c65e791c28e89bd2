"""Digests of token sequences: equal ones have the same, and others hardly ever do.

Of n different sequences two have the same one with a probability of n^2 / 2^65, which is 7e-5 at 50 million.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from megatron_bdpo.data.tokenization import TokenArray

Digests = npt.NDArray[np.uint64]


def token_digests(sequences: Iterable[TokenArray]) -> Digests:
    """64 bits of each sequence's token ids. Keeps nothing of the sequences, so views of a memory map may be given."""
    each = (int.from_bytes(blake2b(tokens, digest_size=8).digest(), "little") for tokens in sequences)
    return np.fromiter(each, np.uint64)
