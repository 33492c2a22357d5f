"""Builds HTML in which every text is escaped, as only `Html` is taken as it is."""

from functools import lru_cache
from html import escape
from typing import final
from urllib.parse import quote


@final
class Html(str):
    """Markup: a text that needs no escaping any more."""

    __slots__ = ()


def text(value: object) -> Html:
    """Escape what is shown; markup stays as it is.

    What does not print is shown by its code: names and errors may hold
    controls, halves of surrogate pairs, which no encoding takes, and marks
    that turn the direction of the text after them.
    """
    return value if isinstance(value, Html) else Html(_escape(value))


def _escape(value: object) -> str:
    shown = str(value)
    # Most are words and figures, which need nothing.
    if isinstance(value, Html) or shown.isalnum():
        return shown
    if not shown.isprintable():
        shown = "".join(map(_printable, shown))
    return escape(shown)


def _printable(character: str) -> str:
    if character.isprintable() or character in " \n\t":
        return character
    return character.encode("unicode_escape").decode()


def quoted(name: str) -> str:
    """Write a name as a part of a path; half of a surrogate pair by its code."""
    return quote(name, safe="", errors="backslashreplace")


def join(*parts: object) -> Html:
    """Put parts together, each of them escaped unless it is markup."""
    return Html("".join(map(_escape, parts)))


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """Make an element.

    In the names of attributes an underscore at the end is left out and others
    stand for ``-``; True is an attribute without a value, and None and False
    are none at all.
    """
    inside = "".join(map(_escape, children))
    return Html(f"<{_head(name, attributes)}>{inside}</{name}>")


def void(name: str, /, **attributes: object) -> Html:
    """Make an element that has no end: ``meta``, ``link``, ``input``."""
    return Html(f"<{_head(name, attributes)}>")


def _head(name: str, attributes: dict[str, object]) -> str:
    head = name
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        head += _name(key) if value is True else f'{_name(key)}="{_escape(value)}"'
    return head


@lru_cache(maxsize=256)
def _name(key: str) -> str:
    return " " + key.rstrip("_").replace("_", "-")
