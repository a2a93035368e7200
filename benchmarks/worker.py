"""What stands around a rival in its own process: JSON lines in and out, one clock for all.

Standard library only, so that it runs in every rival's environment. The clock runs from the texts' arrival to the
first token's: tokenising, looking up, computing, everything included. Seconds of processor time are those of the
whole process, all threads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import types
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol


class Clock:
    """Started when the question is there; the rival says when it has the first token."""

    def __init__(self) -> None:
        self.first_token_s: float | None = None
        self.cpu_s: float | None = None
        self._cpu_started, self._started = time.process_time(), time.perf_counter()

    def first_token(self, *_: Any) -> None:
        """The first token is there; later calls change nothing. Takes whatever a callback is handed."""
        if self.first_token_s is None:
            self.first_token_s, self.cpu_s = self._seconds()

    def ended(self) -> dict[str, float]:
        """All seconds, now that the call has returned."""
        self.first_token()
        return_s, return_cpu_s = self._seconds()
        assert self.first_token_s is not None and self.cpu_s is not None
        return {
            "first_token_s": self.first_token_s,
            "cpu_s": self.cpu_s,
            "return_s": return_s,
            "return_cpu_s": return_cpu_s,
        }

    def _seconds(self) -> tuple[float, float]:
        return time.perf_counter() - self._started, time.process_time() - self._cpu_started


class Rival(Protocol):
    """A way to the first token.

    ask gets `prompts.Ask` as a namespace and may return own_clock_s (what the rival itself says it took),
    reused_tokens, prompt_tokens, and first_token (its text).
    """

    @property
    def packages(self) -> tuple[str, ...]:
        """Whose versions are reported."""

    def forget(self) -> None:
        """Drop everything cached."""

    def ask(self, ask: Any, clock: Clock) -> dict[str, Any]:
        """Compute the first answer token."""


def serve(make: Callable[[argparse.Namespace], Rival], options: argparse.ArgumentParser | None = None) -> None:
    """Load the rival, then answer one JSON line with another until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print goes to the log
    parser = options or argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="folder")
    parser.add_argument("--max-tokens", type=int, required=True, help="of the longest prompt")
    parser.add_argument("--store", required=True, help="folder for what is kept on disk")
    rival = make(parser.parse_args())

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    import torch  # after the rival, which may have a say in how it is loaded

    say({"versions": _versions(("torch", *rival.packages)), "threads": torch.get_num_threads()})
    for line in sys.stdin:
        request = json.loads(line)
        ask = types.SimpleNamespace(**request["ask"])
        if request["forget"]:
            rival.forget()
        clock = Clock()
        found = rival.ask(ask, clock)
        say({**clock.ended(), **found})


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "from this folder"
    return found
