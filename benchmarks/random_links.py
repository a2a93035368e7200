"""Whether `kvlink check`'s questions tell a trained link from a random one, or from none.

    python benchmarks/random_links.py [--links CHECKPOINT] [--seeds N] [--dtype D]

The checkpoint's links, random ones in their place (from the normal distribution, and of the trained ones' length) and
no links at all (`plain`), each held against the full prefill by the same reader; then against `plain`, question by
question.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from kvlink_rag import LanguageModel
from kvlink_rag.compute import Job, compute
from kvlink_rag.console import progress_bar
from kvlink_rag.default_models import DEFAULT_MODEL
from kvlink_rag.encoding import Encoder
from kvlink_rag.evaluation.agreement import Closeness, compare
from kvlink_rag.evaluation.scores import interval
from kvlink_rag.links import Checkpoint, LinkTokens
from kvlink_rag.questions import own_questions


def random_links(links: LinkTokens, seed: int, *, of_length: bool) -> LinkTokens:
    """Links from the normal distribution; of_length: each as long as the trained one in its place."""
    drawn = torch.randn(links.embeddings.shape, generator=torch.Generator().manual_seed(seed))
    if of_length:
        drawn *= links.embeddings.float().norm(dim=-1, keepdim=True).cpu() / drawn.norm(dim=-1, keepdim=True)
    return replace(links, embeddings=drawn.to(links.embeddings))


def row(name: str, found: Closeness, plain: Closeness) -> str:
    """One line: agreement with the full prefill, KL and NLL beside it, and KL and NLL less those of `plain`."""
    about = found.agreement()
    nll = sum(found.gap) / len(found.gap)
    less_kl = [
        one / tokens - other / tokens
        for one, other, tokens in zip(found.divergence, plain.divergence, found.tokens, strict=True)
    ]
    less_nll = [one - other for one, other in zip(found.gap, plain.gap, strict=True)]
    return (
        f"{name:<12}{about.top1 * 100:>7.1f} %{about.kl:>8.4f}{nll:>+8.3f}   {_paired(less_kl)}   {_paired(less_nll)}"
    )


def _paired(differences: Sequence[float]) -> str:
    low, high = interval(differences)
    return f"{sum(differences) / len(differences):+.4f} ({low:+.4f}..{high:+.4f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--links", help="a checkpoint; default: the one shipped")
    parser.add_argument("--seeds", type=int, default=4, help="random links of each kind")
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    checkpoint = Checkpoint.find(DEFAULT_MODEL, options.links)
    if checkpoint is None:
        parser.error("random links need trained ones to stand in for")
    model = LanguageModel.load(reader=checkpoint.reader, adapter=checkpoint.adapter, dtype=options.dtype)
    trained = checkpoint.links(model)
    encoder = Encoder(model, soft_tokens=trained.soft_tokens)
    arms = {"trained": trained}
    arms |= {f"normal {seed}": random_links(trained, seed, of_length=False) for seed in range(options.seeds)}
    arms |= {f"length {seed}": random_links(trained, seed, of_length=True) for seed in range(options.seeds)}
    examples = own_questions()
    with progress_bar() as progress:

        def held(name: str, links: LinkTokens, linking: str) -> Closeness:
            def work(job: Job) -> Closeness:
                return compare(encoder, links, examples, [linking], lambda _, done, total: progress(name, done, total))[
                    linking
                ]

            return compute.run(work)

        plain = held("plain", trained, "plain")
        found = {name: held(name, links, "link_tokens") for name, links in arms.items()}
    print(f"{'links':<12}{'agrees':>9}{'KL':>8}{'NLL':>8}   {'KL less plain':<26}   NLL less plain")
    for name, closeness in {"none": plain, **found}.items():
        print(row(name, closeness, plain))


if __name__ == "__main__":
    main()
