"""The README keeps its word: its programs run and print what it says."""

from __future__ import annotations

import ast
import functools
import logging
import os
import re
from pathlib import Path

import pytest
import trio
from hypothesis import settings
from trio.testing import MockClock

import trio_pool
import trio_pool.logs
import trio_pool.prometheus
import trio_pool.testing
from trio_pool.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(*languages: str) -> list[tuple[int, str]]:
    """Return the line and the text of every fenced block in these languages."""
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [
        (README.count("\n", 0, match.start(2)), match[2])
        for match in found
        if match[1] in languages
    ]


def slug(heading: str) -> str:
    """Return the anchor of a heading, by the rule that is used on GitHub."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def sections() -> dict[str, str]:
    """Return the text under every heading, up to the next one, by its anchor."""
    # A comment in a program is no heading.
    bare = re.sub(
        r"^```.*?^```$",
        lambda block: re.sub(r"[^\n]", "`", block[0]),
        README,
        flags=re.MULTILINE | re.DOTALL,
    )
    found = list(re.finditer(r"^#+ (.+)$", bare, re.MULTILINE))
    ends = [match.start() for match in found[1:]] + [len(README)]
    texts = {
        slug(match[1]): README[match.start() : end]
        for match, end in zip(found, ends, strict=True)
    }
    assert len(texts) == len(found), "two headings of one anchor"
    return texts


SECTIONS = sections()
ANCESTORS = SECTIONS["where-the-features-of-its-ancestors-went"]
PROGRAMS = blocks("python")
COMMANDS = [line for _, text in blocks("console", "sh") for line in text.splitlines()]


@pytest.mark.parametrize(
    ("line", "program"),
    [pytest.param(*block, id=f"line {block[0]}") for block in PROGRAMS],
)
def test_each_program_prints_what_it_says(
    line: int,
    program: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each on its own, on a clock that jumps over every sleep."""

    @functools.wraps(trio.run)
    def run(
        *args: object, clock: trio.abc.Clock | None = None, **how: object
    ) -> object:
        return real_run(*args, clock=clock or MockClock(autojump_threshold=0), **how)

    real_run = trio.run
    monkeypatch.setattr(trio, "run", run)
    for variable in os.environ:
        if variable.startswith("POOL_"):
            monkeypatch.delenv(variable)
    # Blank lines first, so that a traceback names the line in the README.
    code = compile("\n" * line + program, ROOT / "README.md", "exec")
    with monkeypatch.context() as patch:
        # A program may set variables: they are undone with these.
        patch.setattr(os, "environ", dict(os.environ))
        # It may set up logging too: that of pytest is in the way, and comes back.
        patch.setattr(logging.root, "handlers", [])
        level = logging.root.level
        try:
            exec(code, {"__name__": "__main__"})
        finally:
            logging.root.setLevel(level)
    expected = re.findall(r"# prints: (.*)$", program, re.MULTILINE)
    assert expected, "a program without a word on what it prints"
    assert capsys.readouterr().out.splitlines() == expected


def test_the_readme_has_a_program_for_every_way_to_use_a_pool() -> None:
    """A name that is used nowhere would be missed here."""
    text = "".join(program for _, program in PROGRAMS)
    for kind in (trio_pool.Pool, trio_pool.TaskPool):
        for name in dir(kind):
            if not name.startswith("_") and callable(getattr(kind, name)):
                assert f"pool.{name}(" in text, name


def test_every_option_of_a_pool_is_named() -> None:
    for option in trio_pool.PoolOptions.__annotations__:
        assert re.search(rf"\b{option}\b", README, re.IGNORECASE), option


def test_the_programs_import_only_public_names() -> None:
    for _, program in PROGRAMS:
        for node in ast.walk(ast.parse(program)):
            if isinstance(node, ast.ImportFrom) and node.module == "trio_pool":
                for alias in node.names:
                    assert hasattr(trio_pool, alias.name), alias.name


def test_its_commands_are_sessions_of_the_noxfile() -> None:
    noxfile = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    sessions = {
        node.name
        for node in noxfile.body
        if isinstance(node, ast.FunctionDef)
        and any("nox.session" in ast.unparse(mark) for mark in node.decorator_list)
    }
    commands = [one for one in COMMANDS if not one.startswith("trio-pool ")]
    assert commands == ["python3 noxfile.py demo", "python3 noxfile.py tests"]
    for command in commands:
        assert command.split()[2] in sessions


def test_its_command_lines_have_the_options_that_it_uses(
    capsys: pytest.CaptureFixture[str],
) -> None:
    commands = [one.split() for one in COMMANDS if one.startswith("trio-pool ")]
    assert {words[1] for words in commands} == {"map", "top", "bench"}
    for _, command, *words in commands:
        with pytest.raises(SystemExit, match=r"\A0\Z"):
            main([command, "--help"])
        text = capsys.readouterr().out
        for option in (word for word in words if word.startswith("-")):
            assert f"{option} " in text or f"{option}]" in text, option


def test_the_stress_recipe_finds_a_bug_that_is_planted_in_it() -> None:
    """Without its most important line, and shrunk to a program of few steps."""
    (program,) = (text for _, text in blocks("python") if "stress_pool(" in text)
    (line,) = (line for line in program.splitlines() if "answers.clear()" in line)
    broken = program.replace(f"{line}\n", "")
    usual = settings.get_current_profile_name()
    # The same programs each time: how long it takes to shrink one is all chance.
    settings.register_profile("recipe", derandomize=True, deadline=None)
    settings.load_profile("recipe")
    try:
        with pytest.raises(
            AssertionError, match=r"check\(\d, \d+\) returned False"
        ) as found:
            exec(compile(broken, ROOT / "README.md", "exec"), {"__name__": "__main__"})
    finally:
        settings.load_profile(usual)
    notes = "\n".join(found.value.__notes__)
    steps = re.findall(r"^(?:\w+ = )?state\.(\w+)\(", notes, re.MULTILINE)
    assert steps[0] == "open"
    assert steps[-1] == "teardown"
    # Two jobs, what cuts the first one short, and perhaps some time between.
    assert len(steps) - 2 <= 8, notes


def test_every_file_that_it_names_exists() -> None:
    named = re.findall(r"\b(?:examples|benchmarks)/\w+\.py\b", README)
    assert {"examples/checksums.py", "benchmarks/compare.py"} <= set(named)
    for name in named:
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_the_options_and_errors_it_names_exist() -> None:
    """Every word in code marks that looks like an error, and every variable."""
    words = set(re.findall(r"`(\w+)`", README))
    for word in words:
        if re.match(r"(Job|Pool|Worker|Backlog)[A-Z]\w+$", word):
            homes = (trio_pool, trio_pool.testing, trio_pool.prometheus, trio_pool.logs)
            assert any(hasattr(home, word) for home in homes), word
    config = trio_pool.PoolConfig.from_env("X_", {"X_SIZE": "3", "X_NAME": "x"})
    for word in words:
        if word.isupper():
            assert hasattr(config, word.lower()), word


def test_every_link_within_it_leads_to_a_heading() -> None:
    for anchor in re.findall(r"\]\(#([^)]*)\)", README):
        assert anchor in SECTIONS, anchor


def test_the_ancestors_are_named() -> None:
    for name in ("go-async", "go-pool", "go-asynctasklib", "goman", "loomy"):
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", ANCESTORS), name


def test_every_feature_of_an_ancestor_leads_to_a_program_or_is_not_there_yet() -> None:
    """The programs are those that a test above runs."""
    table = re.findall(r"^\|(.*)\|(.*)\|(.*)\|$", ANCESTORS, re.MULTILINE)
    rows = [row for row in table[2:] if not row[0].strip().startswith("**")]
    # All of what the ancestors had, though neighbours may share a row.
    assert len(rows) >= 50
    for theirs, here, see in rows:
        anchors = re.findall(r"\]\(#([^)]*)\)", see)
        assert anchors or "not there yet" in here, theirs
        for anchor in anchors:
            assert "```python\n" in SECTIONS[anchor], (theirs, anchor)
