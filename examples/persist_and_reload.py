"""KV outlives the program: the second engine, as after a restart, reads no document again and answers alike."""

import tempfile
from pathlib import Path

from kvlink_rag import KVLinkRAG

CORPUS = Path(__file__).parent / "corpus"
QUESTION = "How many vessels has the shipyard built in total?"

with tempfile.TemporaryDirectory() as folder:
    answers = []
    for run in ("first run", "after a restart"):
        with KVLinkRAG.load(store=folder) as rag:
            report = rag.add(CORPUS / "shipyard.md")
            answers.append(rag.ask(QUESTION, max_new_tokens=24))
        print(f"{run}: {report.encoded_chunks} chunks read, {report.reused_chunks} known; {answers[-1]}")
    assert answers[0].text == answers[1].text
