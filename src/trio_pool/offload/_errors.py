"""What can go wrong between here and the other end, apart from the job itself."""

from __future__ import annotations

from typing import final

from .._errors import PoolError


@final
class RemoteError(PoolError):
    """Stands for what could not be sent between here and the other end.

    ``started`` says whether the job may have run.
    """

    def __init__(
        self, what: str, type_name: str, reason: str, started: bool, text: str = ""
    ) -> None:
        super().__init__(what, type_name, reason, started, text)
        self.what = what
        """Which part of a job it is: ``argument``, ``result`` or ``error``."""
        self.type_name = type_name
        """Of what type it is, as far as that is known."""
        self.reason = reason
        """Why it could not be sent."""
        self.started = started
        self.text = text
        """Of an error its whole traceback, as text."""

    def __str__(self) -> str:
        kind = f" of type {self.type_name}" if self.type_name else ""
        said = (
            f"the job's {self.what}{kind} cannot be sent between processes: "
            f"{self.reason}"
        )
        return f"{said}\n\n{self.text}" if self.text else said


@final
class EngineError(PoolError):
    """What happened to the process, actor or executor that ran a worker's jobs."""


@final
class PayloadWarning(UserWarning):
    """A job carries so much that pickling it holds up trio's loop."""
