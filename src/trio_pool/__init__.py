"""The worker pool for trio: supervised workers, typed replies, kept promises."""

from ._config import PoolConfig as PoolConfig
from ._config import PoolOptions as PoolOptions
from ._current import CurrentJob as CurrentJob
from ._current import current_job as current_job
from ._errors import BacklogFull as BacklogFull
from ._errors import CircuitOpen as CircuitOpen
from ._errors import JobCancelled as JobCancelled
from ._errors import JobDropped as JobDropped
from ._errors import JobError as JobError
from ._errors import JobExpired as JobExpired
from ._errors import JobTimeout as JobTimeout
from ._errors import PoolBroken as PoolBroken
from ._errors import PoolClosed as PoolClosed
from ._errors import PoolError as PoolError
from ._errors import WorkerCrashed as WorkerCrashed
from ._errors import WouldDeadlock as WouldDeadlock
from ._errors import WrongThread as WrongThread
from ._events import Event as Event
from ._events import EventKind as EventKind
from ._events import EventsLost as EventsLost
from ._events import Hooks as Hooks
from ._events import JobChanged as JobChanged
from ._events import JobId as JobId
from ._events import JobState as JobState
from ._events import PoolChanged as PoolChanged
from ._events import PoolResized as PoolResized
from ._events import PoolState as PoolState
from ._events import PoolStatistics as PoolStatistics
from ._events import Settled as Settled
from ._events import ShutdownReport as ShutdownReport
from ._events import WorkerChanged as WorkerChanged
from ._events import WorkerSnapshot as WorkerSnapshot
from ._events import WorkerState as WorkerState
from ._guards import CircuitBreaker as CircuitBreaker
from ._guards import CircuitStatistics as CircuitStatistics
from ._guards import Rate as Rate
from ._job import Reply as Reply
from ._latency import Latency as Latency
from ._lease import LeasedTaskWorker as LeasedTaskWorker
from ._lease import LeasedWorker as LeasedWorker
from ._policy import Autoscale as Autoscale
from ._policy import Backoff as Backoff
from ._policy import Priority as Priority
from ._policy import Restart as Restart
from ._policy import Retry as Retry
from ._pool import Pool as Pool
from ._pool import TaskPool as TaskPool
from ._pool import open_pool as open_pool
from ._progress import Progress as Progress
from ._telling import EventStream as EventStream
from .drain import Drain as Drain
from .streams import Stream as Stream
from .tasks import Task as Task

# Tracebacks, pickles and documentation show the public names.
_public: object
for _public in list(globals().values()):
    if getattr(_public, "__module__", "").startswith("trio_pool._"):
        _public.__module__ = __name__
