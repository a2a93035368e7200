"""A LangChain agent whose middleware retrieves; its model reads nothing twice."""

from pathlib import Path

from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import InMemoryVectorStore

from kvlink_rag import Embedder
from langchain_kvlink import ChatKVLink, KVLinkVectorStore

HERE, EMBEDDER = Path(__file__).parent, Embedder()


class MiniLM(Embeddings):
    def embed_documents(self, texts):
        return EMBEDDER.embed(texts).tolist()

    def embed_query(self, text):
        return self.embed_documents([text])[0]


model = ChatKVLink(store=HERE.parent / "example_stores" / "langchain_agent", max_tokens=40)  # <- the line that changes
store = KVLinkVectorStore(InMemoryVectorStore(MiniLM()), model)  # <- and its KV beside the vectors
pages = {path.stem: path.read_text("utf-8").split("\n\n") for path in (HERE / "corpus").glob("li*.md")}
store.add_documents([Document(t, id=f"{p}-{n}") for p, texts in pages.items() for n, t in enumerate(texts) if t[60:]])


@wrap_model_call
def retrieve(request, handler):
    return handler(request.override(model_settings={"documents": store.similarity_search(request.messages[-1].text)}))


agent = create_agent(model, tools=[], middleware=[retrieve], system_prompt="Answer in one short sentence.")
for question in ("What is the fog horn of the lighthouse called?", "When was the lighthouse lit for the first time?"):
    answer = agent.invoke({"messages": [("user", question)]})["messages"][-1]
    timings, tokens = (answer.response_metadata["kvlink"][name] for name in ("timings", "tokens"))
    print(f"{question}\n  {answer.text}\n  TTFT {timings['ttft_s'] * 1000:.0f} ms, reused {tokens['reused']} tokens")
