"""The shortest way: add documents, ask, see what was reused."""

import tempfile
from pathlib import Path

from kvlink_rag import KVLinkRAG

HERE = Path(__file__).parent

with tempfile.TemporaryDirectory() as folder, KVLinkRAG.load(store=folder) as rag:
    rag.add(HERE / "corpus" / "lighthouse.md", HERE / "corpus" / "shipyard.md")
    answer = rag.ask("What is the fog horn of the lighthouse called?", max_new_tokens=24)
    print(answer)
    print(f"first token after {answer.timings.ttft_s:.2f} s, {answer.tokens.reused} tokens reused")
