"""A training step computes what serving computes: what is learnt is what will be used."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from oracle import masked_logits
from peft import LoraConfig
from tiny_models import FAMILIES, build
from torch.autograd.graph import saved_tensors_hooks

from kvlink_rag.encoding import Encoder
from kvlink_rag.joining import LinkRequest
from kvlink_rag.kv_source import KVSource
from kvlink_rag.linking import get_linking
from kvlink_rag.links import LinkTokens
from kvlink_rag.prompt import build_prompt
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.kv_store import KVStore
from kvlink_rag.training.layout import Turn, lay_out
from kvlink_rag.training.learner import Learner, Step
from kvlink_rag.training.objectives import answers, distill

TEXTS = ["The horn can be heard for miles.", "A ferry leaves at noon, and one at dusk.", "Sand."]
QUESTIONS = [("How far?", "miles"), ("When does the ferry leave?", "at noon")]
NUM_SLOTS, NUM_LINKS, NUM_SOFT = 2, 3, 4


@pytest.fixture(params=sorted(FAMILIES))
def model(request):
    return build(request.param)


@pytest.fixture
def source(model, tmp_path):
    encoder = Encoder(model, encoding_prefix="Answer. ")
    with closing(DiskStore(tmp_path / "kv", max_bytes=2**30)) as entries:
        source = KVSource(encoder, KVStore(entries, encoder.fingerprint, model.kv_shape))
        source.encoder = encoder
        yield source


def random_links(model):
    torch.manual_seed(1)
    return LinkTokens(torch.randn(NUM_SLOTS, NUM_LINKS, model.hidden_size) * 0.2, "random")


def prompts(model, chunk_ids):
    return [
        build_prompt(model.tokenizer, [{"role": "user", "content": question}], chunk_ids, system="Be brief.")
        for question, _ in QUESTIONS
    ]


def gradients(learner):
    """Of all that is trained and reached by a step, by name."""
    found = {name: each.grad for name, each in learner.named_parameters() if each.grad is not None and each.grad.any()}
    return {name: gradient.clone() for name, gradient in found.items()}


def step_for(model, source, *, causal=False, num_soft=0):
    """One context with both questions, answers ended by the end token."""
    chunk_ids = [source.token_ids(text) for text in TEXTS]
    asked = prompts(model, chunk_ids)
    turns = [
        Turn(prompt.question_ids, (*model.tokenizer.plain_ids(answer), 2))
        for prompt, (_, answer) in zip(asked, QUESTIONS, strict=True)
    ]
    prefix_ids = asked[0].prefix_ids
    layout = lay_out(
        prefix_ids,
        chunk_ids,
        turns,
        num_links=0 if causal else NUM_LINKS,
        num_slots=NUM_SLOTS,
        encoding_prefix=source.encoder.prefix_ids,
        num_soft=num_soft,
        causal=causal,
    )
    return Step(prefix_ids, tuple(chunk_ids), layout, None)


def served(model, source, links, linking):
    """Logits [vocabulary] for the first answer token of each question, as an answer is really begun."""
    found = []
    for prompt in prompts(model, [source.token_ids(text) for text in TEXTS]):
        prefix, _ = source.prefix(prompt.prefix_ids)
        kvs = source.load(prompt.chunk_ids)
        context = linking.link(LinkRequest(model, prompt, prefix, kvs, links, room=8))
        pending = context.pending
        embeds = pending.embeds if pending.embeds is not None else model.embed(pending.ids[0].tolist())[None]
        mask = model.position_mask(pending.positions, context.num_tokens)
        found.append(model.logits(embeds, pending.positions, mask, context.to_cache())[-1])
    return torch.stack(found)


def first_places(layout):
    """Where each turn's first answer token is predicted."""
    places = (layout.predicts >= 0).nonzero()[:, 0]
    return torch.stack([places[layout.turn[places] == turn][0] for turn in range(len(QUESTIONS))])


@pytest.mark.parametrize("trainable", ["links", "full"])
@pytest.mark.parametrize("causal", [False, True], ids=["linked", "causal"])
def test_a_training_step_predicts_what_serving_predicts(model, source, trainable, causal):
    """For every family, over stored KV and all at once, both turns in one forward."""
    links = random_links(model)
    expected = served(model, source, links, get_linking("full" if causal else "link_tokens"))
    step = step_for(model, source, causal=causal)
    learner = Learner(model, source, links, trainable=trainable)
    learner.train()
    logits = learner.logits(step, step.linked, first_places(step.linked))
    assert (logits.detach() - expected).abs().max() < 1e-4


def test_the_training_mask_is_the_oracle_s(model, source):
    """Every answer token of one turn, against the independently written mask, each chunk with its prefix copy."""
    links = random_links(model)
    step = step_for(model, source)
    layout = step.linked
    learner = Learner(model, source, links, trainable="full")
    kept = (layout.turn < 1).nonzero()[:, 0]  # the context and the first turn
    embeds = model.embed(layout.ids[kept].tolist()).clone()
    flat = links.embeddings.flatten(0, 1)
    spans, place = [], len(step.prefix_ids)
    private = len(source.encoder.prefix_ids)
    for number, ids in enumerate(step.chunk_ids):
        stop = place + private + len(ids)
        spans.append((place, stop))
        embeds[stop : stop + NUM_LINKS] = links.for_chunk(number)
        place = stop + NUM_LINKS
    assert flat.shape[0] == NUM_SLOTS * NUM_LINKS
    expected = masked_logits(model.hf, embeds, spans, private)
    places = ((layout.predicts >= 0) & (layout.turn == 0)).nonzero()[:, 0]
    logits = learner.logits(step, layout, places).detach()
    assert (logits - expected[places]).abs().max() < 1e-4


@pytest.mark.parametrize("trainable", ["links", "full"])
@pytest.mark.parametrize("num_soft", [0, NUM_SOFT], ids=["", "soft_tokens"])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(model, source, trainable, num_soft):
    """For every family, over stored KV and all at once: what a layer computed is not kept for the way back."""
    links = random_links(model)
    if num_soft:
        links = replace(links, soft_tokens=torch.randn(num_soft, model.hidden_size) * 0.2)
    step, found = step_for(model, source, num_soft=num_soft), []
    for checkpointing in (False, True):
        learner = Learner(model, source, links, trainable=trainable, gradient_checkpointing=checkpointing).train()
        kept: list[torch.Tensor] = []
        with saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda tensor: tensor):
            loss = learner([step], answers)["loss"]
        learner.hf.zero_grad()
        loss.backward()
        found.append((sum(tensor.nbytes for tensor in kept), gradients(learner)))
    (kept, given), (kept_less, given_again) = found
    assert kept_less < kept / 2
    assert given.keys() == given_again.keys()
    for name, gradient in given.items():
        assert (gradient - given_again[name]).abs().max() < 1e-5 * gradient.abs().max(), name


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")  # of PEFT, about Mixtral's experts
def test_soft_tokens_are_trained_beside_a_reader(model, source):
    """For every family: documents are read without the adapter, with gradients, and then it is put on."""
    links = replace(random_links(model), soft_tokens=torch.randn(NUM_SOFT, model.hidden_size) * 0.2)
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    learner = Learner(model, source, links, trainable="reader", lora=lora).train()
    learner([step_for(model, source, num_soft=NUM_SOFT)], answers)["loss"].backward()
    found = gradients(learner)
    assert any("lora" in name for name in found) and "links" in found
    assert "soft_tokens" in found or model.window(0)  # which they may be out of reach of
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_a_model_is_its_own_teacher_where_nothing_is_linked(source, model):
    """Distilling a full prefill from a full prefill leaves nothing to learn."""
    step = step_for(model, source, causal=True)
    learner = Learner(model, source, random_links(model), trainable="links")
    loss = learner([Step(step.prefix_ids, step.chunk_ids, step.linked, step.linked)], distill)["loss"]
    assert abs(float(loss)) < 1e-5
