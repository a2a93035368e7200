"""Ask a PDF: python examples/chat_pdf.py [FILE.pdf [QUESTION ...]]. Without a file, a small one is made first."""

import sys
import tempfile
from pathlib import Path

from kvlink_rag import KVLinkRAG

LINES = [
    "The Marrow Bay Ferry Handbook",
    "The ferry to Lantern Point leaves at nine in the morning.",
    "A ticket costs four crowns, and dogs travel free of charge.",
]


def make_pdf(path: Path) -> Path:
    """A PDF of one page with these lines of text."""
    text = "BT /F1 14 Tf 50 700 Td 20 TL " + " ".join(f"({line}) '" for line in LINES) + " ET"
    bodies = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        "/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        f"<< /Length {len(text)} >>\nstream\n{text}\nendstream",
    ]
    data, places = "%PDF-1.4\n", []
    for number, body in enumerate(bodies, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    data += f"xref\n0 5\n0000000000 65535 f \n{table}trailer << /Size 5 /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    path.write_text(data, "latin-1")
    return path


def main(files: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, KVLinkRAG.load(store=Path(folder) / "store") as rag:
        pdf = Path(files[0]) if files else make_pdf(Path(folder) / "ferry.pdf")
        print(f"{pdf.name}: {rag.add(pdf).tokens} tokens read once")
        for question in files[1:] or ["When does the ferry leave?", "What does a ticket cost?"]:
            answer = rag.ask(question, max_new_tokens=32)
            print(f"{question}\n  {answer}\n  {answer.tokens.reused} tokens reused")


if __name__ == "__main__":
    main(sys.argv[1:])
