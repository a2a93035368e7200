from __future__ import annotations

import functools
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from garbage import modules_are_no_garbage, pytest_collection_finish  # noqa: F401

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def embedder():
    """The real default embedder."""
    from kvlink_rag import Embedder

    return Embedder()


@pytest.fixture(scope="session")
def tiny():
    """A tiny random Llama in float32."""
    from tiny_models import build

    return build("llama")


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of a tiny model to be trained."""
    from tiny_models import build_hf, byte_tokenizer

    folder = tmp_path_factory.mktemp("base")
    build_hf("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm():
    """The real default model, in the precision this machine gives it."""
    from kvlink_rag import LanguageModel

    return LanguageModel.load()


@pytest.fixture(scope="session")
def _loads():
    """The last two ways in which the default model was loaded, and what that gave."""
    from kvlink_rag import LanguageModel

    return functools.lru_cache(maxsize=2)(LanguageModel.load)


@pytest.fixture
def loaded_once(_loads, monkeypatch):
    """Within a test that opens stores again and again, the default model is read once; others as ever."""
    from kvlink_rag import LanguageModel
    from kvlink_rag.default_models import DEFAULT_MODEL

    load = LanguageModel.load

    def load_(model=DEFAULT_MODEL, **options):
        return _loads(model, **options) if model == DEFAULT_MODEL else load(model, **options)

    monkeypatch.setattr(LanguageModel, "load", load_)


@pytest.fixture
def kvlink(loaded_once, monkeypatch, capsys):
    """Runs the command in this process, which reads the default model once; gives exit code, stdout and stderr."""

    from kvlink_rag import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kvlink", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as exit_:
            code = exit_.code or 0
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def excerpt(name, folder, *paragraphs):
    """The title and some paragraphs of a document of the sample corpus, written to `folder`: quicker read than all."""
    text = (ROOT / "examples" / "corpus" / name).read_text("utf-8").split("\n\n")
    path = folder / name
    path.write_text("\n\n".join([text[0], *(text[number] for number in paragraphs)]) + "\n", "utf-8")
    return path


@pytest.fixture
def examples(tmp_path):
    """A copy of the examples with a small corpus, so that their stores are new and quickly filled."""
    folder = tmp_path / "examples"
    (folder / "corpus").mkdir(parents=True)
    excerpt("lighthouse.md", folder / "corpus", 1, 4)
    excerpt("shipyard.md", folder / "corpus", 1)
    for path in (ROOT / "examples").glob("*.*"):
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture
def open_rag(tiny, embedder, tmp_path):
    """Opens the same store as often as a test likes, as restarts do; closes all of them at the end."""
    from kvlink_rag import KVLinkRAG

    opened = []

    def open_(model=None, store=tmp_path / "store", **options):
        rag = KVLinkRAG(model or tiny, embedder, store, **options)
        opened.append(rag)
        return rag

    yield open_
    for rag in opened:
        rag.close()


@pytest.fixture
def rag(open_rag):
    return open_rag()


@pytest.fixture
def quick_folder(tmp_path):
    """A folder where syncing costs nothing, for tests that are not about what a disk does."""
    from store_parts import quick_folder_within

    with quick_folder_within(tmp_path) as folder:
        yield folder


@pytest.fixture
def disk(tmp_path):
    """A store's folder of entries, with room."""
    from kvlink_rag.store.disk import DiskStore

    store = DiskStore(tmp_path / "kv", max_bytes=2**30)
    yield store
    store.close()


@pytest.fixture
def kvs(disk):
    """Small KVs in that folder."""
    from store_parts import FINGERPRINT, shape_of

    from kvlink_rag.store.kv_store import KVStore

    return KVStore(disk, FINGERPRINT, shape_of())
