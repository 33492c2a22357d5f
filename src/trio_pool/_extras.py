"""What a public module shows: its names as its own, those of extras when asked for."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def publish(namespace: dict[str, Any]) -> None:
    """Have tracebacks, pickles and documentation show the public names."""
    _publish(namespace["__name__"], namespace)


def _publish(package: str, found: dict[str, Any]) -> None:
    for value in list(found.values()):
        if getattr(value, "__module__", "").startswith(f"{package}._"):
            value.__module__ = package


def from_extras(
    namespace: dict[str, Any], where: Mapping[str, tuple[str, str]]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Make the ``__getattr__`` and ``__dir__`` of a package.

    ``where`` says of a name in which module it is, which is imported when the
    name is first asked for, and which extra brings what that needs.
    """
    package = namespace["__name__"]

    def find(name: str) -> object:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, extra = where[name]
        try:
            found = getattr(import_module(f".{module}", package), name)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("trio_pool"):
                raise
            raise ImportError(
                f"{package}.{name} needs {error.name}, which is not installed: "
                f"pip install trio-pool[{extra}]"
            ) from error
        _publish(package, {name: found})
        namespace[name] = found
        return found

    def names() -> list[str]:
        helpers = {"TYPE_CHECKING", "publish", "from_extras"}
        return sorted({*namespace, *where} - helpers)

    return find, names
