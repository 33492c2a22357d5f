"""How far many jobs are, drawn ten times a second by one task.

`Pool.map`, `Pool.settle` and `Pool.stream` take ``progress=``: True or a label for
what suits the terminal, or one of the bars here, or any `trio_pool.Progress`.
"""

from typing import TYPE_CHECKING

from .._extras import from_extras, publish
from ._plain import LogLines as LogLines
from ._plain import PlainBar as PlainBar
from ._show import show_progress as show_progress

if TYPE_CHECKING:
    from ._rich import RichBar as RichBar
    from ._tqdm import TqdmBar as TqdmBar
else:
    __getattr__, __dir__ = from_extras(
        globals(),
        {"TqdmBar": ("_tqdm", "progress"), "RichBar": ("_rich", "rich")},
    )

publish(globals())
