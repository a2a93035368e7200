"""docs/cli.md, made from `--help`: `python tests/cli_page.py` writes it (`make fix`), a test compares."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.testing import CliRunner

from kvlink_rag import cli

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"


def page() -> str:
    """The whole page."""
    root = typer.main.get_command(cli.app)
    parts = ["# The command\n\nWhat every command says of itself with `--help`. Written by `make fix`.\n"]

    def add(command, words):
        text = (
            CliRunner().invoke(cli.app, [*words[1:], "--help"], env={"COLUMNS": "110", "TERMINAL_WIDTH": "110"}).output
        )
        lines = "\n".join(line.rstrip() for line in text.strip().splitlines()).replace("Usage: root", "Usage: kvlink")
        parts.append(f"## {' '.join(words)}\n\n```text\n{lines}\n```\n")
        for name, child in getattr(command, "commands", {}).items():
            add(child, [*words, name])

    add(root, ["kvlink"])
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
