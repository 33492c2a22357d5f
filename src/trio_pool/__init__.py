"""The worker pool for trio: supervised workers, typed replies, kept promises."""

from ._errors import BacklogFull as BacklogFull
from ._errors import JobCancelled as JobCancelled
from ._errors import JobDropped as JobDropped
from ._errors import JobError as JobError
from ._errors import JobTimeout as JobTimeout
from ._errors import PoolBroken as PoolBroken
from ._errors import PoolClosed as PoolClosed
from ._errors import PoolError as PoolError
from ._errors import WorkerCrashed as WorkerCrashed
from ._errors import WrongThread as WrongThread
from ._events import Hooks as Hooks
from ._events import JobChanged as JobChanged
from ._events import JobState as JobState
from ._events import PoolChanged as PoolChanged
from ._events import PoolResized as PoolResized
from ._events import PoolStatistics as PoolStatistics
from ._events import Settled as Settled
from ._events import ShutdownReport as ShutdownReport
from ._events import WorkerChanged as WorkerChanged
from ._events import WorkerSnapshot as WorkerSnapshot
from ._events import WorkerState as WorkerState
from ._job import Reply as Reply
from ._policy import Backoff as Backoff
from ._policy import PoolConfig as PoolConfig
from ._policy import PoolOptions as PoolOptions
from ._policy import Restart as Restart
from ._pool import Pool as Pool
from ._pool import TaskPool as TaskPool
from ._pool import open_pool as open_pool
from .streams import Stream as Stream

# Tracebacks, pickles and documentation show the public names.
_public: object
for _public in list(globals().values()):
    if getattr(_public, "__module__", "").startswith("trio_pool._"):
        _public.__module__ = __name__
