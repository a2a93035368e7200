"""The page at /: static files of this package, served as they are."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, HTTPException
from fastapi.responses import Response

_FOLDER = Path(__file__).parent / "static"
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# Read once: what is served is what was there at the start, and no request ever names a file.
_FILES = {path.name: path.read_bytes() for path in sorted(_FOLDER.glob("*")) if path.suffix in _KINDS}
router = APIRouter(include_in_schema=False)


@router.get("/")
def index() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/static/{name}")
def static(name: str) -> Response:
    """One of its parts."""
    return _file(name)


def _file(name: str) -> Response:
    if name not in _FILES:
        raise HTTPException(404, "no such file")
    return Response(_FILES[name], media_type=f"{_KINDS[Path(name).suffix]}; charset=utf-8")
