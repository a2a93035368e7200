"""Chat over a folder in the terminal: python examples/chat_folder.py [FOLDER]. An empty line ends."""

import sys
from pathlib import Path

from kvlink_rag import KVLinkRAG

HERE = Path(__file__).parent


def main(folder: Path) -> None:
    with KVLinkRAG.load(store=HERE.parent / "example_stores" / "chat") as rag:
        report = rag.add(folder)
        rag.prune(live_ids=[name for name in rag.document_ids() if Path(name).is_relative_to(folder.resolve())])
        print(f"{report.documents} documents: {report.encoded_chunks} chunks read, {report.reused_chunks} known")
        messages: list[dict[str, str]] = []
        while question := input("> ").strip():
            messages.append({"role": "user", "content": question})
            for piece in rag.stream(messages, max_new_tokens=64):
                print(piece.text, end="", flush=True)
            names = dict.fromkeys(Path(hit.chunk.document_id).name for hit in piece.answer.hits)
            print(f"\n  [{', '.join(names)}; {piece.answer.tokens.reused} tokens reused]")
            messages.append({"role": "assistant", "content": piece.answer.text})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "corpus")
