"""What a replica tells routers: `record_replica_metadata` once, `record_routing_stats` whenever it is asked.

Both are methods of the user's object that return a dict, which travels as text: a pickle in base64. Only the replica
that writes and the routers that read it know what is in it; what is between them compares the text. So that stays the
same as long as the dicts are equal, though their pickles may differ.
"""

from __future__ import annotations

import base64
import logging
import pickle
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayserve_fast.replica.servable import Servable

logger = logging.getLogger("ray.serve")

METADATA = "record_replica_metadata"
ROUTING_STATS = "record_routing_stats"


class Facts:
    """What one replica says.

    Args:
        user: its object.
    """

    def __init__(self, user: Servable) -> None:
        self._user = user
        self._stats: str | None = None

    @property
    def has_routing_stats(self) -> bool:
        """Whether there is anybody to ask."""
        return self._user.hook(ROUTING_STATS) is not None

    def metadata(self) -> str | None:
        """What holds for the replica's life; None: nothing. Raises what the method does, TypeError if it is no dict."""
        said = self._said(METADATA)
        return None if said is None else _written(said)

    def routing_stats(self) -> str | None:
        """What holds now; None: nothing yet. Raises as `metadata` does."""
        said = self._said(ROUTING_STATS)
        if said is not None and not _is(said, self._stats):
            self._stats = _written(said)
        return self._stats

    def _said(self, name: str) -> dict[str, Any] | None:
        said = self._user.call_hook(name)
        if said is not None and not isinstance(said, dict):
            raise TypeError(f"{name} must return a dict, got {type(said).__name__}.")
        return said


def read(fact: str | None) -> dict[str, Any]:
    """The dict of a text; empty if nothing was said, or it cannot be read here."""
    if fact is None:
        return {}
    try:
        return _read(fact)
    except Exception:  # of a class that cannot be imported in this process
        logger.exception("What a replica tells routers cannot be read here.")
        return {}


def _read(fact: str) -> dict[str, Any]:
    said: dict[str, Any] = pickle.loads(base64.b64decode(fact))
    return said


def _written(said: dict[str, Any]) -> str:
    from ray import cloudpickle  # here, as routers that only read must not import Ray

    return base64.b64encode(cloudpickle.dumps(said)).decode()


def _is(said: dict[str, Any], written: str | None) -> bool:
    """Whether that has been written already; values that cannot be compared have changed if their pickle has."""
    if written is None:
        return False
    try:
        return bool(said == _read(written))
    except Exception:
        return _written(said) == written
