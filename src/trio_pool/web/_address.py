"""Reads addresses such as ``127.0.0.1:8765`` and listens at them."""

import socket
import sys
from contextlib import suppress
from typing import final

import attrs

from .._checks import refuse

_EXPECTED = "host:port, such as '127.0.0.1:8765' or '[::1]:0'"
_BACKLOG = 100
# Seconds after which a connection is given up whose other end takes nothing.
_STUCK = 30


@final
@attrs.frozen
class Address:
    """Where to listen."""

    option: str
    """What the user calls it."""
    text: str
    """As the user wrote it."""
    host: str
    port: int


def parse_address(option: str, text: object) -> Address:
    """Read an address.

    Raises:
      TypeError, ValueError: it is none.
    """
    if not isinstance(text, str):
        raise TypeError(refuse(option, text, _EXPECTED))
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host or "[" in host or "]" in host or "/" in host:
        raise ValueError(refuse(option, text, _EXPECTED))
    digits = port.isascii() and port.isdigit()
    if not colon or not host or not digits or int(port) > 65535:
        raise ValueError(refuse(option, text, _EXPECTED))
    return Address(option, text, host, int(port))


def listen_at(address: Address) -> socket.socket:
    """Open a listening socket.

    Raises:
      OSError: nobody can listen there; the message names the address and why.
    """
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, where = found[0]
        opened = socket.socket(family, kind, protocol)
    except UnicodeError:
        raise ValueError(refuse(address.option, address.text, _EXPECTED)) from None
    except OSError as error:
        raise _explain(address, error) from None
    try:
        _set_options(opened)
        opened.bind(where)
        opened.listen(_BACKLOG)
    except OSError as error:
        opened.close()
        raise _explain(address, error) from None
    return opened


def _set_options(opened: socket.socket) -> None:
    if sys.platform == "win32":
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:
        # Else nobody could listen there again until old connections are forgotten.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with suppress(OSError, AttributeError):
        # Inherited by the connections; in milliseconds.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * _STUCK)


def _explain(address: Address, error: OSError) -> OSError:
    why = error.strerror or str(error)
    message = f"{address.option}={address.text!r}: cannot listen there: {why}"
    return type(error)(error.errno, message)


def url_of(opened: socket.socket) -> str:
    """Return the URL at which a listening socket is reached."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
