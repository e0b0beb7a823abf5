"""A file of a form as a handler of Flask's expects it: sync. See `requests.py`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from typing import IO, Any

from rayserve_fast.classic.header_values import length_of, mimetype_of


class FileStorage:
    """An uploaded file with the names of werkzeug's; what is not here, such as `read` and `seek`, is its stream's.

    >>> import io
    >>> file = FileStorage(io.BytesIO(b"1,2"), "n.csv", "up", {"content-type": "Text/CSV; charset=utf-8"})
    >>> file.filename, file.mimetype, file.read(), file.tell()
    ('n.csv', 'text/csv', b'1,2', 3)

    Args:
        stream: its bytes.
        filename: as the client says; empty if it chose no file, which makes this false.
        name: of the form's field.
        headers: of its part of the body, with names in lower case or in any.
    """

    def __init__(self, stream: IO[bytes], filename: str | None, name: str, headers: Mapping[str, str]) -> None:
        self.stream = stream
        self.filename = filename
        self.name = name
        self.headers = headers

    @property
    def content_type(self) -> str | None:
        """The header of the part, with its parameters."""
        return self.headers.get("content-type")

    @property
    def mimetype(self) -> str:
        """The type alone, in lower case."""
        return mimetype_of(self.content_type)

    @property
    def content_length(self) -> int:
        """By the header of the part, which few clients send; 0 without it."""
        return length_of(self.headers) or 0

    def save(self, dst: str | os.PathLike[str] | IO[bytes], buffer_size: int = 16384) -> None:
        """Copy what has not been read yet.

        Args:
            dst: a path, or an open binary file, which stays open.
            buffer_size: bytes at a time.
        """
        if not isinstance(dst, (str, os.PathLike)):
            shutil.copyfileobj(self.stream, dst, buffer_size)
            return
        with open(dst, "wb") as file:
            shutil.copyfileobj(self.stream, file, buffer_size)

    def __bool__(self) -> bool:
        return bool(self.filename)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.stream)

    def __getattr__(self, name: str) -> Any:
        if name == "stream":  # of one that is being copied and has nothing yet
            raise AttributeError(name)
        # Until Python 3.11 a spooled file lacks `seekable` and its like, which the file inside it has.
        has_it = hasattr(self.stream, name)
        return getattr(self.stream if has_it else getattr(self.stream, "_file", self.stream), name)

    def __repr__(self) -> str:
        return f"<FileStorage: {self.filename!r} ({self.content_type!r})>"
