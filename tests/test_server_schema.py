"""The server keeps to its own description: schemathesis against the live application.

A few cases in every run; `make fuzz` sends more than 5,000 and shows what schemathesis counted.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from serving import live

from kvlink_rag.server.settings import ServerSettings

MAX_EXAMPLES = os.environ.get("KVLINK_FUZZ_EXAMPLES", "2")
MIN_CASES = 5000 if int(MAX_EXAMPLES) >= 600 else 400
# What the schema cannot say: that the last message is the user's, that a document has one text, that it all fits.
EXCLUDED = "positive_data_acceptance"


@pytest.mark.endurance
def test_no_request_makes_the_server_fail_or_leave_its_schema(rag, tmp_path):
    rag.add("The ferry leaves at nine.", "The horn is called Bertha.")
    command = [sys.executable, "-m", "schemathesis.cli", "--no-color", "run", "--max-examples", MAX_EXAMPLES]
    command += ["--generation-database", "none", "--request-timeout", "600", "--continue-on-failure"]
    command += ["--suppress-health-check", "too_slow", "--warnings", "off"]  # that judges the machine, not the server
    command += ["--exclude-checks", EXCLUDED]
    with live(rag, settings=ServerSettings(default_new_tokens=4, max_new_tokens=8, max_jobs=1000)) as server:
        command.append(f"{server.url}/openapi.json")
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) generated", result.stdout)[1]) > MIN_CASES
    sys.stdout.write(result.stdout)  # what `make fuzz` shows


@pytest.mark.parametrize(
    "field", [{"linking": "recompute_first@inf"}, {"linking": "recompute_first@nan"}, {"seed": 2**64}]
)
def test_a_number_that_nothing_can_be_done_with_is_the_callers_error(rag, field):
    with live(rag) as server, server.client() as client:
        reply = client.post("/v1/chat/completions", json=server.chat(**field))
    assert reply.status_code == 400 and next(iter(field)) in reply.json()["error"]["message"]


def test_a_temperature_next_to_nothing_gets_the_greedy_answer(rag):
    rag.add("The ferry leaves at nine.")
    with live(rag) as server, server.client() as client:
        replies = [client.post("/v1/chat/completions", json=server.chat(temperature=t)) for t in (0, 1e-38)]
    greedy, tiny = (reply.json()["choices"][0]["message"]["content"] for reply in replies)
    assert greedy == tiny
