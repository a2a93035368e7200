"""Run by a test in a new process: load a persisted index, ask, print what came of it as JSON."""

import json
import sys
from pathlib import Path

import llama_index.core
from corpus import WordEmbedding
from llama_index.core import Settings, StorageContext, load_index_from_storage
from llama_index.llms.kvlink import KVLinkLLM, kv_folder, watch_reuse
from tiny_models import build

from kvlink_rag import KVLinkEngine

persist_dir, question = Path(sys.argv[1]), sys.argv[2]
llama_index.core.global_tokenizer = lambda text: list(text.encode())
Settings.embed_model = WordEmbedding()
index = load_index_from_storage(StorageContext.from_defaults(persist_dir=str(persist_dir)))
engine = KVLinkEngine(build("llama", max_position_embeddings=8192), store=kv_folder(persist_dir), linking="link_tokens")
llm = KVLinkLLM(engine=engine, max_new_tokens=8)
with watch_reuse() as reports:
    answer = str(index.as_query_engine(llm=llm).query(question))
fresh = KVLinkLLM(engine=engine, max_new_tokens=8, reuse=False)
json.dump(
    {
        "answer": answer,
        "fresh_answer": str(index.as_query_engine(llm=fresh).query(question)),
        "documents": sum(len(report["documents"]) for report in reports),
        "encoded": sum(not document["reused"] for report in reports for document in report["documents"]),
        "reused": sum(report["tokens"]["reused"] for report in reports),
    },
    sys.stdout,
)
