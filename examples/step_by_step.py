"""What `ask` does, by hand: read chunks alone, lay them out with links between, compute links and question, decode."""

from kvlink_rag import DEFAULT_SYSTEM, GenerationSettings, LanguageModel, LinkTokens
from kvlink_rag.compute import compute
from kvlink_rag.encoding import Encoder
from kvlink_rag.generation import generate
from kvlink_rag.joining import LinkRequest
from kvlink_rag.linking import get_linking
from kvlink_rag.prompt import build_prompt

CHUNKS = ["The fog horn of the lighthouse is called Old Bertha.", "The lighthouse keeper is Odile Farrant."]
QUESTION = "What is the fog horn called?"


def main(job: object) -> None:
    model = LanguageModel.load()
    links = LinkTokens.untrained(model)

    # 1. Each chunk is read alone; its keys are kept as they are before RoPE, so that they can stand anywhere.
    encoder = Encoder(model, soft_tokens=links.soft_tokens)  # none, unless a checkpoint brings some
    chunk_ids = [encoder.token_ids(text) for text in CHUNKS]
    kvs = dict(encoder.encode(chunk_ids))  # index -> KV
    print(f"KV of {sum(kv.num_tokens for kv in kvs.values())} tokens: {sum(kv.nbytes for kv in kvs.values()):,} bytes")

    # 2. The prompt is made from ids: prefix | chunk | links | chunk | links | question.
    messages = [{"role": "user", "content": QUESTION}]
    prompt = build_prompt(model.tokenizer, messages, chunk_ids, system=DEFAULT_SYSTEM)
    prefix = encoder.encode_alone(prompt.prefix_ids)

    # 3. Stored KV is rotated to its place; links and question are all that is left to compute.
    settings = GenerationSettings(max_new_tokens=24)
    stored = [kvs[index] for index in range(len(CHUNKS))]
    request = LinkRequest(model, prompt, prefix, stored, links, settings.max_new_tokens)
    context = get_linking("link_tokens").link(request)
    print(f"{context.num_placed} tokens placed, {context.num_computed} to compute")

    # 4. One forward over what is pending, then Hugging Face's `generate`.
    generate(model, context, settings, lambda text: print(text, end="", flush=True))
    print()


compute.run(main)  # all tensor work on one thread
