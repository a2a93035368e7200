"""Documents, uploads, search and the store's numbers: /v1/documents, /v1/jobs, /v1/search, /v1/store."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile

from kvlink_rag.compute import compute
from kvlink_rag.errors import BadDocument, BadInput, MissingExtra
from kvlink_rag.index import IndexedChunk
from kvlink_rag.loading import read_bytes
from kvlink_rag.server import settings as bounds
from kvlink_rag.server.schemas import NewDocuments, SearchRequest
from kvlink_rag.server.services import namespace_of, rag_of, services_of
from kvlink_rag.types import Document

router = APIRouter()
_UPLOAD = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/NewDocuments"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {
                            "type": "array",
                            "minItems": 1,
                            "maxItems": bounds.MAX_ADDED,
                            "items": {"type": "string", "format": "binary"},
                        }
                    },
                }
            },
        },
    }
}


@router.post("/v1/documents", status_code=202, openapi_extra=_UPLOAD)
async def add(request: Request) -> JSONResponse:
    """Read texts or files once, in the background; GET /v1/jobs/ID tells how far it is."""
    services = services_of(request)
    services.must_be_open()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        documents = await _texts(request)
        job = services.ingestions.submit(namespace_of(request), rag_of(request), lambda: (documents, []))
    elif kind == "multipart/form-data":
        files = await _files(request)
        limit = rag_of(request).limits.max_document_bytes
        job = services.ingestions.submit(namespace_of(request), rag_of(request), partial(read_files, files, limit))
    else:
        raise HTTPException(
            415, "send texts with the header Content-Type: application/json, or files as multipart/form-data"
        )
    return JSONResponse(job.to_json(), 202)


async def _texts(request: Request) -> list[Document]:
    data = await request.body()
    try:
        body = NewDocuments.model_validate_json(data)
    except ValidationError as error:
        errors = [{**item, "loc": ("body", *item["loc"])} for item in error.errors()]
        is_json = errors[0]["type"] != "json_invalid"
        raise RequestValidationError(errors, body=from_json(data) if is_json else None) from None
    return [Document(item.text, item.id, item.title, dict(item.metadata)) for item in body.documents]


async def _files(request: Request) -> list[tuple[str, bytes]]:
    async with request.form(max_files=bounds.MAX_ADDED, max_fields=8) as form:
        uploads = [item for _, item in form.multi_items() if isinstance(item, UploadFile)]
        files = [(file_name(upload.filename or ""), await upload.read()) for upload in uploads]
    if not files:
        raise BadInput("the form holds no file; send each as a part with a file name")
    return files


def file_name(name: str) -> str:
    """The last part of a file's name, without what no name needs. It never becomes a path."""
    last = PureWindowsPath(PurePosixPath(name).name).name
    return re.sub(r"[\x00-\x1f\x7f]", "", last).encode("utf-8", "replace").decode()[-bounds.MAX_NAME_CHARS :] or "file"


def read_files(files: list[tuple[str, bytes]], max_bytes: int) -> tuple[list[Document], list[str]]:
    """Documents of uploaded files under their names, and a line for each that gave none."""
    documents, skipped = [], []
    for name, data in files:
        try:
            if len(data) > max_bytes:
                raise BadDocument(f"{len(data):,} bytes, the limit is {max_bytes:,}")
            documents.append(read_bytes(Path(name), data, name))
        except (BadDocument, MissingExtra) as error:
            skipped.append(f"{name}: {error}")
    return documents, skipped


@router.get("/v1/documents")
def list_documents(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=bounds.MAX_NAME_CHARS)] = None,
) -> dict[str, Any]:
    """Documents in order of id, `limit` of them behind the id `after`."""
    rag = rag_of(request)
    ids = [document_id for document_id in rag.document_ids() if after is None or document_id > after]
    data = [_about(document_id, rag.index.chunks_of(document_id)) for document_id in ids[:limit]]
    return {"object": "list", "data": data, "has_more": len(ids) > limit}


@router.get("/v1/documents/{document_id:path}")
def get_document(request: Request, document_id: str) -> dict[str, Any]:
    """A document with the text of its chunks."""
    chunks = rag_of(request).index.chunks_of(document_id)
    if not chunks:
        raise HTTPException(404, "no document of that id")
    return {**_about(document_id, chunks), "texts": [indexed.chunk.text for indexed in chunks]}


@router.delete("/v1/documents/{document_id:path}")
async def delete_document(request: Request, document_id: str) -> dict[str, Any]:
    """Remove a document, its chunks and all KV that no other document shares."""
    rag = rag_of(request)
    if not await compute.arun(lambda job: rag.delete(document_id)):
        raise HTTPException(404, "no document of that id")
    return {"id": document_id, "object": "document", "deleted": True}


def _about(document_id: str, chunks: list[IndexedChunk]) -> dict[str, Any]:
    metadata = dict(chunks[0].chunk.metadata) if chunks else {}
    counts = {"chunks": len(chunks), "tokens": sum(chunk.num_tokens for chunk in chunks)}
    return {"id": document_id, "object": "document", **counts, "metadata": metadata}


@router.get("/v1/jobs")
async def list_jobs(request: Request) -> dict[str, Any]:
    """Uploads of this namespace, the newest first."""
    jobs = services_of(request).ingestions.of(namespace_of(request))
    return {"object": "list", "data": [job.to_json() for job in jobs]}


@router.get("/v1/jobs/{job_id}")
async def get_job(request: Request, job_id: str) -> dict[str, Any]:
    """How far an upload is."""
    for job in services_of(request).ingestions.of(namespace_of(request)):
        if job.id == job_id:
            return job.to_json()
    raise HTTPException(404, "no job of that id; only the last ones are remembered")


@router.post("/v1/search")
async def search(body: SearchRequest, request: Request) -> dict[str, Any]:
    """The chunks nearest to a query, best first."""
    services, rag = services_of(request), rag_of(request)
    services.must_be_open()
    with services.scheduler.place():
        hits = await compute.arun(lambda job: rag.search(body.query, body.k))
    data = [
        {"document": hit.chunk.document_id, "chunk": hit.chunk.position, "score": hit.score, "text": hit.chunk.text}
        for hit in hits
    ]
    return {"object": "list", "data": data}


@router.get("/v1/store")
def store(request: Request) -> dict[str, Any]:
    """Numbers of the stored KV; hit_rate: the part of all chunks in answers since the start that was reused."""
    rag = rag_of(request)
    used = services_of(request).scheduler.chunks.get(rag, {"reused": 0, "computed": 0})
    total = used["reused"] + used["computed"]
    return {
        "object": "store",
        **rag.stats(),
        "chunks_used": used,
        "hit_rate": used["reused"] / total if total else None,
    }
