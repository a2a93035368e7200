"""How an answer is generated: what callers may ask for, and what is left as it was."""

from __future__ import annotations

import pytest
import torch

from kvlink_rag.config import GenerationSettings
from kvlink_rag.errors import BadInput

SAMPLED = {"documents": ["The ferry leaves at nine."], "temperature": 1.5, "max_new_tokens": 12}


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30])
def test_a_seed_beyond_64_bits_is_refused(seed):
    with pytest.raises(BadInput, match="seed"):
        GenerationSettings(seed=seed)


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63), 0])
def test_every_seed_of_64_bits_repeats_its_answer(rag, seed):
    first, second = (rag.ask("When?", seed=seed, **SAMPLED).text for _ in range(2))
    assert first == second


@pytest.mark.parametrize("temperature", [1e-38, 1e-9, 5e-324])
def test_a_temperature_next_to_nothing_is_greedy(rag, temperature):
    """Dividing by it would leave no number; what it asks for is the likeliest token."""
    asked = {**SAMPLED, "seed": 1}
    greedy = rag.ask("When?", **{**asked, "temperature": 0}).text
    assert rag.ask("When?", **{**asked, "temperature": temperature}).text == greedy


@pytest.mark.parametrize("temperature", [1e-4, 100.0])
def test_the_ends_of_what_is_sampled_give_an_answer(rag, temperature):
    assert rag.ask("When?", **{**SAMPLED, "temperature": temperature}).tokens.generated


def test_a_seed_leaves_the_programs_random_numbers_alone(rag):
    """They go on as if nothing had been asked, and what is sampled without a seed does not repeat."""
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    seeded = rag.ask("When?", seed=3, **SAMPLED).text
    assert torch.equal(torch.rand(4), expected)
    unseeded = []
    for _ in range(2):
        assert rag.ask("When?", seed=3, **SAMPLED).text == seeded
        unseeded.append(rag.ask("When?", **SAMPLED).text)
    assert unseeded[0] != unseeded[1]


def test_a_seeded_answer_that_breaks_off_gives_the_random_numbers_back(rag):
    before = torch.get_rng_state()
    pieces = rag.stream("When?", seed=3, **SAMPLED)
    next(pieces)
    pieces.close()
    rag.ask("When?", documents=[], max_new_tokens=1)  # by then the one before has ended
    assert torch.equal(torch.get_rng_state(), before)
