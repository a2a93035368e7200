"""A LlamaIndex chat engine that answers from stored KV, turn after turn. One line differs from other programs."""

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
    chat = index.as_chat_engine(chat_mode="context", similarity_top_k=3)
    for message in ("What is the fog horn of the lighthouse called?", "And when was the lighthouse first lit?"):
        print(f"\n{message}\n  ", end="")
        with watch_reuse() as reports:
            response = chat.stream_chat(message)
            for text in response.response_gen:
                print(text, end="", flush=True)
        tokens, timings = reports[-1]["tokens"], reports[-1]["timings"]
        print(
            f"\n  first token after {timings['ttft_s']:.2f} s; "
            f"{tokens['reused']} tokens reused, {tokens['computed']} computed"
        )
        print("  sources:", ", ".join(str(node.node.ref_doc_id) for node in response.source_nodes))


if __name__ == "__main__":
    main()
