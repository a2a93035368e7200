"""The house: arrows point down, nothing heavy loads early, no file outgrows its idea."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kvlink_rag

PACKAGE = Path(kvlink_rag.__file__).parent
# Lower layers first; a module may import from layers below its own, never beside or above.
LAYERS = [
    ["collector", "errors", "html_text"],
    ["closed", "config", "encoding_prefix", "outputs", "products", "types", "store.counters", "store.place"],
    [
        "adapters",
        "attention",
        "compute",
        "cores",
        "kv",
        "rope",
        "store.buffers",
        "store.lock",
        "store.uses",
        "tokens",
        "recipe",
        "chunking",
        "hub",
        "loading",
        "matching",
        "questions",
        "training.layout",
        "training.objectives",
        "training.processes",
        "training.recomputing",
        "evaluation.scores",
    ],
    [
        "default_models",
        "prompt",
        "evaluation.datasets",
        "evaluation.paired",
        "packing",
        "store.entry",
        "probe",
        "context",
        "training.lessons",
    ],
    ["embedder", "index_database", "model", "store.codec", "store.kvdisk", "store.memory"],
    ["encoding", "links", "index", "store.kv_store", "store.files", "store.namespaces"],
    ["store.kv_index"],
    ["store.disk"],
    ["maintenance"],
    ["joining", "generation", "ingestion", "kv_source", "store.folder"],
    [
        "linking.full",
        "linking.plain",
        "linking.link_tokens",
        "linking.fixed_positions",
        "linking.parallel",
        "linking.recompute",
        "training.learner",
    ],
    ["linking.deviation", "linking.first", "linking.question"],
    ["linking", "training.steps"],
    ["answering", "training.trainer"],
    ["asking", "rows", "training.start"],
    ["batching", "engine", "training.export"],
    ["rag", "training.train", "evaluation.forced", "evaluation.store_speed"],
    ["evaluation.answers", "evaluation.agreement", "evaluation.growth", "evaluation.ttft", "training.study"],
    ["evaluation.decode", "evaluation.ingest", "evaluation.check", "evaluation.report"],
    ["server.refusals"],
    ["server.settings", "server.keys", "server.failures", "server.metrics", "server.page"],
    ["server.schemas", "server.stores", "server.guard", "server.body", "server.outcome"],
    ["server.scheduler", "server.jobs"],
    ["server.services"],
    ["server.chat", "server.documents", "server.health"],
    ["server.app"],
    ["server.run"],
    ["console"],
    ["cli_options"],
    ["cli_check", "cli_measure", "cli_store", "cli_train", "cli_serve"],
    ["cli"],
]
RANK = {f"kvlink_rag.{name}": rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent.name == "linking")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_down(path):
    own = RANK[module_name(path)]
    tree = ast.parse(path.read_text("utf-8"))
    type_only = {node for block in ast.walk(tree) if _is_type_checking(block) for node in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in type_only and (node.module or "").startswith("kvlink_rag"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            for target in {name if name in RANK else node.module for name in names}:
                assert target == "kvlink_rag" or RANK[target] < own, f"{module_name(path)} imports {target}"


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_file_outgrows_400_lines(path):
    assert len(path.read_text("utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_way_to_run_foreign_code(path):
    """No pickle, no eval, no trust in remote code, anywhere in the package."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & {
                "pickle",
                "dill",
                "marshal",
                "shelve",
                "joblib",
            }
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "torch.load", "yaml.load", "faiss.read_index"), name
            assert all(keyword.arg != "trust_remote_code" for keyword in node.keywords)


def test_importing_loads_nothing_heavy():
    heavy = ("torch", "transformers", "faiss", "sentence_transformers", "numpy", "fastapi", "uvicorn", "pydantic")
    code = f"import kvlink_rag, kvlink_rag.cli, sys; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_are_sorted_and_there():
    assert kvlink_rag.__all__ == sorted(
        kvlink_rag.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)
    )
    for name in kvlink_rag.__all__:
        assert getattr(kvlink_rag, name) is not None
