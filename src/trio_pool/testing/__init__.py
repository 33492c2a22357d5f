"""What tests of pools need: stress, faults, task orders, checks, simulated load.

Nothing of it is imported by the pool itself. `stress_pool`, `PoolMachine` and
`StressReport` need hypothesis, which comes with ``pip install
trio-pool[testing]``, and import it when they are first asked for.
"""

from typing import TYPE_CHECKING

from .._extras import from_extras, publish
from ._checks import AnyPool as AnyPool
from ._checks import RecordingHooks as RecordingHooks
from ._checks import assert_books_balance as assert_books_balance
from ._checks import assert_idle as assert_idle
from ._checks import settle as settle
from ._faults import Fault as Fault
from ._faults import FaultKind as FaultKind
from ._faults import FaultMoment as FaultMoment
from ._faults import Faults as Faults
from ._faults import InjectedCrash as InjectedCrash
from ._faults import InjectedFault as InjectedFault
from ._faults import Injection as Injection
from ._inline import InlinePool as InlinePool
from ._inline import InlineTaskPool as InlineTaskPool
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
from ._schedules import Moment as Moment
from ._schedules import call_at as call_at
from ._schedules import call_everywhere as call_everywhere
from ._schedules import cancel_at as cancel_at
from ._schedules import cancel_everywhere as cancel_everywhere
from ._schedules import explore_orders as explore_orders
from ._schedules import run_in_order as run_in_order
from ._scripted import ScriptedWorker as ScriptedWorker
from ._scripted import Step as Step
from ._simulation import JobOptions as JobOptions
from ._simulation import SimulatedFailure as SimulatedFailure
from ._simulation import simulate as simulate

if TYPE_CHECKING:
    from ._machine import PoolMachine as PoolMachine
    from ._stress import StressReport as StressReport
    from ._stress import stress_pool as stress_pool

_BY_EXTRAS = {
    "PoolMachine": ("_machine", "testing"),
    "StressReport": ("_stress", "testing"),
    "stress_pool": ("_stress", "testing"),
}

publish(globals())
if not TYPE_CHECKING:
    # Checkers of types are to find out names that are misspelt.
    __getattr__, __dir__ = from_extras(globals(), _BY_EXTRAS)
