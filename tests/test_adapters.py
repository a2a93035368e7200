"""Adapters: a reader is what PEFT would have merged, whichever way it is made, and what does not fit is refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import build_hf, byte_tokenizer

from kvlink_rag import LanguageModel, adapters, products
from kvlink_rag.errors import BadInput, CheckpointMismatch, UnsupportedModel


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter of random weights for a tiny model of a family, in bfloat16 as `kvlink train` writes them."""

    def save(family="llama", config=None):
        torch.manual_seed(1)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        wrapped = get_peft_model(build_hf(family), config or lora)
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        wrapped.save_pretrained(tmp_path)
        path = tmp_path / "adapter_model.safetensors"
        save_file({name: tensor.bfloat16().contiguous() for name, tensor in load_file(path).items()}, path)
        return tmp_path

    return save


@pytest.mark.parametrize("family", ["llama", "gemma3-window", "phi3-partial"])
def test_a_reader_is_to_the_last_bit_what_peft_merges(family, adapter):
    folder = adapter(family)
    base = build_hf(family)
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    reader, merged = adapters.reader_of(base, folder), adapters.merge(build_hf(family), folder)
    by_peft = dict(merged.named_parameters())
    for name, weight in reader.named_parameters():
        assert torch.equal(weight, by_peft[name]), name
    assert all(torch.equal(weight, before[name]) for name, weight in base.named_parameters())
    ids = torch.tensor([[5, 6, 7, 8]])
    for model in (reader, merged):
        products.prepare(model, reads_questions=True)
    with torch.inference_mode():
        assert torch.equal(reader(ids).logits, merged(ids).logits)
        assert (reader(ids).logits - base(ids).logits).abs().max() > 1e-2


def test_what_the_adapter_leaves_alone_is_held_once_and_the_rest_twice(adapter):
    base = build_hf("llama")
    reader = dict(adapters.reader_of(base, adapter()).named_parameters())
    is_shared = {name: weight.data_ptr() == reader[name].data_ptr() for name, weight in base.named_parameters()}
    assert all(shared == ("proj" not in name) for name, shared in is_shared.items())


def test_the_copy_can_be_told_another_attention_than_the_base(adapter):
    base = build_hf("llama")
    reader = adapters.reader_of(base, adapter())
    reader.set_attn_implementation("eager")
    assert base.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "more",
    [{"use_dora": True}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"rank_pattern": {"q_proj": 8}}],
    ids=str,
)
def test_an_adapter_that_is_more_than_a_plain_sum_is_merged_by_peft(more, adapter):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **more)
    folder, base = adapter(config=lora), build_hf("llama")
    reader, by_peft = (
        adapters.reader_of(base, folder),
        dict(adapters.merge(build_hf("llama"), folder).named_parameters()),
    )
    for name, weight in reader.named_parameters():
        assert torch.equal(weight, by_peft[name]), name
    before = dict(build_hf("llama").named_parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in base.named_parameters())
    assert reader.get_input_embeddings().weight.data_ptr() == base.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("more", [{}, {"use_dora": True}], ids=str)
def test_an_adapter_kept_as_a_pickle_is_refused(more, adapter):
    """PEFT would load it, and no digest would name it: two of them would share stored KV."""
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **more)
    folder = adapter(config=lora)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    for load in (adapters.merge, adapters.reader_of):
        with pytest.raises(CheckpointMismatch, match=r"adapter_model\.safetensors"):
            load(build_hf("llama"), folder)


def test_an_adapter_within_the_models_own_folder_is_refused(adapter, tmp_path):
    """transformers would apply it unasked, and its settings are in no digest of the model's weights."""
    folder = adapter()
    build_hf("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(BadInput, match="holds an adapter beside the model"):
        LanguageModel.load(folder, dtype="float32")


@pytest.mark.parametrize(
    "apply",
    [
        lambda hf, folder: (hf.load_adapter(folder), hf)[1],
        PeftModel.from_pretrained,
        lambda hf, folder: PeftModel.from_pretrained(hf, folder).base_model.model,
    ],
    ids=["by transformers", "by PEFT", "what PEFT wraps"],
)
def test_a_model_with_an_adapter_loaded_into_it_is_refused(adapter, apply):
    """The digest of its tensors does not tell how the adapter is weighed; merged, it does."""
    applied = apply(build_hf("llama"), str(adapter()))
    with pytest.raises(UnsupportedModel, match="an adapter is loaded into this model"):
        LanguageModel(applied, byte_tokenizer())
    merged = PeftModel.from_pretrained(build_hf("llama"), str(adapter())).merge_and_unload()
    assert LanguageModel(merged, byte_tokenizer()).weights != LanguageModel(build_hf("llama"), byte_tokenizer()).weights


def test_an_adapter_of_another_model_or_none_is_refused(adapter, tmp_path):
    with pytest.raises(CheckpointMismatch, match="no readable adapter"):
        adapters.reader_of(build_hf("llama"), tmp_path / "nothing")
    with pytest.raises(CheckpointMismatch, match="the model has none of that name"):
        adapters.reader_of(build_hf("llama"), adapter("phi3-partial"))
    folder = adapter()
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.lora_B.weight"))
    save_file({**tensors, name: tensors[name][1:].contiguous()}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"q_proj.weight of \(\d+, \d+\), the model has one of"):
        adapters.reader_of(build_hf("llama"), folder)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointMismatch, match="no readable adapter"):
        adapters.reader_of(build_hf("llama"), folder)
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 0}), "utf-8")
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointMismatch, match="no readable adapter"):
        adapters.reader_of(build_hf("llama"), folder)
