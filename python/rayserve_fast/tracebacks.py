"""Tracebacks as the user's code left them: without the frames of who called it.

On its way to the user's code a call passes the event loop, Ray and this package; those frames are the same for every
error and tell nothing of it. Frames below the user's first one stay, whoever's they are. An error that has no frame of
the user's is one of our own, and keeps all of its frames.
"""

from __future__ import annotations

import os
import sysconfig
import traceback
from types import TracebackType

import ray

_OURS = (os.path.dirname(__file__) + os.sep, os.path.dirname(ray.__file__) + os.sep, "<frozen ")
_STDLIB = os.path.join(sysconfig.get_paths()["stdlib"], "")
_INSTALLED = os.path.join(_STDLIB, "site-packages", "")


def from_user_code(trace: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that begins at the first frame of the user's code; all of it if there is none."""
    part = trace
    while part is not None and not _is_users(part.tb_frame.f_code.co_filename):
        part = part.tb_next
    return trace if part is None else part


def format_error(error: BaseException) -> str:
    """The error and its causes as text, its traceback from the user's code on."""
    return "".join(traceback.format_exception(type(error), error, from_user_code(error.__traceback__)))


def _is_users(file: str) -> bool:
    """Whether it is neither this project's, Ray's nor the standard library's; other libraries count as the user's."""
    return not file.startswith(_OURS) and (not file.startswith(_STDLIB) or file.startswith(_INSTALLED))
