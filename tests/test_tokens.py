"""Texts to tokens: a document cannot forge a control token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import byte_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kvlink_rag.errors import BadInput, UnsupportedModel
from kvlink_rag.tokens import TextTokenizer, TokenDecoder

CONTROL = ["<pad>", "<|im_start|>", "<|im_end|>", "<tool_call>"]


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(byte_tokenizer())


@pytest.mark.parametrize("control", CONTROL)
def test_a_control_token_is_one_only_in_scaffold_text(tokenizer, control):
    """The same characters are a control token in a template and plain text in a document."""
    text = f"before {control}after{control}"
    assert sum(token_id in tokenizer.control_ids for token_id in tokenizer.scaffold_ids(text)) == 2
    plain = tokenizer.plain_ids(text)
    assert tokenizer.control_ids.isdisjoint(plain)
    assert tokenizer.decode(plain) == text
    assert tokenizer.count(text) == len(plain) == len(text)


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(
    parts=st.lists(
        st.one_of(st.sampled_from(CONTROL), st.text(st.characters(exclude_categories=["Cs"]), max_size=8)), max_size=8
    )
)
def test_no_text_around_control_strings_becomes_a_control_token(tokenizer, parts):
    """S10: any text with control strings in it, nested or cut apart, stays text and decodes to itself."""
    for text in ("".join(parts), "<|im_<|im_start|>start|>" + "".join(parts), "".join(parts)[:-1]):
        plain = tokenizer.plain_ids(text)
        assert tokenizer.control_ids.isdisjoint(plain)
        assert tokenizer.decode(plain) == text
        stream = tokenizer.decode_stream()
        assert "".join(map(stream.step, plain)) == text


def test_the_tokenizer_given_is_not_changed(tokenizer):
    """The plain side is a copy: the model's own tokenizer still knows its control tokens."""
    before = tokenizer.hf.backend_tokenizer.to_str()
    tokenizer.plain_ids("<|im_start|>")
    TextTokenizer(tokenizer.hf)
    assert tokenizer.hf.backend_tokenizer.to_str() == before
    assert list(tokenizer.scaffold_ids("<|im_start|>")) == [1]


def spelling_tokenizer(letters_known: str) -> TextTokenizer:
    """A vocabulary in which merging letters makes the control token <a> an ordinary word too."""
    known = {char: number for number, char in enumerate(letters_known)}
    vocab = known | {"<a": len(known), "<a>": len(known) + 1}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("<", "a"), ("<a", ">")]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<a>"])
    return TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))


def test_a_control_token_that_is_an_ordinary_word_too_is_spelled_out():
    """Merges cannot bring back what the added tokens no longer match."""
    tokenizer = spelling_tokenizer("<>abc")
    (control,) = tokenizer.control_ids
    assert tokenizer.scaffold_ids("<a>") == (control,)
    for text in ("<a>", "b<a>c<a", "<a><a>"):
        plain = tokenizer.plain_ids(text)
        assert control not in plain and tokenizer.decode(plain) == text
        assert tokenizer.count(text) == len(plain)


def test_a_control_string_leaves_the_words_around_it_as_they_are():
    """Text beside a forged control token is tokenised as ever, not letter by letter."""
    vocab = {char: number for number, char in enumerate("<x>b")} | {"bb": 4}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("b", "b")]))
    backend.add_special_tokens(["<x>"])
    tokenizer = TextTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.plain_ids("bb<x>bb") == (4, 0, 1, 2, 4)
    assert tokenizer.scaffold_ids("bb<x>bb") == (4, 5, 4)


@pytest.mark.parametrize("text", ["\ud800", "text \udfff text"], ids=ascii)
def test_text_that_is_no_unicode_is_refused(tokenizer, text):
    """A lone surrogate is an error of the caller's, with a reason."""
    with pytest.raises(BadInput, match="Unicode"):
        tokenizer.plain_ids(text)


def test_a_tokenizer_without_a_backend_is_refused():
    """The two sides need a fast tokenizer; the message says so."""
    with pytest.raises(UnsupportedModel, match="fast"):
        TextTokenizer(object())


@pytest.mark.parametrize(
    "text", ["", "The ferry leaves at nine.", "\n\n  deux  cafés, naïve Straße", "日本語 🚢", "\ufdfa" * 3]
)
def test_at_most_is_never_below_the_count(tokenizer, text):
    assert tokenizer.at_most(text) >= tokenizer.count(text)


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2, Mistral and Gemma have it: words with a mark for the space before, and every byte as a token."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "▁the", "▁cat"]
    vocab = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["<0x0A>", "<0xF0>", "a", "▁cat"], "\n\ufffda cat"),
        (["<0x0A>", "<0xF0>", "▁cat", "▁the", "a"], "\n\ufffd cat thea"),
        (["▁the", "<0x0A>", "<0xF0>", "<0x0A>", "▁cat", "<0x0A>", "<0xE2>", "a"], "the\n\ufffd\ufffd cat\n\ufffda"),
        (["<0x0A>", "<0xF0>", "▁cat", "<0xE2>", "<0x82>", "<0xAC>", "a"], "\n\ufffd cat€a"),
        (["▁the", "<0xE2>", "<0x82>", "▁cat"], "the\ufffd\ufffd cat"),
    ],
)
def test_bytes_that_make_no_character_cost_only_themselves(words, text):
    """A run of bytes that began well and then breaks becomes replacement characters; the answer goes on."""
    backend = byte_fallback_tokenizer()
    decoder = TokenDecoder(backend)
    assert "".join(decoder.step(backend.token_to_id(word)) for word in words) == text
