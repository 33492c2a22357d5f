"""The command line ``trio-pool``: one module for each of its commands."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# A command's module is imported only when that command is asked for.
_COMMANDS = {
    "map": "run a function of yours for each line of a file",
    "top": "watch the pools of a dashboard in the terminal",
    "bench": "measure what a pool costs on this machine",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, by default that of this process; return its exit code.

    Signals are heeded while a command runs, so it belongs on the main thread.

    Raises:
      SystemExit: by argparse: 0 after ``--help``, 2 if an option is not understood.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    options = _parser_for(words[0] if words else "").parse_args(words)
    code: int = options.run(options)
    return code


def _parser_for(chosen: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trio-pool", description="A supervised worker pool, from the command line."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in _COMMANDS.items():
        if name == chosen:
            import_module(f"{__name__}._{name}").add_to(commands)
        else:
            commands.add_parser(name, help=summary)
    return parser
