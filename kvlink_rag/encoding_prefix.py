"""What every chunk sees while it is encoded.

A chunk that is read alone stands at the head of its own text; in a prompt it stands behind the task, which also lends
it the attention sink (APE, arXiv 2502.05431, shares a prefix for that), and most often behind other documents. One
that stands in for those brings the KV nearer still to a full prefill's where links are not trained; for the shipped
checkpoint's training it was no gain (both measured: docs/training-experiments.md), so it is not the default. A prefix
costs a little attention at ingestion and nothing later: its own KV is not kept. It is apart from the system message,
which may change without touching the store.
"""

from __future__ import annotations

CHUNK_TEMPLATE = "Document:\n{text}\n\n"
# Made up, and dull: nobody asks for it, and no answer is to be drawn from it.
STAND_IN = (
    "Harbour of Lindow\n"
    "The harbour of Lindow was built between 1871 and 1884 by the engineer Thomas Ashgrove. It has two moles, the "
    "longer of which measures 640 metres, and a lighthouse of red brick. Until the railway came in 1902 it was the "
    "main port for the grain trade of the valley. A museum in the former customs house shows ship models and maps."
)
TASK = "You answer the question from the documents. Answer briefly, with the words of the documents.\n\n"
WITH_STAND_IN = TASK + CHUNK_TEMPLATE.format(text=STAND_IN)
DEFAULT_ENCODING_PREFIX = TASK
