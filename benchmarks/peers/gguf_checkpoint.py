"""Converts checkpoints to GGUF files for llama.cpp: only the main model, matrices unchanged, other tensors in float32.

MTP heads are omitted, because llama.cpp's MTP graph requires a fused q, k and v. The vocabulary is a placeholder that
llama.cpp's server requires; the benchmark uses only token ids.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

_ARCHITECTURE = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MIMO2]
_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.attention_sink_bias": "attn_sinks.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
}


def write_gguf(folder: Path, path: Path) -> None:
    """Converts the checkpoint in `folder` to `path`, atomically."""
    config = json.loads((folder / "config.json").read_text())
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, _ARCHITECTURE)
    _add_config(writer, config)
    _add_vocabulary(writer, config["vocab_size"])
    for name, tensor in _tensors(_Checkpoint(folder), config):
        if tensor.ndim == 1 or name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(name, _widened(tensor))
        else:
            writer.add_tensor(name, tensor.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(path)


def _add_config(writer: gguf.GGUFWriter, config: dict) -> None:
    full, sliding = config["rope_parameters"]["full_attention"], config["rope_parameters"]["sliding_attention"]
    pattern = config["hybrid_layer_pattern"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(
        [config["swa_num_key_value_heads"] if kind else config["num_key_value_heads"] for kind in pattern]
    )
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["v_head_dim"])
    writer.add_rope_dimension_count(int(config["head_dim"] * full["partial_rotary_factor"]))
    writer.add_rope_freq_base(full["rope_theta"])
    writer.add_rope_freq_base_swa(sliding["rope_theta"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern([bool(kind) for kind in pattern])
    writer.add_float32(f"{_ARCHITECTURE}.attention.value_scale", config["attention_value_scale"])
    writer.add_layer_norm_rms_eps(config["layernorm_epsilon"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{token}" for token in range(size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["t 0"])
    writer.add_add_bos_token(False)


def _tensors(checkpoint: "_Checkpoint", config: dict) -> Iterator[tuple[str, np.ndarray]]:
    yield "token_embd.weight", checkpoint.read("model.embed_tokens.weight")
    yield "output_norm.weight", checkpoint.read("model.norm.weight")
    yield "output.weight", checkpoint.read("lm_head.weight")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, theirs in _NAMES.items():
            if prefix + name in checkpoint:
                yield f"blk.{layer}.{theirs}", checkpoint.read(prefix + name)
        for part in ("gate", "up", "down") if f"{prefix}mlp.gate.weight" in checkpoint else ():
            names = [f"{prefix}mlp.experts.{e}.{part}_proj.weight" for e in range(config["n_routed_experts"])]
            yield f"blk.{layer}.ffn_{part}_exps.weight", np.stack([checkpoint.read(name) for name in names])


def _widened(tensor: np.ndarray) -> np.ndarray:
    if tensor.dtype == np.float32:
        return tensor
    return (tensor.astype(np.uint32) << 16).view(np.float32)


class _Checkpoint:
    """Reads tensors of a `model.safetensors`: float32, or bfloat16 as uint16, because NumPy has no bfloat16."""

    _DTYPES = {"F32": np.float32, "BF16": np.uint16}

    def __init__(self, folder: Path):
        path = folder / "model.safetensors"
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            self._entries = json.loads(file.read(header_bytes))
        self._data = np.memmap(path, np.uint8, mode="r", offset=8 + header_bytes)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor as a view into the file."""
        entry = self._entries[name]
        start, stop = entry["data_offsets"]
        return self._data[start:stop].view(self._DTYPES[entry["dtype"]]).reshape(entry["shape"])
