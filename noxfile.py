"""Test, check and show trio_pool; needs nothing but Python 3.11 and its venv.

  python3 noxfile.py tests     THE test command: lint, types, then the tests on
                               every supported Python that is here
  python3 noxfile.py tests -k resize
                               some tests only, on this Python, with nothing else
  python3 noxfile.py demo      hash a directory tree with examples/checksums.py
  python3 noxfile.py lint      ruff: rules and format
  python3 noxfile.py types     mypy, pyright, completeness of the public types
  python3 noxfile.py bench     compare with bare trio, and with what others use
  python3 noxfile.py acts      the same acts one by one, by pytest-benchmark
  python3 noxfile.py guard     is it slower than the last release? [--base REV]
  python3 noxfile.py dask       the tests of Dask, or -k dask for all of them
  python3 noxfile.py ray        the tests of Ray, in a network with nothing but lo
  python3 noxfile.py stress    the tests with the large budget, some for half an hour
  python3 noxfile.py mutants   do the tests notice? [--module NAME] [--sample N]

What follows the name goes to the session's program: noxfile.py demo /usr/share.
Run like this, the file makes `.venv` beside itself, installs nox there and hands
over to it. Those who have nox already may call it: nox -s tests
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

NOX = "nox>=2025.5.1"
ROOT = Path(__file__).resolve().parent


def run_as_script(arguments: list[str]) -> int:
    """Make the environment that nox needs, and let nox run the session."""
    if sys.version_info < (3, 11):  # noqa: UP036 - a script meets any Python
        found = ".".join(map(str, sys.version_info[:3]))
        print(f"noxfile.py: needs Python 3.11 or newer, this is {found}.")
        return 1
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(__doc__)
        return 0
    try:
        python = environment_with_nox()
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"noxfile.py: could not set up .venv: {error}", file=sys.stderr)
        return 1
    session, *posargs = arguments
    if posargs[:1] == ["--"]:
        del posargs[0]
    noxfile = str(ROOT / "noxfile.py")
    command = [python, "-m", "nox", "-f", noxfile, "-s", session, "--", *posargs]
    if os.name != "nt":
        os.execv(python, command)
    return subprocess.run(command, check=False).returncode


def environment_with_nox() -> str:
    """Return the Python of `.venv`, in which nox and uv are installed by then."""
    venv = ROOT / ".venv"
    scripts = venv / ("Scripts" if os.name == "nt" else "bin")
    python = str(scripts / ("python.exe" if os.name == "nt" else "python"))
    # The file is written last, so a set-up that was cut short is done again. A
    # Python that was removed since leaves a dangling link, which does not exist.
    ready, usable = venv / "nox-is-ready", Path(python).exists()
    if usable and ready.exists():
        return python
    if importlib.util.find_spec("ensurepip") is None:
        print("noxfile.py: this Python has no complete venv module; on Debian and")
        print("Ubuntu: apt install python3-venv")
        sys.exit(1)
    print("noxfile.py: installing nox into .venv (first time only)", file=sys.stderr)
    # An environment that somebody made by hand is added to, not thrown away.
    make = ["-m", "venv", *([] if usable else ["--clear"]), str(venv)]
    # Standard output belongs to the session: the demo's is fed to sha256sum.
    run = functools.partial(subprocess.run, check=True, stdout=sys.stderr)
    run([sys.executable, *make])
    run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "uv"])
    run([python, "-m", "uv", "pip", "install", "-q", "--python", python, NOX])
    ready.touch()
    return python


if __name__ == "__main__":
    sys.exit(run_as_script(sys.argv[1:]))


# From here on the file is read by nox.
import nox

nox.needs_version = NOX.removeprefix("nox")
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["tests"]

RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"


def find_python(version: str) -> str | None:
    """Return a Python of this version that runs, or None.

    The first one on PATH may be a version manager's stand-in that only says
    "not found", so each is tried.
    """
    for folder in os.get_exec_path():
        program = shutil.which(f"python{version}", path=folder)
        if program is not None:
            trial = [program, "-c", ""]
            if subprocess.run(trial, capture_output=True, check=False).returncode == 0:
                return program
    return None


# The running Python comes last: its summary ends the output.
OTHERS = {v: find_python(v) for v in ("3.13", "3.11") if v != RUNNING}
PYTHONS = {v: program for v, program in OTHERS.items() if program} | {RUNNING: None}


def install(session: nox.Session, *groups: str) -> None:
    """Install trio_pool as it stands in the checkout, and dependency groups."""
    project = nox.project.load_toml(ROOT / "pyproject.toml")
    needed = nox.project.dependency_groups(project, *groups)
    # uv leaves compiling to the first import, pip does it at once.
    session.install("-e", ".", *needed, env={"UV_COMPILE_BYTECODE": "1"})


@nox.session(python=False)
def tests(session: nox.Session) -> None:
    """Run lint, types and the tests; with arguments, only pytest with them."""
    if session.posargs:
        session.notify(f"tests-{RUNNING}")
        return
    versions = [f"tests-{version}" for version in PYTHONS]
    for name in ("lint", "types", "dask", *versions):
        session.notify(name)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the rules and the format with ruff."""
    project = nox.project.load_toml(ROOT / "pyproject.toml")
    session.install(*nox.project.dependency_groups(project, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types with mypy and pyright, and that no public one is missing."""
    install(session, "typing")
    session.run("mypy")
    session.run("pyright")
    # pyright looks for the package with the first Python on PATH, which is the
    # session's; where it finds none the score is 0 %, so the score is read.
    verify = ["pyright", "--verifytypes", "trio_pool", "--ignoreexternal"]
    report = str(session.run(*verify, silent=True, success_codes=[0, 1]))
    if "Type completeness score: 100%" not in report:
        session.error(report)


# On all cores, up to four: some tests wait for processes and threads of theirs.
SPREAD = ["-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]


def unit_tests(session: nox.Session) -> None:
    """Run the tests on one Python; on this one with branch coverage."""
    install(session, "tests")
    pytest = ["python", "-m", "pytest"]
    is_running = session.name == f"tests-{RUNNING}"
    without_dask = {"TRIO_POOL_WITHOUT_DASK": "1"}
    if session.posargs:
        session.run(*pytest, *session.posargs)
    elif is_running:
        measured = ["--cov", "--cov-report=term"]
        session.run(*pytest, *SPREAD, *measured, env=without_dask)
    else:
        session.run(*pytest, *SPREAD, env=without_dask)
    if is_running:
        # pytest's summary is the last word, unless something has failed.
        logging.getLogger("nox").setLevel(logging.ERROR)


for version, program in PYTHONS.items():
    nox.session(name=f"tests-{version}", python=program)(unit_tests)


@nox.session
def demo(session: nox.Session) -> None:
    """Hash a directory tree: [DIRECTORY] [--workers N] [--algorithm NAME]."""
    install(session)
    # nox mixes the two outputs by default; one is for sha256sum, one for people.
    command = ["python", "examples/checksums.py", *session.posargs]
    session.run(*command, stderr=sys.stderr, interrupt_timeout=5)


@nox.session
def bench(session: nox.Session) -> None:
    """Compare the pool with bare trio and with its peers, under five minutes."""
    install(session, "bench", "peers")
    session.run("python", "benchmarks/compare.py", *session.posargs)


@nox.session
def acts(session: nox.Session) -> None:
    """Run single acts by pytest-benchmark, to follow one closely: -k NAME."""
    install(session, "bench", "peers")
    session.run("python", "-m", "pytest", "benchmarks", *session.posargs)


@nox.session
def guard(session: nox.Session) -> None:
    """Compare with the last release: [--base REV] [--rounds N] [--tolerance X]."""
    install(session)
    session.run("python", "benchmarks/guard.py", *session.posargs)


@nox.session
def stress(session: nox.Session) -> None:
    """Run the tests with the large budget; -s shows figures: -s tests/test_week.py."""
    install(session, "tests")
    large = {"TRIO_POOL_STRESS": "1"}
    # Some take half an hour, which is no hang.
    patient = ["-o", "faulthandler_timeout=0"]
    session.run("python", "-m", "pytest", *patient, *session.posargs, env=large)


@nox.session
def dask(session: nox.Session) -> None:
    """Try Dask: a part of its tests, which take minutes; all of them with -k dask."""
    install(session, "tests")
    tests = ["tests/test_offload_dask.py", "tests/test_conformance.py"]
    part = "values or stopped or killed_process or never_starts or sent or program"
    chosen = [*tests, "-k", f"test_offload_dask or (dask and ({part}))"]
    session.run("python", "-m", "pytest", *SPREAD, *(session.posargs or chosen))


@nox.session
def ray(session: nox.Session) -> None:
    """Try the engine that listens to the world where there is none: `unshare -n`."""
    alone = ["unshare", "--net", "--map-root-user"]
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        session.skip("needs unshare, of util-linux, and ip, of iproute2")
    if subprocess.run([*alone, "true"], check=False).returncode:
        session.skip("no network namespace can be made here")
    install(session, "ray")
    names = ("conformance", "offload", "examples")
    tests = [*(f"tests/test_{name}.py" for name in names), "-k", "ray", "-rs"]
    command = ["python", "-m", "pytest", *(session.posargs or tests)]
    shell = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    # The second one keeps Ray from a remark on standard error.
    environment = dict.fromkeys(
        ["RAY_USAGE_STATS_ENABLED", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"], "0"
    )
    session.run(*alone, *shell, *command, external=True, env=environment)


@nox.session
def mutants(session: nox.Session) -> None:
    """Break the core on purpose: [--module NAME] [--sample N] [--seed S] [--jobs N]."""
    install(session, "mutants")
    session.run("python", "tests/mutants", *session.posargs)
