"""Whether the Hugging Face hub can be reached: its libraries try for up to a minute before they say that it cannot."""

from __future__ import annotations

import contextlib
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

import huggingface_hub.constants as hub

#: For the name, the connection and the answer together.
_SECONDS = 2.5

#: What to do without it, for messages.
ADVICE = (
    "The hub cannot be reached from here, and the local cache does not hold it. Fetch it on a node with network and "
    "the same HF_HOME (hf download), or give a directory."
)


def is_reachable() -> bool:
    """One quick request, through the user's proxies. False at once where HF_HUB_OFFLINE is set."""
    if hub.HF_HUB_OFFLINE:
        return False
    answers: list[bool] = []
    # In a thread, because nothing bounds the time that a name server takes.
    asking = threading.Thread(target=lambda: answers.append(_answers(hub.ENDPOINT)), daemon=True)
    asking.start()
    asking.join(_SECONDS)
    return answers == [True]


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # an answer too
    except (OSError, ValueError):
        return False
    return True


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """`datasets` in its offline mode, in which it looks in its cache at once; its switch is read at import time."""
    import datasets  # takes a second to import

    before = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
