"""A LangChain chain on stored KV. Before, its model line read: `model = ChatHuggingFace(...)`."""

from pathlib import Path

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

from kvlink_rag import Embedder
from langchain_kvlink import ChatKVLink, KVLinkFAISS

HERE, EMBEDDER = Path(__file__).parent, Embedder()
PROMPT = "Answer in one short sentence.\n\n{context}\n\nQuestion: {question}"


class MiniLM(Embeddings):
    def embed_documents(self, texts):
        return EMBEDDER.embed(texts).tolist()

    def embed_query(self, text):
        return self.embed_documents([text])[0]


model = ChatKVLink(store=HERE.parent / "example_stores" / "langchain", max_tokens=40)  # <- the line that changes
store = KVLinkFAISS(MiniLM(), model)
pages = {path.stem: path.read_text("utf-8").split("\n\n") for path in (HERE / "corpus").glob("li*.md")}
store.add_documents([Document(t, id=f"{p}-{n}") for p, texts in pages.items() for n, t in enumerate(texts) if t[60:]])

retriever = store.as_retriever(search_kwargs={"k": 5}) | (lambda docs: "\n\n".join(d.page_content for d in docs))
chain = {"context": retriever, "question": RunnablePassthrough()} | ChatPromptTemplate.from_template(PROMPT) | model

for question in ("What is the fog horn of the lighthouse called?", "When was the lighthouse lit for the first time?"):
    answer = chain.invoke(question)
    timings, tokens = (answer.response_metadata["kvlink"][name] for name in ("timings", "tokens"))
    print(f"{question}\n  {answer.text}\n  TTFT {timings['ttft_s'] * 1000:.0f} ms, reused {tokens['reused']} tokens")
