"""Questions about documents that nobody labelled: the model asks them, and answers them itself by full prefill.

So link tokens can be trained, by distillation, on any store and with nothing but the store.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from kvlink_rag.config import DEFAULT_K
from kvlink_rag.errors import BadInput
from kvlink_rag.questions import Example, read_examples
from kvlink_rag.rag import KVLinkRAG
from kvlink_rag.types import Document

ASK = "{text}\n\nWrite one short question that this text answers. Write only the question."


def study(
    rag: KVLinkRAG,
    num_questions: int,
    *,
    k: int = DEFAULT_K,
    questions_per_chunk: int = 3,
    max_new_tokens: int = 24,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Example]:
    """At most num_questions examples over the store's chunks, each with the k chunks that would be retrieved for it.

    All questions of a chunk share the chunks found for the first of them, so that training reads those once. Chunks
    of which the model can make no question are passed over. Raises BadInput for an empty store.
    """
    texts = sorted({text for _, text in rag.index.texts()})
    if not texts:
        raise BadInput(f"the store {rag.folder} holds no documents; add some first")
    rng = random.Random(seed)
    rng.shuffle(texts)
    examples: list[Example] = []
    for number, text in enumerate(texts):
        if len(examples) >= num_questions:
            break
        wanted = min(questions_per_chunk, num_questions - len(examples))
        questions = _questions(rag, text, wanted, seed=seed + 1000 * number)
        if not questions:
            continue
        others = [hit.chunk.text for hit in rag.search(questions[0], k=k) if hit.chunk.text != text]
        found = [text, *others[: k - 1]]
        rng.shuffle(found)
        documents = tuple(Document(item) for item in found)
        for question in questions:
            answer = rag.ask(question, documents=documents, linking="full", max_new_tokens=max_new_tokens)
            if not answer.text:
                continue
            gold, is_whole = frozenset({found.index(text)}), answer.finish_reason != "length"
            examples.append(Example(question, (answer.text,), documents, gold, is_whole=is_whole))
            progress("questions", len(examples), num_questions)
    if not examples:
        raise BadInput(f"{rag.model.name} makes no question of any of {len(texts)} chunks; train on a question file")
    return examples


def studied(
    rag: KVLinkRAG,
    path: Path,
    num_questions: int,
    seed: int,
    progress: Callable[[str, int, int], None],
    *,
    resume: bool,
) -> list[Example]:
    """`study`, kept in a question file: a run that is resumed learns from the same questions."""
    if not (resume and path.exists()):
        examples = study(rag, num_questions, seed=seed, progress=progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(_line(example) for example in examples), "utf-8")
    return read_examples(path)


def _line(example: Example) -> str:
    documents = [
        {"text": document.text, "is_gold": place in example.gold} for place, document in enumerate(example.documents)
    ]
    row = {"question": example.question, "answers": list(example.answers), "documents": documents}
    return json.dumps(row if example.is_whole else {**row, "is_cut": True}) + "\n"


def _questions(rag: KVLinkRAG, text: str, wanted: int, *, seed: int) -> list[str]:
    """Different questions that the model makes of a text; what does not end in a question mark is none."""
    found: list[str] = []
    for attempt in range(2 * wanted):
        answer = rag.ask(
            ASK.format(text=text),
            documents=[],
            max_new_tokens=32,
            temperature=0.7 if attempt else 0.0,
            seed=seed + attempt,
            stop=["?", "\n\n"],
        )
        question = answer.text.strip().strip('"').splitlines()[-1:] or [""]
        words = question[0].removeprefix("Question:").strip()
        if answer.finish_reason == "stop" and len(words.split()) >= 3 and f"{words}?" not in found:
            found.append(f"{words}?")
        if len(found) == wanted:
            break
    return found
