"""How near KV that was encoded alone comes to a full prefill, by what a chunk sees while it is encoded.

    python benchmarks/encoding_prefix.py --data FILE... [--limit N] [--out FILE]

The model is untrained. At the first 16 tokens of the full prefill's answers: how often both hold the same token
likeliest, the KL from the full prefill, and by how much the accepted answer's NLL lies above the full prefill's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from kvlink_rag import LanguageModel
from kvlink_rag.compute import Job, compute
from kvlink_rag.console import progress_bar
from kvlink_rag.encoding import Encoder
from kvlink_rag.encoding_prefix import CHUNK_TEMPLATE, STAND_IN, TASK
from kvlink_rag.evaluation.agreement import Closeness, compare
from kvlink_rag.evaluation.datasets import read_data
from kvlink_rag.evaluation.scores import interval
from kvlink_rag.links import LinkTokens

MORE = (
    "Marta Welling\n"
    "Marta Welling (12 March 1903 - 4 June 1978) was a botanist and painter. She studied in Uppsala and taught for "
    "thirty years at the college of Northmoor, where she collected more than four thousand mosses. Her best known "
    "book, Quiet Plants, appeared in 1949 and was translated into nine languages.",
    "2011 Corran Valley Cup\n"
    "The 2011 Corran Valley Cup was the 38th edition of the football tournament. It was played from 3 to 17 September "
    "in six towns and was won by Eastbrook United, who defeated Harlan City 2-1 in the final. The top scorer was "
    "Daniel Okoro with seven goals. The next edition was held two years later.",
    "The Glass Orchard\n"
    "The Glass Orchard is a film of 1964 directed by Peter Lavelle and written by his sister Anne. It stars Joan "
    "Mercer as a watchmaker who inherits a house by the sea. The music was composed by Igor Stahl. Critics praised the "
    "camera work, and the film received two national awards.",
    "Blue-tailed finch\n"
    "The blue-tailed finch is a small bird of the finch family. It lives in light forests of pine and birch from the "
    "coast up to 1,800 metres and feeds on seeds and insects. The female lays four to six eggs in May, which hatch "
    "after thirteen days. The population is stable and not considered to be in danger.",
)


def prefixes() -> dict[str, str]:
    """What is compared, by name."""
    documents = [CHUNK_TEMPLATE.format(text=text) for text in (STAND_IN, *MORE)]
    behind = {f"task, {number} documents": TASK + "".join(documents[:number]) for number in (1, 2, 5)}
    return {"none": "", "task": TASK, **behind}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="+", required=True, help="question files, as kvlink eval takes them")
    parser.add_argument("--limit", type=int, default=10, help="questions of each")
    parser.add_argument("--linking", default="plain,recompute_first", help="what needs no training")
    parser.add_argument("--out", type=Path, help="file for the figures of every question")
    options = parser.parse_args()
    linkings = options.linking.split(",")
    examples = [example for source in options.data for example in read_data(source, options.limit)]
    model = LanguageModel.load()
    untrained = LinkTokens.untrained(model, 1)
    found = {}
    print(f"{len(examples)} questions; in brackets 95 % intervals")
    for name, text in prefixes().items():
        encoder = Encoder(model, encoding_prefix=text)

        def work(job: Job, encoder: Encoder = encoder) -> dict[str, Closeness]:
            with progress_bar() as progress:
                return compare(encoder, untrained, examples, linkings, progress)

        for linking, near in compute.run(work).items():
            same = [100 * same / tokens for same, tokens in zip(near.same, near.tokens, strict=True)]
            kl = [divergence / tokens for divergence, tokens in zip(near.divergence, near.tokens, strict=True)]
            found[f"{linking}, {name}"] = {"agrees": same, "kl": kl, "nll_gap": near.gap}
            print(
                f"{name:<18} {len(encoder.prefix_ids):>4} tokens   {linking:<16} agrees {told(same, 0)} %   "
                f"KL {told(kl, 3)}   NLL {told(near.gap, 2)}",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(found, indent=1), "utf-8")


def told(values: Sequence[float], digits: int) -> str:
    """The mean, and in brackets its interval."""
    bounds = "..".join(f"{bound:.{digits}f}" for bound in interval(values))
    return f"{sum(values) / len(values):.{digits}f} ({bounds})"


if __name__ == "__main__":
    main()
