"""A LlamaIndex query engine that answers from stored KV. One line differs from any other local model's program."""

from pathlib import Path

from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index.core.node_parser import SentenceSplitter
from llama_index.llms.kvlink import KVLinkEmbedding, KVLinkIngestion, KVLinkLLM, kv_folder, prune, watch_reuse

HERE = Path(__file__).parent
STORE = kv_folder(HERE.parent / "example_stores" / "llama_index")


def main() -> None:
    llm = KVLinkLLM(store=STORE, max_new_tokens=48)  # was: llm = HuggingFaceLLM(...)      <- the changed line
    Settings.llm, Settings.embed_model, Settings.tokenizer = llm, KVLinkEmbedding(), llm.tokenizer
    documents = [Document(text=path.read_text("utf-8"), doc_id=path.name) for path in (HERE / "corpus").glob("*.md")]
    index = VectorStoreIndex.from_documents(
        documents,
        transformations=[SentenceSplitter(chunk_size=200, chunk_overlap=0), KVLinkIngestion(llm)],  # reads them once
    )
    prune(llm, index.docstore)  # each run gives nodes new ids; the KV itself is found by its text
    engine = index.as_query_engine(similarity_top_k=3)
    for question in ("What is the fog horn of the lighthouse called?", "How many vessels has the shipyard built?"):
        with watch_reuse() as reports:
            response = engine.query(question)
        print(f"\n{question}\n  {str(response).strip()}")
        for report in reports:
            tokens, timings = report["tokens"], report["timings"]
            print(
                f"  first token after {timings['ttft_s']:.2f} s; "
                f"{tokens['reused']} tokens reused, {tokens['computed']} computed"
            )
        print("  sources:", ", ".join(str(node.node.ref_doc_id) for node in response.source_nodes))


if __name__ == "__main__":
    main()
