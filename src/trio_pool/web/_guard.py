"""Decides which requests are answered, by their headers alone."""

import hmac
import re
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import final

import attrs

from .._checks import refuse

_LEAST_TOKEN = 16
_HOST = re.compile(
    r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]*)?", re.IGNORECASE | re.ASCII
)
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


@final
@attrs.frozen
class Refusal:
    """Why a request is not answered."""

    status: int
    reason: str


@final
@attrs.frozen
class Guard:
    """What a dashboard asks of a request.

    A page elsewhere cannot read what is shown here, or change it, even where it
    gets a browser to send requests, or a name to lead here: the name that was
    asked for has to be known, and where a request changes something, or
    occupies a stream, it has to come from this very page.
    """

    hosts: frozenset[str]
    """Host names that are answered to, as `host_name` makes them."""
    others: frozenset[str] = frozenset()
    """Those of them that the user named, for pages behind a proxy."""
    token: str | None = attrs.field(default=None, repr=False)
    """What the one has to know who changes something; None lets nobody."""

    def check_host(self, headers: Mapping[str, str]) -> Refusal | None:
        """Check that the host asked for is known."""
        name = host_name(headers.get("host", ""))
        if name in self.hosts:
            return None
        return Refusal(403, "this host is not known here: name it in hosts=")

    def check_origin(self, headers: Mapping[str, str]) -> Refusal | None:
        """Check that a request comes from this page, or from no page."""
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return Refusal(403, "a page elsewhere may not do this")
        origin = headers.get("origin")
        if origin is None or self._is_own(origin, headers.get("host", "")):
            return None
        return Refusal(403, "a page elsewhere may not do this")

    def _is_own(self, origin: str, host: str) -> bool:
        scheme, separator, where = origin.partition("://")
        if not separator or scheme not in ("http", "https"):
            return False
        default = ":443" if scheme == "https" else ":80"
        if where.lower().removesuffix(default) == host.lower().removesuffix(default):
            return True
        return host_name(where) in self.others

    def check_token(self, headers: Mapping[str, str]) -> Refusal | None:
        """Check that who asks may change something."""
        if self.token is None:
            return Refusal(403, "this dashboard only looks: it has no token=")
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Both are compared in full, so that the time tells nothing.
        same = hmac.compare_digest(given.strip().encode(), self.token.encode())
        if scheme.lower() == "bearer" and same:
            return None
        return Refusal(401, "a token is needed: Authorization: Bearer ...")


def make_guard(bound: str | None, named: frozenset[str], token: str | None) -> Guard:
    """Make the guard of a server that is bound to a host; ``named`` is checked.

    Raises:
      TypeError, ValueError: a bad token.
    """
    check_token(token)
    own = _LOOPBACK if bound is None else _LOOPBACK | {host_name_of(bound)}
    return Guard(own | named, named, token)


def host_name(header: str) -> str:
    """Return the name in a Host header, without its port; empty if it is none."""
    found = _HOST.fullmatch(header)
    return "" if found is None else host_name_of(found[1] or found[2])


def host_name_of(name: str) -> str:
    """Write a host's name, or its address, the way that all are written."""
    name = name.lower().removesuffix(".")
    return str(ip_address(name)) if _is_address(name) else name


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def check_token(token: object) -> None:
    """Accept a token that is hard to guess and can be sent."""
    if token is None:
        return
    expected = f"a str of {_LEAST_TOKEN} or more ASCII characters without spaces"
    # What is refused is a secret all the same, so it is not quoted.
    if not isinstance(token, str):
        raise TypeError(f"token must be {expected}, got a {type(token).__name__}")
    if len(token) < _LEAST_TOKEN or not token.isascii():
        raise ValueError(f"token must be {expected}, got {len(token)} characters")
    if not token.isprintable() or " " in token:
        raise ValueError(f"token must be {expected}, got others")


def check_hosts(hosts: object) -> frozenset[str]:
    """Accept host names, and return them as all are written.

    Raises:
      TypeError, ValueError: they are none.
    """
    expected = "a collection of host names, such as ['pool.example.org']"
    if isinstance(hosts, str) or not isinstance(hosts, Iterable):
        raise TypeError(refuse("hosts", hosts, expected))
    return frozenset(map(_check_host, hosts))


def _check_host(name: object) -> str:
    expected = "host names without scheme, port and path"
    if not isinstance(name, str):
        raise TypeError(refuse("hosts", name, expected))
    plain = name[1:-1] if name.startswith("[") and name.endswith("]") else name
    written = host_name_of(plain)
    if not written or not (_is_address(written) or host_name(written) == written):
        raise ValueError(refuse("hosts", name, expected))
    return written
