"""Time to the first token: kvlink_rag against what else can be installed, each in its own environment.

Every rival is a process that stays (rival_*.py); they take turns, one question at a time, so that whatever else the
machine does falls on all of them alike. The same weights in float32, documents, questions, threads and clock for all.

    python benchmarks/rivals.py --out FOLDER [--rounds 5] [--tokens 100,200,400] [--threads 1] [--rivals "NAME;NAME"]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import table
from prompts import CASES, Ask, rounds
from table import Run

HERE = Path(__file__).parent
LIMIT_S = 600.0  # for one answer, loading included; then the rival counts as failed
WARM_UP_TOKENS = 60  # of a document
MARGIN_TOKENS = 256  # of a prompt, around its documents


@dataclass(frozen=True)
class Arm:
    """A rival as it is started. environment: a folder under .venvs; "" is the project's own."""

    name: str
    environment: str
    arguments: tuple[str, ...]
    cases: tuple[str, ...] = CASES


ARMS = (
    Arm(table.FULL, "hugging-face", ("rival_hugging_face.py", "full"), CASES[:1]),  # nothing changes by the case
    Arm(table.EXACT, "hugging-face", ("rival_hugging_face.py", "prefix")),
    Arm(table.VLLM, "vllm", ("rival_vllm.py",)),
    Arm("kvboost", "kvboost", ("rival_kvboost.py",)),
    Arm("mellea, cache=True", "mellea", ("rival_mellea.py", "public"), CASES[:2]),  # it reuses not even these
    Arm("mellea, its helpers by hand", "mellea", ("rival_mellea.py", "helpers")),
    Arm("kvlink_rag", "", ("rival_kvlink.py",)),
    Arm("kvlink_rag, from disk", "", ("rival_kvlink.py", "--memory-tier", "off"), CASES[1:]),  # what that one stored
)


class Failed(Exception):
    """A rival that cannot go on, with its reason."""


class Worker:
    """A rival in its own process, spoken to in JSON lines; what it prints goes to a log."""

    def __init__(self, arm: Arm, shared: Sequence[str], threads: int, log: Path):
        self.arm, self._log = arm, log
        python = HERE / ".venvs" / arm.environment / "bin" / "python" if arm.environment else Path(sys.executable)
        if not python.exists():
            raise Failed(f"no environment benchmarks/.venvs/{arm.environment}; make rivals builds it")
        script, *own = arm.arguments
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [str(python), str(HERE / script), *own, *shared],
                env=_environment(threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
            )
        self.about = self._answer()
        if self.about["threads"] != threads:
            self.close()
            raise Failed(f"computes on {self.about['threads']} threads, not on {threads}")

    def ask(self, ask: Ask, *, forget: bool) -> dict[str, Any]:
        """Put a question, with an empty cache where `forget`; the run as it was measured."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"ask": asdict(ask), "forget": forget}) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise Failed(self._reason()) from None
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # it was gone before
                pipe.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(LIMIT_S, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            raise Failed(self._reason())
        found: dict[str, Any] = json.loads(line)
        return found

    def _reason(self) -> str:
        """The last words of a process that has ended."""
        self.close()
        lines = [line for line in self._log.read_text("utf-8", "replace").splitlines() if line.strip()]
        return f"{lines[-1].strip() if lines else 'no message'} (exit code {self._process.returncode})"


def measure(workers: dict[str, Worker], round_: Sequence[Ask], number: int, failed: dict[str, str]) -> Iterator[Run]:
    """The runs of a round: in each case the rivals take turns, in an order of its own."""
    for ask in round_:
        turn = [name for name in workers if ask.case in workers[name].arm.cases and name not in failed]
        random.Random(f"{ask.tokens_per_document} {number} {ask.case}").shuffle(turn)
        for name in turn:
            try:
                found = workers[name].ask(ask, forget=ask.case == CASES[0])
            except Failed as error:
                failed[name] = str(error)
                _say(f"{name}: {error}")
                continue
            _say(f"{ask.tokens_per_document} {number} {ask.case:<10} {name:<28} {found['first_token_s']:.3f} s")
            yield {
                "rival": name,
                "case": ask.case,
                "documents": len(ask.documents),
                "tokens_per_document": ask.tokens_per_document,
                "round": number,
                **found,
            }


def start(arms: Sequence[Arm], shared: Sequence[str], options: argparse.Namespace) -> Iterator[Worker | str]:
    """Each arm's worker, or why there is none."""
    for number, arm in enumerate(arms):
        log = options.out / f"{number}-{Path(arm.arguments[0]).stem}.log"
        try:
            yield Worker(arm, shared, options.threads, log)
        except Failed as error:
            yield str(error)


def main() -> None:
    options = _options()
    from transformers import AutoTokenizer

    from kvlink_rag.default_models import default_model_folder

    options.out.mkdir(parents=True, exist_ok=True)
    model = default_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    asks = [list(rounds(tokenizer, options.documents, tokens, options.rounds)) for tokens in options.tokens]
    arms = [arm for arm in ARMS if not options.rivals or arm.name in options.rivals]
    max_tokens = options.documents * max(options.tokens) + MARGIN_TOKENS
    workers: dict[str, Worker] = {}
    failed: dict[str, str] = {}
    runs: list[Run] = []
    results = {**_circumstances(options), "rivals": [arm.name for arm in arms], "failed": failed, "runs": runs}
    with tempfile.TemporaryDirectory(prefix="kvlink-rivals-") as store:
        shared = ("--model", str(model), "--max-tokens", str(max_tokens), "--store", store)
        try:
            for arm, started in zip(arms, start(arms, shared, options), strict=True):
                if isinstance(started, str):
                    failed[arm.name] = started
                else:
                    workers[arm.name] = started
                _say(f"{arm.name}: {started if isinstance(started, str) else started.about}")
            results["about"] = {name: worker.about for name, worker in workers.items()}
            warm_up = next(rounds(tokenizer, options.documents, WARM_UP_TOKENS, 1))
            list(measure(workers, warm_up, -1, failed))
            for number in range(options.rounds):
                for rounds_ in asks:
                    runs += measure(workers, rounds_[number], number, failed)
                _write(options.out, results)
        finally:
            for worker in workers.values():
                worker.close()
    _say(table.markdown(results))


def _circumstances(options: argparse.Namespace) -> dict[str, Any]:
    """What has to be known beside the figures."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "arguments": {name: value for name, value in vars(options).items() if name != "out"},
        "machine": f"{os.cpu_count()} x {_processor()}",
        "dtype": "float32",
        "threads": options.threads,
        "num_documents": options.documents,
    }


def _write(folder: Path, results: dict[str, Any]) -> None:
    (folder / "rivals.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    (folder / "rivals.md").write_text(table.markdown(results), "utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time to the first token, rivals taking turns.")
    parser.add_argument("--out", type=Path, required=True, help="folder for rivals.json, rivals.md and the logs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--tokens", type=_numbers, default=[100, 200, 400], help="of a document, with commas")
    parser.add_argument("--threads", type=int, default=1, help="of every rival")
    parser.add_argument("--rivals", type=_names, default=[], help="only these, with semicolons between")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(";")]
    if unknown := sorted(set(names) - {arm.name for arm in ARMS}):
        raise argparse.ArgumentTypeError(f"no rival {unknown}; there are {'; '.join(arm.name for arm in ARMS)}")
    return names


def _environment(threads: int) -> dict[str, str]:
    """The same for all: so many threads, none of which spins while another rival computes; no network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    git = shutil.which("git")
    if git is None:
        return "unknown"
    found = subprocess.run([git, "-C", str(HERE), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
