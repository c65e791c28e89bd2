"""Labels of single answers: which sides of a data set's pairs are labelled answers.

A labelled answer is stored as a pair of itself, with a label beside (see ``store``). To a loss of labelled answers it
is one of them, and a pair is two: its chosen answer is desirable, its rejected one is not.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PAIR, UNDESIRABLE, DESIRABLE = -1, 0, 1
#: An answer that is read by itself, for a reward model to judge. Nothing trains on it.
UNJUDGED = 2


def labelled_sides(label: npt.NDArray[np.int8]) -> npt.NDArray[np.bool_]:
    """[P, 2]: which of the chosen and the rejected side is a labelled answer.

    Args:
        label: [P] ``PAIR``, ``UNDESIRABLE`` or ``DESIRABLE``.
    """
    return label[:, None] != np.array([UNDESIRABLE, DESIRABLE], np.int8)
