"""Whether the model hub can be reached, found out once and quickly.

The hub's client retries an unreachable hub for about half a minute per file. Whoever works without a network should be
told within seconds, and what lies in the local cache should load at once.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

__all__ = ["reachable", "without_waiting"]

_SECONDS_PER_REQUEST = 3.0
_SECONDS_IN_ALL = 4.0  # a name that cannot be resolved may hang beyond the request's own limit

_log = logging.getLogger(__name__)


def reachable() -> bool:
    """Whether the hub answers; False in offline mode (`HF_HUB_OFFLINE=1`). Asked once per process, within 4 seconds."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _answers()


@contextmanager
def without_waiting() -> Iterator[bool]:
    """Within the context an unreachable hub is not tried again: only the local cache is read.

    Yields:
        Whether the hub is reachable.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    online = reachable()
    constants.HF_HUB_OFFLINE = not online
    try:
        yield online
    finally:
        constants.HF_HUB_OFFLINE = before


@cache
def _answers() -> bool:
    """Any answer counts, whatever its status."""
    answered = threading.Event()
    asking = threading.Thread(target=_ask, args=(answered,), daemon=True)
    asking.start()
    asking.join(_SECONDS_IN_ALL)
    return answered.is_set()


def _ask(answered: threading.Event) -> None:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS_PER_REQUEST)
    except Exception as error:  # whatever goes wrong (name, route, proxy, certificate), the hub is out of reach
        _log.info("the hub at %s cannot be reached: %s", constants.ENDPOINT, error)
        return
    answered.set()
