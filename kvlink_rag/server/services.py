"""What the routes share, hung on the application."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from kvlink_rag.rag import KVLinkRAG
from kvlink_rag.server.failures import Draining
from kvlink_rag.server.jobs import Ingestions
from kvlink_rag.server.metrics import Metrics
from kvlink_rag.server.scheduler import Scheduler
from kvlink_rag.server.settings import ServerSettings
from kvlink_rag.server.stores import Stores


@dataclass
class Services:
    """One server's parts."""

    settings: ServerSettings
    stores: Stores
    scheduler: Scheduler
    ingestions: Ingestions
    metrics: Metrics
    is_draining: bool = False

    def must_be_open(self) -> None:
        """Raises Draining once the server is about to end."""
        if self.is_draining:
            raise Draining("the server is about to end")


def services_of(request: Request) -> Services:
    """The parts of the server that got this request."""
    services: Services = request.app.state.services
    return services


def namespace_of(request: Request) -> str:
    """The namespace that this request's key opens; never anything that the request itself says."""
    namespace: str = request.state.namespace
    return namespace


def rag_of(request: Request) -> KVLinkRAG:
    """The store of this request's namespace."""
    return services_of(request).stores[namespace_of(request)]
