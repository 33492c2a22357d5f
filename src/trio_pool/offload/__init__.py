"""Workers off the thread and off the machine: the same pool, other engines.

Each is given to ``open_pool(size, worker=...)``. Those by engines that are no
part of this package need an extra, and import it when they are first asked for:
``pip install trio-pool[process]``, ``[dask]``, ``[ray]``.
"""

from typing import TYPE_CHECKING

from .._extras import from_extras, publish
from ._bridge import wait_future as wait_future
from ._errors import EngineError as EngineError
from ._errors import PayloadWarning as PayloadWarning
from ._errors import RemoteError as RemoteError
from ._executor import on_executor as on_executor
from ._thread import in_thread as in_thread

if TYPE_CHECKING:
    from ._dask import on_dask as on_dask
    from ._process import in_process as in_process
    from ._ray import on_ray as on_ray

# In which module each is, and the extra that brings what it needs.
_BY_EXTRAS = {
    "in_process": ("_process", "process"),
    "on_dask": ("_dask", "dask"),
    "on_ray": ("_ray", "ray"),
}

publish(globals())
if not TYPE_CHECKING:
    # Checkers of types are to find out names that are misspelt.
    __getattr__, __dir__ = from_extras(globals(), _BY_EXTRAS)
