"""Asks a dashboard for its picture, over HTTP, without holding up the loop."""

from __future__ import annotations

import json
from contextlib import suppress
from http.client import HTTPException
from time import monotonic
from typing import TYPE_CHECKING, Any, final
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

import trio

from ._ends import Refused
from ._pictures import escape, read_picture

if TYPE_CHECKING:
    from ..web._picture import Picture

_PATIENCE = 5.0
"""Seconds until an answer must be there."""
_LARGEST = 1 << 25
"""Bytes of an answer."""
_PATH = "/statistics.json"


@final
class NoPicture(Exception):
    """There is no picture to be had now; the text says why."""


@final
class Dashboard:
    """A dashboard somewhere, by its URL.

    Raises:
      Refused: that is no URL.
    """

    def __init__(self, url: str) -> None:
        self.url = _check_url(url)
        # A thread that is left behind is waited for by the next one: they do not
        # become many.
        self._thread = trio.CapacityLimiter(1)

    async def look(self) -> Picture:
        """Return its picture of this moment; cancelled, a thread is left behind.

        Raises:
          NoPicture: nobody answers, or something that is no dashboard.
        """
        with trio.move_on_after(_PATIENCE + 1):
            return await trio.to_thread.run_sync(
                _get, self.url + _PATH, abandon_on_cancel=True, limiter=self._thread
            )
        raise NoPicture("no answer in time")


def _check_url(text: str) -> str:
    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        right = (
            parts.scheme in ("http", "https")
            and parts.hostname
            and parts.port != 0
            and "@" not in parts.netloc
            and not parts.query
            and not parts.fragment
            and url.isprintable()
            and " " not in url
        )
    except ValueError:
        right = False
    if not right:
        expected = "the URL of a dashboard, such as http://127.0.0.1:8765"
        raise Refused(f"expected {expected}, got {text!r}")
    return url.rstrip("/").removesuffix(_PATH)


def _get(url: str) -> Picture:
    request = Request(f"{url}?history=0", headers={"Accept": "application/json"})
    # What a proxy calls 127.0.0.1 is another machine.
    opener = build_opener(ProxyHandler({}))
    try:
        with opener.open(request, timeout=_PATIENCE) as answer:
            return read_picture(_read(answer))
    except HTTPError as error:
        with error:
            raise NoPicture(f"the answer is {error.code}{_told(error)}") from None
    except ValueError as error:
        raise NoPicture(f"this is no dashboard: {escape(str(error))}") from None
    except (OSError, HTTPException) as error:
        raise NoPicture(_word(error)) from None


def _read(answer: Any) -> bytes:
    """Read all of it; each part may come in time and the whole never."""
    end = monotonic() + _PATIENCE
    parts: list[bytes] = []
    size = 0
    while part := answer.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > _LARGEST:
            raise ValueError("the answer is too long")
        if monotonic() > end:
            raise TimeoutError("timed out")
    return b"".join(parts)


def _told(error: HTTPError) -> str:
    """Say what a dashboard that refuses gives as its reason."""
    with suppress(OSError, HTTPException, ValueError, RecursionError):
        found = json.loads(error.read(1 << 12))
        if isinstance(found, dict) and isinstance(found.get("error"), str):
            return f": {escape(found['error'])}"
    return ", so this is no dashboard" if error.code == 404 else ""


def _word(error: Exception) -> str:
    cause: Any = error.reason if isinstance(error, URLError) else error
    text = getattr(cause, "strerror", None) or str(cause)
    return escape(text) or type(cause).__name__
