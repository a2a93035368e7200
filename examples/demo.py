"""The main job on the sample corpus: read it once, then ask three questions.

Each answer is made from stored KV; beside its time to the first token stands that of a full prefill of the same
context. Run it with `make demo`.
"""

from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from transformers.utils import logging

from kvlink_rag import Answer, KVLinkRAG

HERE = Path(__file__).parent
QUESTIONS = [
    "What is the fog horn of the lighthouse called?",
    "What is the morning programme of Radio Marrow called?",
    "How many vessels has the shipyard built in total?",
]
console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    logging.disable_progress_bar()
    with console.status("loading the models (the first time, SmolLM2 is converted once)"):
        rag = KVLinkRAG.load(store=HERE.parent / "example_stores" / "demo")
        rag.search("warm up")
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("reading every document once")
        report = rag.add(
            HERE / "corpus", progress=lambda stage, done, total: bar.update(task, completed=done, total=total or None)
        )
    console.print(
        f"{report.documents} documents, {report.tokens:,} tokens: {report.encoded_chunks} chunks encoded, "
        f"{report.reused_chunks} already there ({report.seconds:.1f} s)\n"
    )
    rag.ask(QUESTIONS[0], max_new_tokens=1)  # the first question computes the system message's KV
    for question in QUESTIONS:
        linked = rag.ask(question, max_new_tokens=48)
        full = rag.ask(question, max_new_tokens=48, linking="full")
        show(linked, full)
    console.print("All 60 sample questions, counted by linking: python examples/sample_questions.py", style="dim")


def show(linked: Answer, full: Answer) -> None:
    console.print(f"[bold]{linked.question}[/bold]")
    console.print(f"  from stored KV: {linked}", markup=False)
    console.print(f"  full prefill:   {full}", markup=False, style="dim")
    for source in linked.sources[:3]:
        chunk = source.hit.chunk
        how = "reused" if source.reused else "computed"
        console.print(
            f"    {source.hit.score:.2f}  {Path(chunk.document_id).name}, chunk {chunk.position + 1}: {how}",
            style="dim",
        )
    linked_s, full_s = linked.timings.ttft_s, full.timings.ttft_s
    console.print(
        f"  first token after {linked_s:.2f} s from stored KV, {full_s:.2f} s by full prefill "
        f"([bold]{1 - linked_s / full_s:.0%} less[/bold]; {linked.tokens.reused} tokens reused, "
        f"{linked.tokens.computed} computed)\n"
    )


if __name__ == "__main__":
    main()
