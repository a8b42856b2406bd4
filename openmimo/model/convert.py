"""Rewrite a checkpoint in another dtype or layout, shard by shard, and list the tensors that a checkpoint has."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch

from openmimo.core.errors import CheckpointError, ConfigError
from openmimo.core.fields import Bounds, check_fields
from openmimo.core.files import new_folder_atomic
from openmimo.data.tokenizer_files import read_companions
from openmimo.kernels.weights import FP8_BLOCK, Packed, Packing, pack
from openmimo.model.attention import AttentionModule, Positions
from openmimo.model.config import ModelConfig
from openmimo.model.hf import DTYPES, Slot, check_fit, open_checkpoint, packed_entry, slots, write_config
from openmimo.model.hf_files import DEFAULT_SHARD_BYTES, CheckpointReader, Entry, fuse, packed_entries, write_shards
from openmimo.model.mimo import MiMo
from openmimo.model.weight_formats import (
    allocate_quantized,
    has_fp8_rank_scales,
    is_fp8_in_hub_layout,
    num_fp8_blocks,
    quantize_fp8,
    quantize_fp8_rank_keys_values,
    quantize_fp8_ranks,
)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class ConvertConfig:
    """Settings of `convert`.

    Attributes:
        dtype: Dtype of the written tensors. "fp8" writes F8_E4M3 with scales of 128 x 128 blocks, as in the published
            checkpoint, and bfloat16 for the tensors that are not quantized there.
        projections: "split" q, k and v, or "fused_qkv" stacked by rank.
        max_shard_gigabytes: Size limit of a file in GiB; a tensor is never split.
        window_keys: Window of the sliding layers (None: as in `config.json`).
        quantize: Packed format of linear layers and experts (see `kernels/weights.py`); "none" for none.
        stages: Stages of the packed format. In fairy2i and binary, each takes one bit a weight.
        scales: Scales of the packed format: of a whole matrix, or of each row.
    """

    dtype: Literal["float32", "bfloat16", "float16", "float64", "fp8"] = "bfloat16"
    projections: Literal["split", "fused_qkv"] = "split"
    max_shard_gigabytes: Annotated[float, Bounds(least=0.001, most=1e6)] = DEFAULT_SHARD_BYTES / 2**30
    window_keys: Positions | None = None
    quantize: Literal["none", "fairy2i", "fairy", "ternary", "binary"] = "none"
    stages: Annotated[int, Bounds(least=1, most=4)] = 1
    scales: Literal["tensor", "row"] = "tensor"

    def __post_init__(self) -> None:
        check_fields(self, "convert")
        if self.quantize == "none" and (self.stages, self.scales) != (1, "tensor"):
            raise ConfigError("stages and scales have no effect without quantize; name a packed format.")
        if self.quantize != "none" and (self.dtype == "fp8" or self.projections != "split"):
            raise ConfigError(
                f"quantize {self.quantize} packs split projections, and dtype is that of the other tensors; give a "
                "plain dtype and projections split."
            )

    @property
    def packing(self) -> Packing | None:
        """The packed format, or None."""
        return None if self.quantize == "none" else Packing(self.quantize, self.stages, self.scales == "row")


def convert(
    source: str | Path,
    destination: str | Path,
    config: ConvertConfig,
    *,
    start: Callable[[int], Progress],
    open_source: Callable[[Path, int | None], tuple[ModelConfig, CheckpointReader]] = open_checkpoint,
) -> None:
    """Rewrite a checkpoint in another dtype or layout, tensor by tensor; at most one shard is in memory.

    Args:
        source: Folder of the checkpoint.
        destination: New folder.
        config: Dtype and layout to write.
        start: Called once with the total number of bytes. Returns the function that is called with the bytes of each
            finished tensor.
        open_source: Opens the source, given its folder and the window; a checkpoint in shards has its own.

    Raises:
        CheckpointError: The source is not a valid checkpoint, or the destination exists. Nothing is written.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists():
        raise CheckpointError(f"{destination} already exists; give a new folder.")
    model_config, reader = open_source(source, config.window_keys)
    companions = read_companions(source)
    with torch.device("meta"):
        model = MiMo(model_config)
    check_fit(model, reader)
    if config.packing:
        allocate_quantized(model, config.packing)
    entries = list(_converted_entries(model, reader, config))
    extra: dict[str, Any] = {}
    if config.projections != "split":
        extra["attention_projection_layout"] = config.projections
    if config.packing:
        extra |= packed_entry(config.packing)
    if config.dtype == "fp8":
        extra["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
    with new_folder_atomic(destination) as folder:
        companions.write(folder)
        write_config(model_config, folder, dtype="bfloat16" if config.dtype == "fp8" else config.dtype, extra=extra)
        on_tensor = start(sum(entry.num_bytes for entry in entries))
        write_shards(folder, entries, max_shard_bytes=int(config.max_shard_gigabytes * 2**30), on_tensor=on_tensor)


def checkpoint_layout(config: ModelConfig, *, quantized: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint of this model by name; with `quantized`, FP8 scales included."""
    with torch.device("meta"):
        model = MiMo(config)
    shapes = {slot.name: tuple(slot.target.shape) for slot in slots(model)}
    if quantized:
        for name in [name for name in shapes if is_fp8_in_hub_layout(name)]:
            shapes[name + "_scale_inv"] = _scale_shape(name, shapes, model)
    return shapes


def _scale_shape(name: str, shapes: dict[str, tuple[int, ...]], model: MiMo) -> tuple[int, int]:
    rows, columns = shapes[name]
    blocks = num_fp8_blocks(rows)
    if name.endswith(".k_proj.weight") and _has_rank_grid(name, model):
        ranks = model.config.qkv_ranks
        blocks = ranks * num_fp8_blocks(rows // ranks)
    return blocks, num_fp8_blocks(columns)


def _has_rank_grid(name: str, model: MiMo) -> bool:
    """Return whether a layer's keys and values are quantized per rank, as in the published full layers.

    This is so if a rank's keys end inside a block, and if the number of scales shows it to a reader of the split
    tensors: K has more rows of scales than uniform blocks would have, and V has at least one row for each rank. All
    other layers have uniform blocks.
    """
    module = cast(AttentionModule, model.get_submodule(name.rsplit(".", 2)[0]))
    spec, ranks = module.spec, model.config.qkv_ranks
    key_rows = spec.num_kv_heads * spec.key_dim
    key_blocks = num_fp8_blocks(key_rows // ranks)
    both_blocks = num_fp8_blocks(spec.num_kv_heads * (spec.key_dim + spec.value_dim) // ranks)
    return has_fp8_rank_scales(ranks * key_blocks, ranks, key_rows) and both_blocks > key_blocks


def _converted_entries(model: MiMo, reader: CheckpointReader, config: ConvertConfig) -> Iterator[Entry]:
    dtype = torch.bfloat16 if config.dtype == "fp8" else DTYPES[config.dtype]
    by_name = {slot.name: slot for slot in slots(model)}
    # The three tensors of a packed matrix are written one after another.
    read_packed = functools.lru_cache(maxsize=1)(functools.partial(_read_packed, reader, model.config))
    for slot in by_name.values():
        if config.projections == "fused_qkv" and slot.name.endswith(
            (".q_proj.weight", ".k_proj.weight", ".v_proj.weight")
        ):
            if slot.name.endswith(".q_proj.weight"):
                yield from _fused_entries(slot.name, by_name, model, reader, config)
            continue
        target = slot.target
        if isinstance(target, Packed) and not slot.swaps_halves:
            load = functools.partial(read_packed, slot.name, target.packing)
            yield from packed_entries(slot.name, target.packing, target.matrix_shape, load)
        elif config.dtype == "fp8" and is_fp8_in_hub_layout(slot.name):
            yield from _fp8_entries(slot, model, reader)
        else:
            yield Entry(
                slot.name,
                tuple(slot.target.shape),
                torch.float32 if slot.is_router else dtype,
                functools.partial(reader.read, slot.name, model.config),
            )


def _read_packed(reader: CheckpointReader, config: ModelConfig, name: str, packing: Packing) -> Packed:
    return pack(reader.read(name, config), packing)


def _fp8_entries(slot: Slot, model: MiMo, reader: CheckpointReader) -> Iterator[Entry]:
    scale_shape = _scale_shape(slot.name, {slot.name: tuple(slot.target.shape)}, model)

    def quantized(index: int) -> torch.Tensor:
        name, ranks = slot.name, model.config.qkv_ranks
        k_name, v_name = (name.replace(name.split(".")[-2], part) for part in ("k_proj", "v_proj"))
        if name in (k_name, v_name) and _has_rank_grid(name, model):
            k, v = reader.read(k_name, model.config), reader.read(v_name, model.config)
            k_code, v_code, k_scale, v_scale = quantize_fp8_rank_keys_values(k, v, ranks)
            return ((k_code, k_scale) if name == k_name else (v_code, v_scale))[index]
        return quantize_fp8(reader.read(name, model.config))[index]

    yield Entry(slot.name, tuple(slot.target.shape), torch.float8_e4m3fn, lambda: quantized(0))
    yield Entry(slot.name + "_scale_inv", scale_shape, torch.float32, lambda: quantized(1))


def _fused_entries(
    q_name: str, by_name: dict[str, Slot], model: MiMo, reader: CheckpointReader, config: ConvertConfig
) -> Iterator[Entry]:
    names = [q_name.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
    rows = sum(by_name[name].target.shape[0] for name in names)
    columns, ranks = by_name[q_name].target.shape[1], model.config.qkv_ranks
    fused_name = q_name.replace("q_proj", "qkv_proj")

    def fused() -> torch.Tensor:
        q, k, v = (reader.read(name, model.config) for name in names)
        return fuse(q, k, v, ranks)

    if config.dtype != "fp8":
        yield Entry(fused_name, (rows, columns), DTYPES[config.dtype], fused)
        return
    scale_shape = (ranks * num_fp8_blocks(rows // ranks), num_fp8_blocks(columns))
    yield Entry(fused_name, (rows, columns), torch.float8_e4m3fn, lambda: quantize_fp8_ranks(fused(), ranks)[0])
    yield Entry(fused_name + "_scale_inv", scale_shape, torch.float32, lambda: quantize_fp8_ranks(fused(), ranks)[1])
