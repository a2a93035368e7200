"""The story: add documents once, ask from their stored KV."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict

from typing_extensions import Unpack

from kvlink_rag import maintenance
from kvlink_rag.chunking import chunk_text
from kvlink_rag.compute import Emit, Job, compute
from kvlink_rag.config import (
    DEFAULT_ENCODING_PREFIX,
    DEFAULT_K,
    DEFAULT_STORE,
    DEFAULT_SYSTEM,
    ChunkSettings,
    GenerationSettings,
    StoreSettings,
)
from kvlink_rag.default_models import DEFAULT_EMBEDDER, DEFAULT_MODEL
from kvlink_rag.embedder import Embedder
from kvlink_rag.encoding import CHUNK_TEMPLATE, Encoder
from kvlink_rag.errors import BadInput, NotAStore, PromptTooLong
from kvlink_rag.generation import generate
from kvlink_rag.index import VectorIndex
from kvlink_rag.ingestion import AddPlan, Ingestion, Progress
from kvlink_rag.joining import LinkRequest
from kvlink_rag.kv_source import KVSource
from kvlink_rag.linking import get_linking
from kvlink_rag.links import LinkTokens
from kvlink_rag.model import LanguageModel
from kvlink_rag.prompt import Message, Prompt, build_prompt
from kvlink_rag.store.disk import DiskStore
from kvlink_rag.store.folder import open_folder
from kvlink_rag.store.kv_store import KVStore
from kvlink_rag.types import AddReport, Answer, Chunk, Document, Hit, Piece, Source, Timings, TokenCounts


class AskOptions(TypedDict, total=False):
    """What `ask` and `stream` take beside the question."""

    k: int
    documents: Sequence[str | Document | Hit] | None
    system: str | None
    linking: str | None
    max_new_tokens: int
    temperature: float
    top_p: float
    stop: Sequence[str]
    seed: int | None


class KVLinkRAG:
    """A language model, a store of its documents' KV, and an index to find them.

    Make one with `load`. Safe to use from several threads; the model answers one question at a time.
    """

    def __init__(
        self,
        model: LanguageModel,
        embedder: Embedder,
        store: str | Path = DEFAULT_STORE,
        *,
        linking: str = "link_tokens",
        links: LinkTokens | None = None,
        chunking: ChunkSettings | None = None,
        limits: StoreSettings | None = None,
        chunk_template: str = CHUNK_TEMPLATE,
        encoding_prefix: str = DEFAULT_ENCODING_PREFIX,
    ):
        get_linking(linking)
        self.model, self.embedder, self.linking = model, embedder, linking
        self.limits = limits or StoreSettings()
        self.links = links or LinkTokens.untrained(model)
        self.encoder = Encoder(model, template=chunk_template, encoding_prefix=encoding_prefix)
        self.folder = open_folder(store)
        self.entries = DiskStore(self.folder / "kv", max_bytes=self.limits.max_bytes)
        self.kvs = KVStore(self.entries, self.encoder.fingerprint, model.kv_shape)
        self.index = VectorIndex(self.folder)
        self._chunking = chunking or ChunkSettings()
        self._source = KVSource(self.encoder, self.kvs)

    @classmethod
    def load(
        cls,
        model: str | Path = DEFAULT_MODEL,
        store: str | Path = DEFAULT_STORE,
        *,
        embedder: str | Path = DEFAULT_EMBEDDER,
        linking: str = "link_tokens",
        links: str | Path | None = None,
        adapter: str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        chunking: ChunkSettings | None = None,
        limits: StoreSettings | None = None,
        encoding_prefix: str = DEFAULT_ENCODING_PREFIX,
    ) -> KVLinkRAG:
        """Load models and open the store.

        model, embedder: folder, hub id or the default's name. links: folder of a link checkpoint for this very model.
        adapter: PEFT folder. Raises UnsupportedModel, MissingModel, CheckpointMismatch, NotAStore, BadInput.
        """
        get_linking(linking)
        open_folder(store)  # a wrong folder is said before seconds of loading

        def build(job: Job) -> KVLinkRAG:
            language_model = LanguageModel.load(model, adapter=adapter, dtype=dtype, device=device)
            return cls(
                language_model,
                Embedder(embedder),
                store,
                linking=linking,
                links=LinkTokens.load(links, language_model) if links else None,
                chunking=chunking,
                limits=limits,
                encoding_prefix=encoding_prefix,
            )

        return compute.run(build)

    def warm_up(self) -> None:
        """Do now what the first question would wait for: the embedder's weights and the system message's KV."""

        def warm(job: Job) -> None:
            self.embedder.warm_up()
            messages = [{"role": "user", "content": "warm up"}]
            self._source.prefix(build_prompt(self.model.tokenizer, messages, [], system=DEFAULT_SYSTEM).prefix_ids)

        compute.run(warm)

    # -- documents ---------------------------------------------------------------------------------

    def add(
        self,
        *sources: str | Path | Document | Iterable[str | Path | Document],
        encode: str = "now",
        on_plan: Callable[[AddPlan], None] | None = None,
        progress: Progress | None = None,
    ) -> AddReport:
        """Add documents: files, folders, texts or Documents; each is read by the model once.

        A document whose id is known is updated; unchanged chunks are not encoded again. With encode="on-first-use"
        only the index is filled. on_plan is told what will be done before anything is written; progress gets
        (stage, done, total).
        Raises BadInput and StoreFull with nothing written; interrupted, the next `add` finishes the job.
        """
        items: list[str | Path | Document] = []
        for source in sources:
            items.extend([source] if isinstance(source, str | Path | Document) else source)
        self._bind_embedder()
        ingestion = Ingestion(
            self.encoder, self.embedder, self.index, self.entries, self.kvs, self._chunking, self.limits
        )

        def work(job: Job) -> AddReport:
            def report(stage: str, done: int, total: int) -> None:
                job.check()
                if progress is not None:
                    progress(stage, done, total)

            return ingestion.add(items, encode=encode, on_plan=on_plan, progress=report)

        return compute.run(work)

    def delete(self, *document_ids: str) -> int:
        """Remove documents, their chunks and all KV that no other document shares; how many there were."""
        removed = maintenance.delete_documents(self.index, self.entries, document_ids)
        self.index.save()
        return removed

    def search(self, question: str, k: int = DEFAULT_K) -> list[Hit]:
        """The k chunks nearest to the question, best first; fewer if the store holds fewer."""
        if k < 1:
            raise BadInput(f"k must be at least 1, got {k}")
        if not question.strip():
            raise BadInput("the question is empty")
        if self.index.counts()[1] == 0:
            return []
        self._bind_embedder()
        return compute.run(lambda job: self.index.search(self.embedder.embed([question]), k))

    # -- answers -----------------------------------------------------------------------------------

    def ask(self, question: str | Sequence[Message], **options: Unpack[AskOptions]) -> Answer:
        """Answer a question; see `stream` for the options."""
        *_, last = self.stream(question, **options)
        assert last.answer is not None
        return last.answer

    def stream(
        self,
        question: str | Sequence[Message],
        *,
        k: int = DEFAULT_K,
        documents: Sequence[str | Document | Hit] | None = None,
        system: str | None = None,
        linking: str | None = None,
        max_new_tokens: int = GenerationSettings.max_new_tokens,
        temperature: float = GenerationSettings.temperature,
        top_p: float = GenerationSettings.top_p,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> Iterator[Piece]:
        """Answer piece by piece; the last piece carries the whole `Answer`.

        question: a text, or chat messages ({"role", "content"}) of which the last is the user's. documents: what to
        answer from, best first, instead of retrieving k chunks; [] answers from none. Chunks beyond the model's window
        are left out, lowest-scored first, and named in the answer. Raises BadInput and PromptTooLong.
        """
        started = time.perf_counter()
        settings = GenerationSettings(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=tuple(stop), seed=seed
        )
        name = linking or self.linking
        get_linking(name)
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        has_system = bool(messages) and messages[0].get("role") == "system"
        system = system if system is not None or has_system else DEFAULT_SYSTEM
        prompt = build_prompt(self.model.tokenizer, messages, [], system=system)
        given = None if documents is None else [_as_hit(item) for item in documents]

        def work(job: Job, emit: Emit[Piece]) -> None:
            words = messages[-1]["content"]
            hits = self.search(words, k) if given is None else given
            answer = self._answer(words, prompt, hits, name, settings, started, lambda text: emit(Piece(text)))
            emit(Piece("", answer))

        return (piece for piece in compute.stream(work) if piece.text or piece.answer)

    def _answer(
        self,
        question: str,
        prompt: Prompt,
        hits: list[Hit],
        linking: str,
        settings: GenerationSettings,
        started: float,
        emit: Callable[[str], None],
    ) -> Answer:
        """The way of a question: chunks -> KVs -> context -> text."""
        retrieved = time.perf_counter()
        module = get_linking(linking)
        num_links = self.links.num_per_chunk if module.USES_STORED_KV else 0
        token_ids = [self.encoder.token_ids(hit.chunk.text) for hit in hits]
        num_kept = self._num_fitting(token_ids, prompt.num_scaffold_tokens, num_links, settings.max_new_tokens)
        prompt = replace(prompt, chunk_ids=tuple(token_ids[:num_kept]))

        loading, prefix_kv, has_prefix = None, None, False
        if module.USES_STORED_KV:
            loading = self._source.load(prompt.chunk_ids)
            prefix_kv, has_prefix = self._source.prefix(prompt.prefix_ids)
        context = module.link(
            LinkRequest(self.model, prompt, prefix_kv, loading or (), self.links, settings.max_new_tokens)
        )
        linked = time.perf_counter()

        pieces: list[str] = []

        def keep(text: str) -> None:
            pieces.append(text)
            emit(text)

        record = generate(self.model, context, settings, keep)
        context.release()
        ended = time.perf_counter()
        first = record.first_token_at or ended
        load_s = loading.seconds if loading else 0.0
        is_reused = [loading is not None and loading.is_reused(ids) for ids in prompt.chunk_ids]
        num_reused = sum(len(ids) for ids, reused in zip(prompt.chunk_ids, is_reused, strict=True) if reused)
        num_reused += len(prompt.prefix_ids) if has_prefix else 0
        return Answer(
            question=question,
            text="".join(pieces).strip(),
            sources=tuple(
                Source(hit, len(ids), reused)
                for hit, ids, reused in zip(hits[:num_kept], prompt.chunk_ids, is_reused, strict=True)
            ),
            left_out=tuple(hits[num_kept:]),
            timings=Timings(
                retrieve_s=retrieved - started,
                load_s=load_s,
                link_s=linked - retrieved - load_s,
                prefill_s=first - linked,
                ttft_s=first - started,
                decode_s=ended - first,
                total_s=ended - started,
            ),
            tokens=TokenCounts(num_reused, context.num_tokens - num_reused, len(record.token_ids)),
            linking=linking,
            model=self.model.name,
            finish_reason=record.finish_reason,
        )

    # -- the store ---------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Numbers about the store, and what this process read from it."""
        counters = asdict(self.entries.counters)
        return {**maintenance.stats(self.index, self.entries), **counters, "fingerprint": self.encoder.fingerprint}

    def prune(self) -> int:
        """Delete every KV that no indexed chunk refers to (of other models too); how many there were."""
        return maintenance.prune(self.index, self.entries)

    def verify(self) -> tuple[int, int]:
        """Check every stored KV and drop the damaged ones; (sound, dropped). They are encoded again when needed."""
        sound, dropped = self.entries.verify()
        return sound, len(dropped)

    def close(self) -> None:
        """Let go of the store's files."""
        self.index.close()
        self.entries.close()

    def __enter__(self) -> KVLinkRAG:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------------

    def _bind_embedder(self) -> None:
        """Make sure that the store's vectors and this embedder's belong together."""
        known = self.index.get_meta("embedder")
        if known is None and not self.entries.read_only:
            self.index.set_meta("embedder", self.embedder.digest)
        elif known is not None and known != self.embedder.digest:
            raise NotAStore(
                f"the vectors in {self.folder} were made by another embedder than {self.embedder.name!r}; "
                "load that one, or add the documents to a new store"
            )

    def _num_fitting(self, token_ids: list[tuple[int, ...]], num_scaffold: int, num_links: int, room: int) -> int:
        """How many of the chunks, best first, fit the window beside question and answer."""
        window = self.model.max_positions
        left = window - num_scaffold - room
        if left < 0:
            raise PromptTooLong(
                f"question, history and system message have {num_scaffold} tokens, the answer may have {room} more, "
                f"and the model's window is {window}; shorten them or lower max_new_tokens"
            )
        for place, ids in enumerate(token_ids):
            left -= len(ids) + num_links
            if left < 0:
                return place
        return len(token_ids)


def _as_hit(item: str | Document | Hit) -> Hit:
    """A document given by the caller, as one chunk; its text is what the store would hold for it."""
    if isinstance(item, Hit):
        return item
    document = Document(item) if isinstance(item, str) else item
    if not document.text.strip():
        raise BadInput("a document given with the question holds no text")
    text = chunk_text(document.text, document.title)
    return Hit(Chunk(text, document.id or "given", 0, document.metadata))
