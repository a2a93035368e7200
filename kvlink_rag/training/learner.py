"""The module that is trained: link embeddings, soft tokens and an adapter where these are wanted, around a model.

What is read before any question (prefix and chunks) comes in one of three ways. Where training does not change it, its
KV is computed once, without gradients, and may come from a store: a step then costs little more than links, questions
and answers. Where soft tokens before the chunks are trained, the untouched model reads them and the chunks, with
gradients, and links, questions and answers run over the KV of that. Where the reading itself is trained, all of it runs
through the model under KVLink's mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from kvlink_rag.errors import BadInput
from kvlink_rag.kv_source import KVSource
from kvlink_rag.links import LinkTokens
from kvlink_rag.model import LanguageModel
from kvlink_rag.training.layout import Layout
from kvlink_rag.training.recomputing import Filled, Given, layers_of, recomputing

TRAINABLE = ("links", "reader", "lora", "full")
OVER_STORED = ("links", "reader")  # the base reads documents: without soft tokens, from their stored KV
TOKENS = ("links", "soft_tokens")  # parameters that are embeddings of no word


@dataclass(frozen=True)
class Step:
    """One context with its turns. linked: under the student's mask; teacher: the same turns after a full prefill."""

    prefix_ids: tuple[int, ...]
    chunk_ids: tuple[tuple[int, ...], ...]
    linked: Layout
    teacher: Layout | None

    @property
    def weight(self) -> float:
        """What its answers' mean loss counts: the square root of its number of turns.

        By tokens alone, a context that a single question is asked of would hardly count beside one with twenty.
        """
        return math.sqrt(int(self.linked.turn.max()) + 1)


class Learner(nn.Module):
    """Links [slots * K, hidden] and soft tokens [S, hidden] in float32, and the model with what of it is trained.

    source: of stored KV; None where no step will run over it. The teacher is the model's `reader` as it was given, by a
    full prefill (with "full": as it stands); where "links" are trained, that is also what reads them.
    trainable: "links" (and soft tokens, if there are some), "reader" (an adapter too, for all that is computed at
    question time), "lora" (one for documents as well) or "full" (all weights). lora: settings of a new adapter.
    reader: folder of the adapter in `model.reader`, to be trained further. gradient_checkpointing: keep no activation
    inside a layer, and compute it again on the way back. num_given: slots that came trained.
    """

    accepts_loss_kwargs = True  # tells the library's Trainer that a loss is divided for all of a step's batches here

    def __init__(
        self,
        model: LanguageModel,
        source: KVSource | None,
        links: LinkTokens,
        *,
        trainable: str,
        lora: Any = None,
        reader: Path | None = None,
        gradient_checkpointing: bool = False,
        num_given: int = 0,
    ):
        super().__init__()
        self.model, self.source, self.trainable = model, source, trainable
        self.num_slots, self.num_links = links.embeddings.shape[:2]
        self.num_tokens = 0  # run through the model so far, stored ones not counted
        self.links = nn.Parameter(links.embeddings.detach().float().flatten(0, 1).clone(), bool(self.num_links))
        self._began = self.links.detach().cpu().clone()
        self._num_given = num_given
        soft_tokens = self.links[:0] if links.soft_tokens is None else links.soft_tokens
        self.soft_tokens = nn.Parameter(soft_tokens.detach().float().clone(), bool(len(soft_tokens)))
        self.hf = model.hf
        self.hf.requires_grad_(trainable == "full")
        self.peft = None
        if trainable in ("reader", "lora"):
            from peft import PeftModel, get_peft_model

            if reader is None:
                self.peft = get_peft_model(self.hf, lora)
            else:
                self.peft = PeftModel.from_pretrained(self.hf, reader, is_trainable=True)
                # where it lies here: by its public name peft, when saving, would look for it on the hub
                self.peft.peft_config["default"].base_model_name_or_path = self.hf.name_or_path
        self.reads_stored_kv = trainable in OVER_STORED
        self._checkpointing = gradient_checkpointing
        # PEFT puts an adapter on experts by changing their weights in place: what documents were read with is gone then
        self._has_adapted_experts = self.peft is not None and any(each.ndim > 2 for each in self.hf.parameters())
        if gradient_checkpointing and not layers_of(self.hf):
            raise BadInput(f"{model.name} cannot be trained with gradient checkpointing; leave it out")

    def train(self, mode: bool = True) -> Learner:
        """The model itself stays as it answers: nothing is dropped at random."""
        super().train(mode)
        self.hf.eval()
        return self

    @property
    def num_reached(self) -> int:
        """Slots up to the last that is trained: those that it began with of a checkpoint, or that a step has changed.

        What no context reached would be served to late documents in place of the last slot that was trained.
        """
        if not self.num_links:
            return self.num_slots
        changed = (self.links.detach().cpu() != self._began).any(1).view(self.num_slots, -1).any(1)
        return int(max(self._num_given, 1, *(changed.nonzero()[:, 0] + 1).tolist()))

    def link_tokens(self, name: str) -> LinkTokens:
        """Links, in slots that are trained, and soft tokens as they stand."""
        links, soft_tokens = (trained.detach().to(self.model.dtype) for trained in (self.links, self.soft_tokens))
        embeddings = links.view(self.num_slots, self.num_links, self.model.hidden_size)[: self.num_reached]
        return LinkTokens(embeddings, name, soft_tokens=soft_tokens if len(soft_tokens) else None)

    def forward(
        self, steps: Sequence[Step], objective: Callable[..., Tensor], weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The mean loss of an answer token, each step by its weight; weight: by which the sum is divided, else theirs.

        So the losses of several batches add up to the mean over all of them.
        """
        losses = []
        for step in steps:
            places = (step.linked.predicts >= 0).nonzero()[:, 0]
            logits = self.logits(step, step.linked, places)
            expected = step.linked.predicts[places].to(logits.device)
            teacher = None
            if step.teacher is not None:
                with torch.no_grad(), self._as_base():
                    places = (step.teacher.predicts >= 0).nonzero()[:, 0]
                    teacher = self.logits(step, step.teacher, places, by_teacher=True)
            loss = objective(logits.float(), expected, None if teacher is None else teacher.float())
            losses.append(loss / len(expected) * step.weight)
        total = sum(step.weight for step in steps) if weight is None else weight
        return {"loss": torch.stack(losses).sum() / total}

    def logits(self, step: Step, layout: Layout, places: Tensor, *, by_teacher: bool = False) -> Tensor:
        """Logits [places, vocabulary] at `places` of the layout, as they are learnt or by the teacher."""
        reader = self.model.reader if by_teacher or self.trainable == "links" else self.hf
        if self.reads_stored_kv:
            return self._over_stored(step, layout, places, reader)
        return self._all_at_once(layout, places, reader)

    # -- inside ------------------------------------------------------------------------------------

    def _over_stored(self, step: Step, layout: Layout, places: Tensor, reader: Any) -> Tensor:
        """Run what is not stored over the KV of what is."""
        computed = ~layout.stored
        keys = torch.cat(((layout.stored & ~layout.private).nonzero()[:, 0], computed.nonzero()[:, 0]))
        rows = computed.nonzero()[:, 0]
        is_trained = self.soft_tokens.requires_grad and not layout.causal and torch.is_grad_enabled()
        with self._as_base(), torch.set_grad_enabled(is_trained):
            cache = self._full_prefill(step) if layout.causal else self._documents(step, layout)
        position = layout.position
        mask = self._mask(layout.visible()[rows][:, keys], position[rows][:, None] - position[keys][None, :])
        return self._run(layout, rows, mask, torch.searchsorted(rows, places), cache, reader)

    def _all_at_once(self, layout: Layout, places: Tensor, reader: Any) -> Tensor:
        """Run the whole sequence under the mask."""
        rows = torch.arange(len(layout.ids))
        mask = self._mask(layout.visible(), layout.position[:, None] - layout.position[None, :])
        return self._run(layout, rows, mask, places, None, reader)

    def _run(self, layout: Layout, rows: Tensor, mask: Any, places: Tensor, cache: Cache | None, reader: Any) -> Tensor:
        device = self.model.device
        with self._recomputing(reader):
            output = reader(
                inputs_embeds=self._embeds(layout, rows),
                position_ids=layout.position[rows].to(device)[None],
                attention_mask=mask,
                use_cache=cache is not None,
                logits_to_keep=places.to(device),
                **{self.model.cache_argument: cache},
            )
        return output.logits[0]  # type: ignore[no-any-return]

    def _embeds(self, layout: Layout, rows: Tensor) -> Tensor:
        """What runs through the model: [1, rows, hidden]."""
        device = self.model.device
        link = layout.link[rows].to(device)
        embeds = self.hf.get_input_embeddings()(layout.ids[rows].to(device))
        if (link >= 0).any():
            trained = torch.cat((self.links, self.soft_tokens)).to(embeds.dtype)[link.clamp(min=0)]
            embeds = torch.where(link[:, None] >= 0, trained, embeds)
        self.num_tokens += len(rows)
        return embeds[None]  # type: ignore[no-any-return]

    def _mask(self, visible: Tensor, distance: Tensor) -> Any:
        """Always explicit: without one, a gap in the positions isolates tokens from each other."""
        device = self.model.device
        return self.model.mask_from(visible.to(device), distance.to(device))

    def _documents(self, step: Step, layout: Layout) -> Cache:
        """Prefix and chunks as they stand under the mask, without what stands before a chunk for it alone."""
        if not self.soft_tokens.requires_grad:
            return self._placed(step, layout)
        rows, cache = layout.stored.nonzero()[:, 0], Cache(layer_class_to_replicate=Filled)
        position = layout.position[rows]
        with self._recomputing(self.hf, as_base=True):
            self.hf.base_model(
                inputs_embeds=self._embeds(layout, rows),
                position_ids=position.to(self.model.device)[None],
                attention_mask=self._mask(layout.visible()[rows][:, rows], position[:, None] - position[None]),
                use_cache=True,
                **{self.model.cache_argument: cache},
            )
        shared = (~layout.private[rows]).nonzero()[:, 0].to(self.model.device)
        return Cache([Given(layer.keys[:, :, shared], layer.values[:, :, shared]) for layer in cache.layers])

    def _placed(self, step: Step, layout: Layout) -> Cache:
        """Prefix and chunks at their positions, as `linking.link_tokens` places them."""
        assert self.source is not None
        prefix, _ = self.source.prefix(step.prefix_ids)
        kvs = [prefix, *self.source.load(step.chunk_ids)]
        keys, values = torch.cat([kv.keys for kv in kvs], 2), torch.cat([kv.values for kv in kvs], 2)
        positions = layout.position[layout.stored & ~layout.private].to(keys.device)
        turned = torch.empty_like(keys)
        self.model.rope.forth(positions).apply(keys, out=turned)
        return Cache([Given(turned[layer][None], values[layer][None]) for layer in range(len(keys))])

    def _full_prefill(self, step: Step) -> Cache:
        """Prefix and chunks read in one go, as `linking.full` reads them."""
        cache = DynamicCache()
        ids = [*step.prefix_ids, *(token_id for chunk in step.chunk_ids for token_id in chunk)]
        self.model.read(torch.tensor([ids], device=self.model.device), cache)
        return Cache([Given(layer.keys.clone(), layer.values.clone()) for layer in cache.layers])

    def _recomputing(self, model: Any, *, as_base: bool = False) -> AbstractContextManager[None]:
        """Where activations are not kept. as_base: the model runs without the adapter."""
        if self._checkpointing or (as_base and self._has_adapted_experts):
            return recomputing(model, self._as_base if as_base else nullcontext)
        return nullcontext()

    @contextmanager
    def _as_base(self) -> Iterator[None]:
        """Without the adapter."""
        if self.peft is None:
            yield
            return
        with self.peft.disable_adapter():
            yield
