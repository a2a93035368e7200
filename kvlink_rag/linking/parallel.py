"""APE (arXiv 2502.05431): chunks in parallel at the same positions, and attention on them sharpened.

APE's third part, a prefix that all chunks share, is this package's encoding prefix. Attention on the chunks gets a
temperature below 1, which makes it as peaked as that of a chunk read in order, and its sum a power below 1, which gives
back to question and history what the sharpening took.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvlink_rag.attention import GROUPED_SDPA, Tempering
from kvlink_rag.context import Context
from kvlink_rag.errors import BadInput
from kvlink_rag.joining import LinkRequest, overlap


@dataclass(frozen=True)
class Parallel:
    """Every chunk at the same positions, under tempered attention."""

    temperature: float = 0.9
    scale: float = 0.9

    uses_stored_kv = True
    uses_links = False

    def __post_init__(self) -> None:
        if not (0 < self.temperature <= 2 and 0 < self.scale <= 2):
            raise BadInput(
                f"parallel takes a temperature and a scale above 0 and at most 2, got {self.temperature}:{self.scale}"
            )

    def link(self, request: LinkRequest) -> Context:
        """Place each run of chunks from one position on; only history and question are computed."""
        if request.model.hf.config._attn_implementation != GROUPED_SDPA:
            raise BadInput("parallel needs a model with sdpa attention, which this one has not; choose another linking")
        return overlap(request, temper=lambda is_chunk: Tempering(is_chunk, self.temperature, self.scale))
