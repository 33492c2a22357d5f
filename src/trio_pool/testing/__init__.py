"""What tests of pools need: stress, faults, task orders, checks, simulated load.

Nothing of it is imported by the pool itself.
"""

from ._schedules import Moment as Moment
from ._schedules import call_at as call_at
from ._schedules import call_everywhere as call_everywhere
from ._schedules import cancel_at as cancel_at
from ._schedules import cancel_everywhere as cancel_everywhere
from ._schedules import explore_orders as explore_orders
from ._schedules import run_in_order as run_in_order
from ._checks import AnyPool as AnyPool
from ._checks import RecordingHooks as RecordingHooks
from ._checks import assert_books_balance as assert_books_balance
from ._checks import assert_idle as assert_idle
from ._checks import settle as settle
from ._faults import Fault as Fault
from ._faults import FaultKind as FaultKind
from ._faults import Faults as Faults
from ._faults import InjectedCrash as InjectedCrash
from ._faults import InjectedFault as InjectedFault
from ._faults import Injection as Injection
from ._faults import Moment as Moment
from ._loads import ArrivalModel as ArrivalModel
from ._loads import Arrivals as Arrivals
from ._loads import Bursts as Bursts
from ._loads import Constant as Constant
from ._loads import Exponential as Exponential
from ._loads import HandlerModel as HandlerModel
from ._loads import LogNormal as LogNormal
from ._loads import OnOff as OnOff
from ._loads import Poisson as Poisson
from ._loads import Recorded as Recorded
from ._loads import Regular as Regular
from ._loads import Trace as Trace
from ._loads import Uniform as Uniform
from ._report import SimulationReport as SimulationReport
from ._report import Times as Times
from ._simulation import JobOptions as JobOptions
from ._simulation import SimulatedFailure as SimulatedFailure
from ._simulation import simulate as simulate

# Tracebacks, pickles and documentation show the public names.
_public: object
for _public in list(globals().values()):
    if getattr(_public, "__module__", "").startswith("trio_pool.testing._"):
        _public.__module__ = __name__
