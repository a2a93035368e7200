"""Eight questions at once from an event loop: how long does the loop ever wait, in LangChain and in LlamaIndex?"""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable

from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.llms.kvlink import KVLinkEmbedding, KVLinkIngestion, KVLinkLLM, KVLinkSynthesizer

from kvlink_rag import KVLinkEngine
from langchain_kvlink import ChatKVLink

TEXT = "The lighthouse number {n} of the bay of Marrow was lit for the first time in the year {year}."


async def longest_wait(ask: Callable[[str], Awaitable[str]], questions: list[str]) -> tuple[float, list[str]]:
    """The longest time in seconds between two turns of the loop that should be 1 ms apart, and the answers."""
    waits, done = [0.0], False

    async def turn() -> None:
        while not done:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            waits.append(time.perf_counter() - before - 0.001)

    ticker = asyncio.create_task(turn())
    answers = await asyncio.gather(*map(ask, questions))
    done = True
    await ticker
    return max(waits), answers


def main() -> None:
    texts = {str(n): TEXT.format(n=n, year=1800 + n) for n in range(8)}
    questions = [f"When was the lighthouse number {n} lit?" for n in texts]
    with tempfile.TemporaryDirectory() as folder, KVLinkEngine.load(store=folder) as engine:
        chat, llm = ChatKVLink(engine=engine, max_tokens=8), KVLinkLLM(engine=engine, max_new_tokens=8)
        nodes = KVLinkIngestion(llm)([TextNode(id_=n, text=text) for n, text in texts.items()])
        index = VectorStoreIndex(nodes, embed_model=KVLinkEmbedding())
        query_engine = index.as_query_engine(llm, response_synthesizer=KVLinkSynthesizer(llm))

        async def langchain(question: str) -> str:
            return (await chat.ainvoke(f"{'  '.join(texts.values())}\n\n{question}")).text

        async def llama_index(question: str) -> str:
            return str(await query_engine.aquery(question))

        for name, ask in (("LangChain", langchain), ("LlamaIndex", llama_index)):
            serial = [asyncio.run(longest_wait(ask, [question]))[1][0] for question in questions]
            wait, answers = asyncio.run(longest_wait(ask, questions))
            same = sum(a == b for a, b in zip(serial, answers, strict=True))
            print(f"{name}: the loop waited {wait * 1000:.1f} ms at most; {same} of 8 answers as one by one")


if __name__ == "__main__":
    main()
