"""A page about pools in the browser, their health and metrics, and an orderly end.

``pip install trio-pool[web]`` brings what the page needs; to end on a signal
nothing more is needed.
"""

from typing import TYPE_CHECKING

from .._extras import from_extras, publish
from ._signals import drain_on_signal as drain_on_signal

if TYPE_CHECKING:
    from ._server import Dashboard as Dashboard
    from ._server import open_dashboard as open_dashboard
    from ._server import serve_dashboard as serve_dashboard

# In which module each is, and the extra that brings what it needs.
_BY_EXTRAS = {
    "Dashboard": ("_server", "web"),
    "open_dashboard": ("_server", "web"),
    "serve_dashboard": ("_server", "web"),
}

publish(globals())
if not TYPE_CHECKING:
    # Checkers of types are to find out names that are misspelt.
    __getattr__, __dir__ = from_extras(globals(), _BY_EXTRAS)
