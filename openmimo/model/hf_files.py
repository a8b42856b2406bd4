"""The files of a checkpoint folder in the Hugging Face layout: a reader of tensors and a writer of shards.

The reader presents *logical* tensors: split q, k and v in a plain dtype. The folder may store them in one file or many,
as FP8 codes and scales (which may be in different files), as q, k and v fused by rank (`attention_projection_layout:
fused_qkv`), or packed: codes under the name of the weight, `_scales`, and `_packed` with the shape of the matrix and
the CRC-32 of the codes. All errors that the headers reveal are raised before a tensor is read. The
writer streams tensors into shards of bounded size. A LoRA adapter changes tensors while they are read.
"""

import contextlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from openmimo.core.errors import CheckpointError
from openmimo.core.files import file_in_folder, listed, parse_json, read_json, read_known_keys, require_folder
from openmimo.data.tokenizer_files import ADAPTER_CONFIG
from openmimo.kernels.weights import FP8_BLOCK, BlockScaled, Packed, Packing, Weight, dequantized
from openmimo.model.config import AttentionConfig, ModelConfig
from openmimo.model.weight_formats import (
    has_fp8_rank_scales,
    num_fp8_blocks,
    split_fp8_rank_keys_values,
    split_fp8_ranks,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format
_FLOAT_DTYPES = {"F64", "F32", "BF16", "F16"}
_FP8_DTYPE = "F8_E4M3"
_PACKED_DTYPE = "U8"
_SCALE = "_scale_inv"
_PACKED_SCALES, _PACKED_FACTS = "_scales", "_packed"
_PARTS = ("q_proj", "k_proj", "v_proj")
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_PREFIX = "base_model.model."
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"
# Methods that train something else than A and B, or change the weights of the base. A value that is not false or empty
# means that the method is used.
_OTHER_ADAPTERS = (
    "alora_invocation_tokens", "arrow_config", "corda_config", "fan_in_fan_out", "kasa_config", "layer_replication",
    "lora_bias", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora",
    "use_qalora", "velora_config",
)  # fmt: skip
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # values of init_lora_weights that keep the base
_MAX_OPEN_FILES = 2  # a weight and its scale may be in different files; more would keep old shards in memory


@dataclass(frozen=True)
class StoredTensor:
    """The header entry of a tensor.

    Attributes:
        file: Name of the file that holds the tensor.
        shape: Stored shape.
        dtype: Name of the dtype in the safetensors format.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class _Index:
    """The keys of `model.safetensors.index.json` that are read: the file of each tensor."""

    weight_map: dict[str, str]


class CheckpointReader:
    """The tensors of one folder, with the changes of an adapter if there is one.

    Args:
        folder: The folder.
        adapter: The adapter.
        packing: The format of packed weights, if the folder's config states one.

    Raises:
        CheckpointError: A file is missing, truncated or inconsistent.
    """

    def __init__(self, folder: Path, adapter: "Adapter | None" = None, packing: Packing | None = None):
        self.folder = Path(folder)
        self.adapter = adapter
        self.packing = packing
        self.stored = read_headers(self.folder)
        self._open: dict[str, Any] = {}

    def names(self) -> set[str]:
        """Return the names of logical weights, and of scales without their weight. A fused q/k/v has three names."""
        names = {name for name in self.stored if not self._is_scale(name)}
        fused = {name for name in names if ".qkv_proj." in name}
        return (names - fused) | {name.replace("qkv_proj", part) for name in fused for part in _PARTS}

    def _is_scale(self, name: str) -> bool:
        suffixes = (_SCALE, _PACKED_SCALES, _PACKED_FACTS) if self.packing else (_SCALE,)
        return any(name.endswith(suffix) and name.removesuffix(suffix) in self.stored for suffix in suffixes)

    def _is_packed(self, name: str) -> bool:
        return self.packing is not None and name in self.stored and self.stored[name].dtype == _PACKED_DTYPE

    def _packed_facts(self, name: str) -> tuple[tuple[int, int], int] | None:
        """Return shape and checksum of a packed matrix; None if they are not stored."""
        stored = self.stored.get(name + _PACKED_FACTS)
        if stored is None or stored.dtype != "I64" or stored.shape != (3,):
            return None
        rows, columns, checksum = self._tensor(name + _PACKED_FACTS).tolist()
        return (rows, columns), checksum

    def names_by_file(self, names: set[str]) -> Iterator[str]:
        """Yield `names` grouped by file, so that reading in this order streams shard by shard."""
        return iter(sorted(names, key=lambda name: (self._stored(name).file, name)))

    def shape(self, name: str, config: ModelConfig) -> tuple[int, ...]:
        """Return the shape of a logical tensor."""
        if self._is_packed(name) and (facts := self._packed_facts(name)):
            return facts[0]
        if name in self.stored:
            return self.stored[name].shape
        return (_rows_by_part(_attention_of(name, config))[_part(name)], *self._stored(name).shape[1:])

    def problem(self, name: str, config: ModelConfig) -> str | None:
        """Return the reason why the tensor cannot be read, according to the headers; None if it can."""
        physical = self._physical(name)
        stored, scale_name = self.stored[physical], physical + _SCALE
        if self._is_packed(physical):
            return self._packed_problem(physical)
        if stored.dtype not in (*_FLOAT_DTYPES, _FP8_DTYPE):
            readable = ", ".join([*sorted(_FLOAT_DTYPES), _FP8_DTYPE])
            return f"{name} in {stored.file} has dtype {stored.dtype}; supported are {readable}"
        if stored.dtype == _FP8_DTYPE and scale_name not in self.stored:
            return f"{name} in {stored.file} is {_FP8_DTYPE} without {name}{_SCALE}"
        if stored.dtype != _FP8_DTYPE and scale_name in self.stored:
            return f"{name} in {stored.file} is {stored.dtype}, but there is a {scale_name} for {_FP8_DTYPE} codes"
        if _part(name) in _PARTS:
            if physical == name and name.replace(_part(name), "qkv_proj") in self.stored:
                return f"{name} exists, and also a fused qkv_proj that contains it"
            if physical != name and (problem := self._fused_problem(name, physical, config)):
                return problem
        return self._scale_problem(physical, config) if scale_name in self.stored else None

    def _packed_problem(self, name: str) -> str | None:
        assert self.packing is not None
        file, facts, scales = self.stored[name].file, self._packed_facts(name), self.stored.get(name + _PACKED_SCALES)
        if facts is None:
            return f"{name} in {file} is packed, but there is no {name}{_PACKED_FACTS} with its shape and checksum"
        if scales is None or scales.dtype != "F32":
            return f"{name} in {file} is packed, but there is no {name}{_PACKED_SCALES} in F32"
        if min(facts[0]) < 1 or (self.stored[name].shape, scales.shape) != self.packing.shapes(*facts[0]):
            return (
                f"{name} in {file} has codes {list(self.stored[name].shape)} and scales {list(scales.shape)}; those of "
                f"a {self.packing.format} matrix {list(facts[0])} with the stages and scales of quantization_config "
                "differ"
            )
        return None

    def _packed(self, name: str) -> Packed:
        """Return a packed matrix. Raises CheckpointError if its codes or scales are corrupt."""
        facts = self._packed_facts(name)
        assert self.packing is not None and facts is not None, "checked before"
        codes, scales = self._tensor(name), self._tensor(name + _PACKED_SCALES)
        weight = Packed(codes[None], scales[None], self.packing, facts[0])
        problem = weight.problem()
        if problem is None and packed_checksum(codes) != facts[1]:
            problem = f"the codes do not have the checksum in {name}{_PACKED_FACTS}"
        if problem:
            raise CheckpointError(
                f"{self.folder}: {name} is corrupt ({problem}). Copy or convert the checkpoint again."
            )
        return weight

    def _fused_problem(self, name: str, physical: str, config: ModelConfig) -> str | None:
        spec, ranks = _attention_of(name, config), config.qkv_ranks
        parts = _rows_by_part(spec)
        rows = self.stored[physical].shape[:1]
        if rows != (sum(parts.values()),):
            return f"{physical} has {list(rows)} rows, but q, k and v have {sum(parts.values())}"
        if any(count % ranks for count in parts.values()):
            return f"{physical} cannot be split by rank: {ranks} ranks do not divide its {list(parts.values())} rows"
        return None

    def _scale_problem(self, name: str, config: ModelConfig) -> str | None:
        shape, scale = self.stored[name].shape, self.stored[name + _SCALE]
        if scale.dtype not in _FLOAT_DTYPES:
            return f"{name}{_SCALE} in {scale.file} has dtype {scale.dtype}; scales are floats"
        if ".k_proj." in name and self._has_rank_scales(name, config):
            v_scale = name.replace(".k_proj.", ".v_proj.") + _SCALE
            if v_scale not in self.stored:
                return f"{name}{_SCALE} has blocks that the values share, but there is no {v_scale}"
        if len(shape) == 2 and scale.shape in self._scale_shapes(name, config):
            return None
        return (
            f"{name}{_SCALE} has shape {list(scale.shape)}, which does not match the 128 x 128 blocks of {list(shape)}"
        )

    def _scale_shapes(self, name: str, config: ModelConfig) -> set[tuple[int, int]]:
        """Return the shapes that the scales of this FP8 matrix may have."""
        (rows, columns), ranks = self.stored[name].shape, config.qkv_ranks
        uniform, by_rank = num_fp8_blocks(rows), ranks * num_fp8_blocks(rows // ranks)
        allowed = {uniform}
        if ".qkv_proj." in name:
            allowed = {by_rank}
        elif ".k_proj." in name and rows % ranks == 0:
            allowed = {uniform, by_rank}
        elif ".v_proj." in name and rows % ranks == 0 and self._has_rank_scales(name, config):
            # Of the blocks of the common slice [K_r | V_r], those that begin with V rows are stored with V.
            key_rows = self.stored[name.replace(".v_proj.", ".k_proj.")].shape[0] // ranks
            allowed = {ranks * (num_fp8_blocks(key_rows + rows // ranks) - num_fp8_blocks(key_rows))}
        return {(blocks, num_fp8_blocks(columns)) for blocks in allowed}

    def _has_rank_scales(self, name: str, config: ModelConfig) -> bool:
        """Return whether the keys and values of this layer are quantized per rank."""
        k_name = name.replace(_part(name), "k_proj")
        weight, scale = self.stored.get(k_name), self.stored.get(k_name + _SCALE)
        if weight is None or scale is None or not weight.shape or not scale.shape:
            return False
        return has_fp8_rank_scales(scale.shape[0], config.qkv_ranks, weight.shape[0])

    def read(self, name: str, config: ModelConfig) -> torch.Tensor:
        """Return a logical tensor in its stored dtype, or float32 if it was quantized."""
        weight = self.read_weight(name, config)
        return weight if isinstance(weight, torch.Tensor) else weight.dequantize(torch.float32)

    def read_part(self, name: str, config: ModelConfig, box: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return a part of a logical tensor; the file is read only there, if the tensor is stored as it is.

        Args:
            name: The name of the tensor.
            config: The model.
            box: A range of indices of each dimension.
        """
        index = tuple(slice(start, stop) for start, stop in box)
        is_plain = name in self.stored and self.stored[name].dtype in _FLOAT_DTYPES
        if not is_plain or self.adapter is not None:
            return self.read(name, config)[index]
        return self._tensor(name, index)

    def read_weight(self, name: str, config: ModelConfig) -> Weight:
        """Return a logical tensor in its stored dtype, or its codes and scales if it is quantized.

        A tensor that the adapter changes is in float32.
        """
        weight = self._read_weight(name, config)
        return weight if self.adapter is None else self.adapter.merged(name, weight)

    def _read_weight(self, name: str, config: ModelConfig) -> Weight:
        physical = self._physical(name)
        if physical != name:
            spec, ranks, fused = _attention_of(name, config), config.qkv_ranks, self._weight(physical)
            if not isinstance(fused, BlockScaled):
                assert isinstance(fused, torch.Tensor), "packed weights are not fused"
                return split_fused(fused, spec, ranks)[_part(name)]
            return split_fp8_ranks(fused, list(_rows_by_part(spec).values()), ranks)[_PARTS.index(_part(name))]
        if _part(name) in ("k_proj", "v_proj") and self._has_rank_scales(name, config):
            k, v = (self._weight(name.replace(_part(name), part)) for part in ("k_proj", "v_proj"))
            assert isinstance(k, BlockScaled) and isinstance(v, BlockScaled)
            return split_fp8_rank_keys_values(k, v, config.qkv_ranks)[_part(name) == "v_proj"]
        return self._weight(name)

    def _weight(self, physical: str) -> Weight:
        """Return a stored tensor, or its codes and scales in the order of the file."""
        if self._is_packed(physical):
            return self._packed(physical)
        if physical + _SCALE not in self.stored:
            return self._tensor(physical)
        return BlockScaled(self._tensor(physical), self._scale(physical).float(), (FP8_BLOCK, FP8_BLOCK))

    def _physical(self, name: str) -> str:
        """Return the stored name that holds a logical tensor."""
        fused = name.replace(_part(name), "qkv_proj") if _part(name) in _PARTS else name
        return name if name in self.stored else fused

    def _stored(self, name: str) -> StoredTensor:
        return self.stored[self._physical(name)]

    def _tensor(self, name: str, index: tuple[slice, ...] | None = None) -> torch.Tensor:
        file = self.stored[name].file
        if file not in self._open:
            while len(self._open) >= _MAX_OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            self._open[file] = open_safetensors(self.folder / file)
        try:
            return self._open[file].get_tensor(name) if index is None else self._open[file].get_slice(name)[index]
        except SafetensorError as error:
            raise CheckpointError(f"{self.folder / file}: {name} cannot be read ({error}).") from error

    def _scale(self, name: str) -> torch.Tensor:
        """Return the scales of an FP8 matrix. Raises CheckpointError if one is negative or not finite."""
        scale = self._tensor(name + _SCALE)
        if not (torch.isfinite(scale) & (scale >= 0)).all():
            raise CheckpointError(f"{self.folder}: {name}{_SCALE} holds a negative value, an infinity or NaN.")
        return scale


def split_fused(tensor: torch.Tensor, spec: AttentionConfig, num_ranks: int) -> dict[str, torch.Tensor]:
    """Split a fused [ranks * (Q_r + K_r + V_r), D] matrix, whose slices hold a rank's heads, into q, k and v."""
    rows = [count // num_ranks for count in _rows_by_part(spec).values()]
    parts = tensor.unflatten(0, (num_ranks, sum(rows))).split(rows, dim=1)
    return {name: part.flatten(0, 1) for name, part in zip(_PARTS, parts, strict=True)}


def fuse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """Invert `split_fused`."""
    return torch.cat([part.unflatten(0, (num_ranks, -1)) for part in (q, k, v)], dim=1).flatten(0, 1)


def _rows_by_part(spec: AttentionConfig) -> dict[str, int]:
    """Return the number of rows of q, k and v of a layer."""
    return {
        "q_proj": spec.num_heads * spec.key_dim,
        "k_proj": spec.num_kv_heads * spec.key_dim,
        "v_proj": spec.num_kv_heads * spec.value_dim,
    }


def _attention_of(name: str, config: ModelConfig) -> AttentionConfig:
    prefix, _, rest = name.partition("layers.")
    if "mtp" in prefix:
        assert config.mtp is not None, "the weights have MTP heads"
        return config.mtp.attention
    return config.layers[int(rest.split(".")[0])].attention


def _part(name: str) -> str:
    """Return the name of the projection: `q_proj` of `….self_attn.q_proj.weight`."""
    return name.split(".")[-2] if "." in name else name


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Return the header entries of all tensors of a folder: of the files in its index, or of all safetensors files.

    Raises:
        CheckpointError: One error with all findings: files that are missing or damaged, tensors that two files hold,
            and entries of the index that name another file than the one that holds the tensor.
    """
    require_folder(folder)
    weight_map = _read_index(folder)
    names = set(weight_map.values()) if weight_map else {path.name for path in folder.glob("*.safetensors")}
    if not names:
        in_shards = (folder / "trainer" / "shards").is_dir()
        advice = f" It is a checkpoint in shards: `openmimo convert {folder} OUT` writes a model folder."
        raise CheckpointError(f"{folder} holds no *.safetensors file.{advice if in_shards else ''}")
    findings: list[str] = []
    stored: dict[str, StoredTensor] = {}
    for name in sorted(names):
        try:
            header = read_header(folder, name)
        except CheckpointError as error:
            findings.append(str(error))
            continue
        findings += [
            f"{folder} holds {tensor} twice, in {stored[tensor].file} and {name}; remove the file that is not of it."
            for tensor in sorted(header.keys() & stored.keys())
        ]
        stored |= header
    if weight_map and SINGLE not in names and (folder / SINGLE).exists():
        findings.append(f"{folder} holds {SINGLE}, which its index does not name. Remove the one that is out of date.")
    if not findings:
        findings = _contradictions(folder / INDEX, weight_map, stored)
    if findings:
        raise CheckpointError(listed(findings))
    return stored


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file and check its header and size. Raises CheckpointError."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). It is truncated or corrupt; copy it again.") from error


def _read_index(folder: Path) -> dict[str, str]:
    """Return the file of each tensor according to the index; empty if there is no index."""
    path = file_in_folder(folder, INDEX)
    if path is None:
        return {}
    weight_map = read_known_keys(_Index, read_json(path, CheckpointError), str(path), error=CheckpointError).weight_map
    if not weight_map:
        raise CheckpointError(f"the weight_map of {path} is empty.")
    return weight_map


def read_header(folder: Path, name: str) -> dict[str, StoredTensor]:
    """The header entries of a file in a checkpoint folder. Raises CheckpointError if it is missing or damaged."""
    path = file_in_folder(folder, name)
    if path is None:
        raise CheckpointError(f"{folder / name} is missing, but the checkpoint's index names it. Download it again.")
    with open_safetensors(path), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, _MAX_HEADER_BYTES)).decode("utf-8")
    # The library accepts a header with two tensors of one name and keeps the last; parse_json refuses duplicate keys.
    header = parse_json(text, f"the header of {path}", CheckpointError)
    header.pop("__metadata__", None)
    return {tensor: StoredTensor(name, tuple(entry["shape"]), entry["dtype"]) for tensor, entry in header.items()}


def _contradictions(index: Path, weight_map: dict[str, str], stored: dict[str, StoredTensor]) -> list[str]:
    lost = sorted(name for name in weight_map if name not in stored)
    findings = [f"{index} names {name} in {weight_map[name]}, but no file that it names holds it." for name in lost]
    findings += [
        f"{index} names {name} in {file}, but {stored[name].file} holds it."
        for name, file in weight_map.items()
        if name in stored and stored[name].file != file
    ]
    return findings


def packed_checksum(codes: torch.Tensor) -> int:
    """Return the CRC-32 of packed codes."""
    return zlib.crc32(codes.contiguous().numpy().tobytes())


def packed_entries(
    name: str, packing: Packing, matrix_shape: tuple[int, int], load: Callable[[], Packed]
) -> "list[Entry]":
    """Return the tensors of a packed matrix. `load` returns it, and is called for each of them."""
    codes_shape, scales_shape = packing.shapes(*matrix_shape)

    def facts() -> torch.Tensor:
        return torch.tensor([*matrix_shape, packed_checksum(load().codes[0].cpu())])

    return [
        Entry(name, codes_shape, torch.uint8, lambda: load().codes[0]),
        Entry(name + _PACKED_SCALES, scales_shape, torch.float32, lambda: load().scales[0]),
        Entry(name + _PACKED_FACTS, (3,), torch.int64, facts),
    ]


_BYTES = {
    torch.float32: 4, torch.float64: 8, torch.bfloat16: 2, torch.float16: 2, torch.float8_e4m3fn: 1, torch.uint8: 1,
    torch.int64: 8,
}  # fmt: skip
DEFAULT_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        name: Name in the checkpoint.
        shape: Shape on disk.
        dtype: Dtype on disk.
        load: Returns the data; called when the tensor is written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return _BYTES[self.dtype] * torch.Size(self.shape).numel()


def write_shards(
    folder: Path,
    entries: list[Entry],
    *,
    max_shard_bytes: int,
    on_tensor: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """Write `entries` to one `model.safetensors`, or to numbered shards with an index; at most one shard is in memory.

    Args:
        folder: An existing folder.
        entries: The tensors, in the order of the files.
        max_shard_bytes: Size limit of a file. A larger tensor gets a file to itself.
        on_tensor: Called with the bytes of each tensor after it is loaded, for a progress bar.
    """
    shards = list(_fill_shards(entries, max_shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for entry in shard:
            tensors[entry.name] = entry.load().to(device="cpu", dtype=entry.dtype).contiguous()
            weight_map[entry.name] = file
            on_tensor(entry.num_bytes)
        with umask_mode(folder / file):
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(entry.num_bytes for entry in entries)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextlib.contextmanager
def umask_mode(path: Path) -> Iterator[None]:
    """Give a file that the block writes the mode of the umask; safetensors makes files readable by their owner only."""
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(mode)


def _fill_shards(entries: list[Entry], max_shard_bytes: int) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.num_bytes > max_shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.num_bytes
    if shard:
        yield shard


# --- adapters ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _AdapterConfig:
    """The keys of `adapter_config.json` that are read.

    Attributes:
        peft_type: LORA.
        r: Rank of the matrices.
        lora_alpha: The scale is this divided by the rank, or by its square root with `use_rslora`.
        use_rslora: See `lora_alpha`.
        alpha_pattern: Values of `lora_alpha` for modules, by the ends of their names.
    """

    peft_type: str
    r: int
    lora_alpha: float
    use_rslora: bool = False
    alpha_pattern: dict[str, float] = field(default_factory=dict)


class Adapter:
    """A LoRA adapter in peft's format, which is merged into weights while they are read.

    A folder of peft's `save_pretrained` holds `adapter_config.json`, which names the folder of the base model, and
    `adapter_model.safetensors`. For a weight W of the base it holds A and B; the merged weight is W + scale * B @ A
    (Hu et al. 2021, https://arxiv.org/abs/2106.09685). Its other tensors replace those of the base (`modules_to_save`).

    O output dim, D input dim, R rank.

    Args:
        folder: The folder of the adapter.

    Raises:
        CheckpointError: A file is missing or damaged, or the adapter is of a kind that cannot be merged.
    """

    def __init__(self, folder: Path):
        self._path = folder / _ADAPTER_WEIGHTS
        where = str(folder / ADAPTER_CONFIG)
        values = read_json(folder / ADAPTER_CONFIG, CheckpointError)
        self._config = read_known_keys(_AdapterConfig, values, where, error=CheckpointError)
        _check_adapter_kind(values, where)
        if file_in_folder(folder, _ADAPTER_WEIGHTS) is None:
            raise CheckpointError(f"{folder} holds no {_ADAPTER_WEIGHTS}; save the adapter with safetensors.")
        self._stored: dict[str, StoredTensor] = read_header(folder, _ADAPTER_WEIGHTS)
        self._file = open_safetensors(self._path)

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError for tensors that do not fit a base whose weights have these shapes."""
        findings = []
        for stored_name, entry in self._stored.items():
            name = _base_name(stored_name)
            if name not in shapes:
                findings.append(f"{stored_name} belongs to no weight of the base model.")
            elif stored_name.endswith(_LORA_A):
                other = self._stored.get(stored_name.removesuffix(_LORA_A) + _LORA_B)
                if (
                    other is None
                    or other.shape[1:] != entry.shape[:1]
                    or other.shape[:1] + entry.shape[1:] != shapes[name]
                ):
                    findings.append(
                        f"{stored_name} and {_LORA_B[1:]} do not form a matrix of shape {list(shapes[name])}."
                    )
            elif stored_name.endswith(_LORA_B):
                if stored_name.removesuffix(_LORA_B) + _LORA_A not in self._stored:
                    findings.append(f"{stored_name} lacks its {_LORA_A[1:]}.")
            elif entry.shape != shapes[name]:
                findings.append(f"{stored_name} has shape {list(entry.shape)}, the base model {list(shapes[name])}.")
        if findings:
            raise CheckpointError(f"{self._path} does not fit its base model: {listed(findings)}")

    def merged(self, name: str, weight: Weight) -> Weight:
        """A weight of the base with the adapter's change, in float32; the weight itself if there is no change."""
        module = _ADAPTER_PREFIX + name.removesuffix(".weight")
        if _ADAPTER_PREFIX + name in self._stored:
            return self._file.get_tensor(_ADAPTER_PREFIX + name)
        if module + _LORA_A not in self._stored:
            return weight
        plain = dequantized(weight, torch.float32)
        a_RD, b_OR = (self._file.get_tensor(module + part).float() for part in (_LORA_A, _LORA_B))
        return plain + self._scale(name.removesuffix(".weight"), rank=len(a_RD)) * (b_OR @ a_RD)

    def _scale(self, module: str, *, rank: int) -> float:
        patterns = self._config.alpha_pattern
        found = next((name for name in patterns if f".{module}".endswith(f".{name}")), None)
        alpha = self._config.lora_alpha if found is None else patterns[found]
        return alpha / (math.sqrt(rank) if self._config.use_rslora else rank)


def _is_product(shape: tuple[int, ...], left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    """Whether matrices of the shapes `left` and `right` have a product of this shape."""
    return len(left) == len(right) == 2 and left[1] == right[0] and shape == (left[0], right[1])


def _base_name(stored_name: str) -> str:
    """The name of the base's weight that a tensor of the adapter changes."""
    name = stored_name.removeprefix(_ADAPTER_PREFIX)
    for part in (_LORA_A, _LORA_B):
        if name.endswith(part):
            return name.removesuffix(part) + ".weight"
    return name


def _check_adapter_kind(values: dict[str, Any], where: str) -> None:
    if values["peft_type"] != "LORA":
        raise CheckpointError(f"{where}: peft_type is {values['peft_type']!r}; only LORA adapters can be loaded.")
    used = [name for name in _OTHER_ADAPTERS if values.get(name)]
    if values.get("bias", "none") != "none":
        used.append("bias")
    if values.get("init_lora_weights", True) not in _PLAIN_STARTS:
        used.append("init_lora_weights")
    if any(re.search(r"[^\w.]", name) for name in values.get("alpha_pattern") or ()):
        used.append("regular expressions in alpha_pattern")
    if used:
        raise CheckpointError(
            f"{where}: adapters with {', '.join(used)} cannot be loaded; merge it with peft (merge_and_unload) and "
            "save the model."
        )
