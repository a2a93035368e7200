"""Identity: whatever decides a chunk's KV makes another entry, and what does not decide it makes none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from store_parts import random_kv, same_bits, shape_of
from tiny_models import build, build_hf, byte_tokenizer

from kvlink_rag.encoding import Encoder
from kvlink_rag.model import LanguageModel
from kvlink_rag.packing import Precision
from kvlink_rag.recipe import Recipe, config_digest, entry_key
from kvlink_rag.store.kv_store import KVStore


def one_ulp() -> LanguageModel:
    """The same model with one weight changed by the smallest step there is."""
    hf = build_hf("llama")
    weight = hf.model.layers[0].self_attn.k_proj.weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(float("inf")))
    return LanguageModel(hf, byte_tokenizer(), name="tiny-llama")


def other_tokenizer(change) -> LanguageModel:
    tokenizer = byte_tokenizer()
    change(tokenizer)
    return LanguageModel(build_hf("llama"), tokenizer, name="tiny-llama")


def half() -> LanguageModel:
    return LanguageModel(build_hf("llama").to(torch.bfloat16), byte_tokenizer(), name="tiny-llama")


THETA = {"rope_type": "default", "rope_theta": 10001.0}
VARIANTS = {
    "as it is": lambda: Encoder(build("llama")),
    "one weight by one ulp": lambda: Encoder(one_ulp()),
    "other weights": lambda: Encoder(build("llama", seed=1)),
    "rope theta": lambda: Encoder(build("llama", rope_parameters=THETA)),
    "rope scaling": lambda: Encoder(build("llama-linear")),
    "sliding window": lambda: Encoder(build("mistral-window")),
    "another window": lambda: Encoder(build("mistral-window", sliding_window=9)),
    "norm epsilon": lambda: Encoder(build("llama", rms_norm_eps=1e-5)),
    "added token": lambda: Encoder(other_tokenizer(lambda t: t.add_tokens(["<more>"]))),
    "special token": lambda: Encoder(other_tokenizer(lambda t: t.add_special_tokens({"unk_token": "<unk>"}))),
    "chunk template": lambda: Encoder(build("llama"), template="Text:\n{text}\n\n"),
    "encoding prefix": lambda: Encoder(build("llama"), encoding_prefix="Read this."),
    "no encoding prefix": lambda: Encoder(build("llama"), encoding_prefix=""),
    "soft tokens": lambda: Encoder(build("llama"), soft_tokens=torch.ones(2, 64)),
    "other soft tokens": lambda: Encoder(build("llama"), soft_tokens=torch.ones(2, 64) * 1.0001),
    "more soft tokens": lambda: Encoder(build("llama"), soft_tokens=torch.ones(3, 64)),
    "compute dtype": lambda: Encoder(half()),
    "int8": lambda: Encoder(build("llama"), precision=Precision.parse("int8")),
    "int4": lambda: Encoder(build("llama"), precision=Precision.parse("int4")),
    "int4 in other groups": lambda: Encoder(build("llama"), precision=Precision.parse("int4/32")),
}


@pytest.fixture(scope="module")
def fingerprints():
    return {name: make().fingerprint for name, make in VARIANTS.items()}


def test_each_recipe_hits_only_its_own_entries(disk, fingerprints):
    """G4: all against all. On the diagonal a hit, nowhere else."""
    stores = {name: KVStore(disk, fingerprint, shape_of()) for name, fingerprint in fingerprints.items()}
    assert len(stores) >= 16
    for number, (owner, store) in enumerate(stores.items()):
        kv = random_kv((number,), seed=number)
        store.put(kv)
        hits = [name for name, asker in stores.items() if asker.get((number,)) is not None]
        assert hits == [owner]
        assert same_bits(store.get((number,)), kv)


def test_how_weights_are_quantised_is_part_of_the_recipe():
    """One that quantises while loading computes other KV from the very same files."""
    config = {"hidden_size": 8, "dtype": "float32"}
    online = {**config, "quantization_config": {"quant_method": "bitnet", "quantization_mode": "online"}}
    assert config_digest(online) != config_digest(config) == config_digest({**config, "dtype": "bfloat16"})


def test_the_same_recipe_has_the_same_fingerprint_again(fingerprints):
    """Another process, another object, another name: all hits."""
    again = Encoder(LanguageModel(build_hf("llama"), byte_tokenizer(), name="renamed"))
    assert again.fingerprint == fingerprints["as it is"]


def test_keys_are_what_the_format_says():
    """G5: golden values, computed by hand from docs/store-format.md. They change with the format version only."""
    import hashlib

    def framed(data: bytes) -> bytes:
        return len(data).to_bytes(8, "little") + data

    ids = (1, 2, 300)
    data = b"".join(map(framed, (b"kvlink-entry-2", b"n" * 64, b"f" * 64, b"\1\0\0\0\2\0\0\0\x2c\1\0\0")))
    assert entry_key("f" * 64, ids, "n" * 64) == hashlib.sha256(data).hexdigest()
    assert entry_key("f" * 64, ids) == "1be31cbb687a40d046ff1abe1f41d72d7c3be822a66ff5574b09ea7e7c9c918a"


TEXT = st.text(st.one_of(st.sampled_from("\0\x08 a,:[]{}\"'"), st.characters(exclude_categories=("Cs",))), max_size=6)
ASKED = st.tuples(TEXT, TEXT, st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 3), max_size=4).map(tuple))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(asked=st.lists(ASKED, min_size=20, max_size=20, unique=True))
def test_no_two_of_twenty_thousand_pairs_share_a_key(asked):
    """G5: fingerprint, token ids and namespace, full of separators and lookalikes: 190 pairs in each of 120 lists."""
    assert len({entry_key(fingerprint, ids, namespace) for fingerprint, namespace, ids in asked}) == len(asked)


KEYS = """
import multiprocessing
from kvlink_rag.recipe import Recipe, entry_key

def keys(pipe=None):
    texts = dict(weights="w", adapter="a", config="{}", tokenizer="t", chunk_template="c", encoding_prefix="p")
    recipe = Recipe(**texts, soft_tokens="s", compute_dtype="x", storage_dtype="y")
    return recipe.fingerprint + entry_key(recipe.fingerprint, (1, 2, 300), "n" * 64)

def send(pipe):
    pipe.send(keys())

if __name__ == "__main__":
    print(keys())
    for method in ("fork", "spawn", "forkserver"):
        context = multiprocessing.get_context(method)
        here, there = context.Pipe()
        process = context.Process(target=send, args=(there,))
        process.start()
        print(here.recv())
        process.join()
"""


def test_every_process_computes_the_same_keys(tmp_path):
    """G5: whatever its hash seed, and whichever way it was started."""
    script = tmp_path / "keys.py"
    script.write_text(KEYS)
    seen = []
    for hash_seed in ("0", "1", "random"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
        seen += done.stdout.split()
    assert len(seen) == 12 and len(set(seen)) == 1


def test_no_two_ways_to_fill_a_recipe_give_one_fingerprint():
    """Fields are framed: nothing that one field ends with can begin the next."""
    names = ["weights", "adapter", "config", "tokenizer", "chunk_template", "encoding_prefix", "soft_tokens"]
    seen = set()
    for first in ("", "a", "aa", "a\0", "adapter"):
        for second in ("", "a", "aa", "\0a", "adapter"):
            for place in range(len(names) - 1):
                given = dict.fromkeys(names, "") | {names[place]: first, names[place + 1]: second}
                seen.add(Recipe(**given, compute_dtype="x", storage_dtype="x").fingerprint)
    distinct = {
        tuple((dict.fromkeys(names, "") | {names[p]: f, names[p + 1]: s}).items())
        for f in ("", "a", "aa", "a\0", "adapter") for s in ("", "a", "aa", "\0a", "adapter")
        for p in range(len(names) - 1)
    }  # fmt: skip
    assert len(seen) == len(distinct)
