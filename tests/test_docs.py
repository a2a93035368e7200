"""README and docs say what the code does: their code blocks run, their commands work, their figures' files exist."""

from __future__ import annotations

import re
import shlex
import sys

import cli_page
import models_page
import pytest
from conftest import ROOT

from kvlink_rag import cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN_HERE = (
    "kvlink bench",
    "kvlink chat",
    "kvlink check",
    "kvlink eval",
    "kvlink serve",
    "kvlink train",
)  # minutes long or interactive; tests of their own run them


def blocks(page, language):
    return [body for kind, body in BLOCK.findall(page.read_text("utf-8")) if kind == language]


@pytest.fixture
def folder(examples, monkeypatch):
    """A working folder in which the examples lie where the docs say, with two of their documents."""
    monkeypatch.chdir(examples.parent)
    return examples.parent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, folder, capsys, request):
    """The blocks of a page run in order, as one program."""
    if page.name != "training.md":  # which changes what it loads
        request.getfixturevalue("loaded_once")
    namespace: dict[str, object] = {}
    for body in blocks(page, "python"):
        exec(compile(body, str(page), "exec"), namespace)


def test_readme_commands_run(folder, loaded_once, monkeypatch, capsys):
    for body in blocks(ROOT / "README.md", "bash"):
        for line in body.splitlines():
            command = shlex.split(line, comments=True)
            if command[:1] != ["kvlink"] or line.startswith(NOT_RUN_HERE):
                continue
            monkeypatch.setattr(sys, "argv", command)
            with pytest.raises(SystemExit) as exit_:
                cli.main()
            assert not exit_.value.code, line


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_make_targets_and_commands_named_exist(page):
    text = page.read_text("utf-8")
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {
        word for line in re.findall(r"\bmake ((?:\w+ ?)+)", "\n".join(blocks(page, "bash"))) for word in line.split()
    }
    assert named <= targets
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands} | {
        "store",
        "bench",
    }
    assert set(re.findall(r"`kvlink (\w+)", text)) <= commands


def test_the_command_s_page_is_what_help_says():
    assert cli_page.PAGE.read_text("utf-8") == cli_page.page(), "run: make fix"


def test_the_table_of_models_is_what_the_tests_prove():
    assert models_page.PAGE.read_text("utf-8") == models_page.page(), "run: make fix"


def test_every_page_stands_in_the_navigation_once():
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_every_example_is_named_in_the_docs():
    text = (ROOT / "README.md").read_text("utf-8") + (ROOT / "docs" / "index.md").read_text("utf-8")
    names = [path.stem for path in (ROOT / "examples").glob("*.py")]
    assert [name for name in names if name not in text and not name.startswith(("lang", "llama", "event"))] == []


def test_the_readme_maps_every_file():
    text = (ROOT / "README.md").read_text("utf-8")
    modules = [path for path in (ROOT / "kvlink_rag").rglob("*.py") if path.name != "__init__.py"]
    assert [path.name for path in modules if f"`{path.name}`" not in text] == []
