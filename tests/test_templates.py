"""Chat templates of other kinds: with nothing before the user's words, or without a system role."""

from __future__ import annotations

import pytest
from tiny_models import CHAT_TEMPLATE, build_hf, byte_tokenizer

from kvlink_rag import KVLinkEngine, LanguageModel
from kvlink_rag.errors import BadInput
from kvlink_rag.linking import LINKINGS
from kvlink_rag.prompt import build_prompt
from kvlink_rag.tokens import TextTokenizer

WORDS_ALONE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE


def tokenizer_with(template):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    model = LanguageModel(build_hf("llama"), tokenizer_with(WORDS_ALONE), name="words alone")
    with KVLinkEngine(model, tmp_path_factory.mktemp("templates") / "store") as engine:
        yield engine


@pytest.mark.parametrize("documents", [[], ["hello world"], ["hello world", "and more"]], ids=len)
@pytest.mark.parametrize("linking", LINKINGS)
def test_where_nothing_stands_before_the_words_every_linking_answers(engine, linking, documents):
    """The prompt's prefix is empty: the first document, or the question, stands at position 0."""
    answer = engine.ask("what?", documents=documents, linking=linking, max_new_tokens=4)
    assert answer.tokens.generated > 0 and len(answer.sources) == len(documents)
    if not documents:
        assert answer.text == engine.ask("what?", linking="full", max_new_tokens=4).text


def test_an_assistant_s_words_never_become_the_user_s():
    """A template without system role lets the system message open the user's turn, and no other."""
    tokenizer = TextTokenizer(tokenizer_with(NO_SYSTEM))
    messages = [
        {"role": "system", "content": "S"},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": "Q"},
    ]
    with pytest.raises(BadInput, match=r"refuses the conversation: no system; .*user's words stand right behind it"):
        build_prompt(tokenizer, messages, [], system=None)
    with pytest.raises(BadInput, match="refuses the conversation"):
        build_prompt(tokenizer, messages[1:], [], system="S")
    prompt = build_prompt(tokenizer, [messages[0], messages[2]], [], system=None)
    assert tokenizer.hf.decode(list(prompt.ids)).startswith("<|im_start|>user\nS\n\nQ<|im_end|>")


def test_a_message_that_ends_in_a_document_needs_words_behind_it_from_somewhere():
    """Most templates end the turn; of one that adds nothing, no token would be left to predict from."""
    tokenizer = TextTokenizer(tokenizer_with("{% for m in messages %}{{ m['content'] }}{% endfor %}"))
    document = tokenizer.plain_ids("hello world")
    with pytest.raises(BadInput, match="nothing behind the last document"):
        build_prompt(tokenizer, [{"role": "user", "content": ["what? ", document]}], [], system=None)
    assert build_prompt(tokenizer, [{"role": "user", "content": [document, " what?"]}], [], system=None).question_ids
