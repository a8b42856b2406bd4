"""LoRA adapters in peft's format: their weights, what is refused, and the tokenizer of the base."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoint import save_tiny_checkpoint

from openmimo import load_model, save_model
from openmimo.core.errors import CheckpointError
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.llm import LLM
from openmimo.model.convert import ConvertConfig, convert

IDS = torch.arange(5, 40)
Q, K = (f"model.layers.1.self_attn.{part}_proj" for part in "qk")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("base"))


def save_adapter(folder, base, tensors, **config):
    """The files that peft's save_pretrained writes."""
    folder.mkdir()
    values = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": 4,
        "lora_alpha": 8,
        "bias": "none",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


@torch.inference_mode()
def logits(model):
    return model.logits(IDS)


def pair(base, module, rank=4, seed=0):
    weight = load_model(base).state_dict()[f"{module}.weight"]
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, weight.shape[1], generator=generator)
    up = torch.randn(weight.shape[0], rank, generator=generator)
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, (2.0, 4.0)),
        ({"use_rslora": True}, (8 / math.sqrt(4), 8 / math.sqrt(2))),
        ({"alpha_pattern": {"q_proj": 1}}, (0.25, 4.0)),
        ({"alpha_pattern": {"layers.1.self_attn.k_proj": 3, "1.self_attn": 9}}, (2.0, 1.5)),
    ],
)
def test_an_adapter_is_merged_into_its_base(base, tmp_path, config, scales):
    head = torch.randn(
        load_model(base).state_dict()["lm_head.weight"].shape, generator=torch.Generator().manual_seed(3)
    )
    tensors = {**pair(base, Q), **pair(base, K, rank=2, seed=1), "lm_head.weight": head}
    folder = save_adapter(tmp_path / "adapter", base, tensors, rank_pattern={"k_proj": 2}, **config)
    expected = load_model(base)
    state = expected.state_dict()
    with torch.no_grad():
        for module, scale in zip((Q, K), scales, strict=True):
            down, up = tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"]
            state[f"{module}.weight"] += scale * (up @ down)
        state["lm_head.weight"].copy_(head)
    assert torch.equal(logits(load_model(folder)), logits(expected))
    assert not torch.allclose(logits(load_model(base)), logits(expected), atol=0.1)
    convert(folder, tmp_path / "merged", ConvertConfig(dtype="float32"), start=lambda total: lambda num_bytes: None)
    save_model(load_model(folder), tmp_path / "saved")
    for written in ("merged", "saved"):
        assert torch.equal(logits(load_model(tmp_path / written)), logits(expected))
    assert Tokenizer.load(tmp_path / "saved").fingerprint == Tokenizer.load(base).fingerprint


def test_base_and_tokenizer_are_found(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    folder = save_adapter(tmp_path / "adapter", "../base", pair(base, Q))
    assert LLM(folder).generate("The quick")[0].text
    assert Tokenizer.load(folder).fingerprint == Tokenizer.load(base).fingerprint
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert Tokenizer.load(folder).chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"alpha_pattern": {"(a+)+q": 3}}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern"),
        ({"base_model_name_or_path": "org/model"}, "base_model_name_or_path"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path"),
        ({"r": "four"}, "r"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(base, tmp_path, config, named):
    folder = save_adapter(tmp_path / "adapter", base, pair(base, Q), **config)
    with pytest.raises(CheckpointError, match=f"adapter_config.json.*{named}"):
        load_model(folder)


def test_tensors_that_do_not_fit_are_named(base, tmp_path):
    good = pair(base, Q)
    a, b = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
    faults = {
        "no weight of the base": {**good, "model.layers.99.mlp.up_proj.lora_A.weight": torch.ones(4, 4)},
        "lora_embedding": {**good, "model.embed_tokens.lora_embedding_A": torch.ones(4, 4)},
        "do not form": {a: good[a]},
        "lacks its": {b: good[b]},
        "of shape": {a: good[a], b: good[b][:-1]},
        "has shape": {"lm_head.weight": torch.ones(3, 3)},
    }
    for number, (said, tensors) in enumerate(faults.items()):
        folder = save_adapter(tmp_path / str(number), base, tensors)
        with pytest.raises(CheckpointError, match=said):
            load_model(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="adapter_model.safetensors"):
        load_model(folder)
