"""Reading a checkpoint folder in the Hugging Face layout, tensor by tensor, whatever its storage.

The reader shows *logical* tensors: split q, k and v in a plain dtype. Behind them the folder may hold one file or many,
FP8 codes and scales (in different files, too), or q, k and v fused by rank (`attention_projection_layout: fused_qkv`).
Everything that can be found wrong from the files' headers is found before the first tensor is read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from openmimo.core.config import read_json
from openmimo.core.errors import CheckpointError
from openmimo.model import fp8
from openmimo.model.config import AttentionConfig, ModelConfig

_FLOAT_DTYPES = {"F64", "F32", "BF16", "F16"}
_SCALE = "_scale_inv"
_MAX_OPEN_FILES = 2  # a weight and its scale may lie in different files; more would keep old shards in memory


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class CheckpointReader:
    """The tensors of one folder. Raises CheckpointError for a missing, truncated or inconsistent file."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.stored = _read_headers(self.folder)
        self._open: dict[str, safe_open] = {}

    def names(self) -> set[str]:
        """Names of the weights, without scales; a fused q/k/v counts as three."""
        names = {name for name in self.stored if not name.endswith(_SCALE)}
        fused = {name for name in names if ".qkv_proj." in name}
        return (names - fused) | {
            name.replace("qkv_proj", part) for name in fused for part in ("q_proj", "k_proj", "v_proj")
        }

    def names_by_file(self, names: set[str]) -> Iterator[str]:
        """`names`, grouped by the file that holds them, so that reading in this order streams shard by shard."""
        return iter(sorted(names, key=lambda name: (self._stored(name).file, name)))

    def shape(self, name: str, config: ModelConfig) -> tuple[int, ...]:
        """Shape of a logical tensor."""
        if name in self.stored:
            return self.stored[name].shape
        spec, part, tail = _attention_of(name, config), _part(name), self._stored(name).shape[1:]
        rows = {"q_proj": spec.num_heads * spec.key_dim, "k_proj": spec.num_kv_heads * spec.key_dim}
        return (rows.get(part, spec.num_kv_heads * spec.value_dim), *tail)

    def problem(self, name: str, config: ModelConfig) -> str | None:
        """What forbids reading this tensor, found from its header; None if nothing does."""
        stored = self._stored(name)
        has_scale = self._physical(name) + _SCALE in self.stored
        if stored.dtype == "F8_E4M3":
            if not has_scale:
                return f"{name} in {stored.file} is F8_E4M3 without {name}{_SCALE}"
            return self._scale_problem(self._physical(name), config)
        if stored.dtype not in _FLOAT_DTYPES:
            readable = ", ".join([*sorted(_FLOAT_DTYPES), "F8_E4M3"])
            return f"{name} in {stored.file} has dtype {stored.dtype}; readable are {readable}"
        return None

    def _scale_problem(self, name: str, config: ModelConfig) -> str | None:
        (rows, columns), scale = self.stored[name].shape, self.stored[name + _SCALE].shape
        ranks = config.qkv_ranks
        allowed = {fp8.num_blocks(rows)}
        if ".qkv_proj." in name or ".k_proj." in name:
            allowed.add(ranks * fp8.num_blocks(rows // ranks))
        if ".v_proj." in name:  # per rank, V has the blocks that K leaves of their common slice
            key_rows = self.stored[name.replace(".v_proj.", ".k_proj.")].shape[0] // ranks
            allowed.add(ranks * (fp8.num_blocks(key_rows + rows // ranks) - fp8.num_blocks(key_rows)))
        if scale[1:] == (fp8.num_blocks(columns),) and scale[0] in allowed:
            return None
        return f"{name}{_SCALE} has shape {list(scale)}, which are not the 128 x 128 blocks of {[rows, columns]}"

    def read(self, name: str, config: ModelConfig) -> torch.Tensor:
        """A logical tensor in its stored dtype, or float32 if it was FP8."""
        physical = self._physical(name)
        if physical != name:
            return self._read_fused(name, physical, config)
        if name + _SCALE not in self.stored:
            return self._tensor(name)
        if name.endswith((".k_proj.weight", ".v_proj.weight")):
            return self._read_key_value(name, config)
        return fp8.dequantise(self._tensor(name), self._tensor(name + _SCALE))

    def _read_key_value(self, name: str, config: ModelConfig) -> torch.Tensor:
        k_name, v_name = (name.replace(_part(name), part) for part in ("k_proj", "v_proj"))
        ranks = config.qkv_ranks
        k_scale_name, v_scale_name = k_name + _SCALE, v_name + _SCALE
        if k_scale_name not in self.stored or v_scale_name not in self.stored:
            raise CheckpointError(f"{self.folder}: of {k_name} and {v_name} only one has a scale ({_SCALE}).")
        rows = self.stored[k_name].shape[0]
        if not fp8.has_rank_scales(self.stored[k_scale_name].shape[0], ranks, rows):
            return fp8.dequantise(self._tensor(name), self._tensor(name + _SCALE))
        k, v = fp8.dequantise_rank_keys_values(
            self._tensor(k_name), self._tensor(v_name), self._tensor(k_scale_name), self._tensor(v_scale_name), ranks
        )
        return k if name == k_name else v

    def _read_fused(self, name: str, physical: str, config: ModelConfig) -> torch.Tensor:
        spec, ranks = _attention_of(name, config), config.qkv_ranks
        tensor = self._tensor(physical)
        if physical + _SCALE in self.stored:
            tensor = fp8.dequantise_ranks(tensor, self._tensor(physical + _SCALE), ranks)
        return split_fused(tensor, spec, ranks)[_part(name)]

    def _physical(self, name: str) -> str:
        """The stored name that holds a logical tensor."""
        fused = name.replace(_part(name), "qkv_proj") if _part(name) in ("q_proj", "k_proj", "v_proj") else name
        return name if name in self.stored else fused

    def _stored(self, name: str) -> StoredTensor:
        return self.stored[self._physical(name)]

    def _tensor(self, name: str) -> torch.Tensor:
        file = self.stored[name].file
        if file not in self._open:
            while len(self._open) >= _MAX_OPEN_FILES:
                self._open.pop(next(iter(self._open)))
            self._open[file] = _open_file(self.folder / file)
        return self._open[file].get_tensor(name)


def split_fused(tensor: torch.Tensor, spec: AttentionConfig, num_ranks: int) -> dict[str, torch.Tensor]:
    """A fused [ranks * (Q_r + K_r + V_r), D] matrix as q, k and v: a rank's slice holds its heads of all three."""
    rows = [
        spec.num_heads * spec.key_dim // num_ranks,
        spec.num_kv_heads * spec.key_dim // num_ranks,
        spec.num_kv_heads * spec.value_dim // num_ranks,
    ]
    parts = tensor.unflatten(0, (num_ranks, sum(rows))).split(rows, dim=1)
    return {name: part.flatten(0, 1) for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True)}


def fuse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """The inverse of `split_fused`."""
    return torch.cat([part.unflatten(0, (num_ranks, -1)) for part in (q, k, v)], dim=1).flatten(0, 1)


def _attention_of(name: str, config: ModelConfig) -> AttentionConfig:
    head, _, rest = name.partition("layers.")
    return config.mtp.attention if "mtp" in head else config.layers[int(rest.split(".")[0])].attention


def _part(name: str) -> str:
    """The projection of `….self_attn.q_proj.weight`: `q_proj`."""
    return name.split(".")[-2] if "." in name else name


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; a checkpoint is a folder with config.json and *.safetensors.")
    index = folder / "model.safetensors.index.json"
    weight_map = read_json(index)["weight_map"] if index.exists() else None
    files = (
        sorted(set(weight_map.values())) if weight_map else sorted(path.name for path in folder.glob("*.safetensors"))
    )
    if not files:
        raise CheckpointError(f"{folder} holds no *.safetensors file.")
    stored: dict[str, StoredTensor] = {}
    for file in files:
        with _open_file(folder / file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                piece = tensors.get_slice(name)
                stored[name] = StoredTensor(file, tuple(piece.get_shape()), piece.get_dtype())
    lost = sorted(name for name in weight_map or {} if name not in stored)
    if lost:
        raise CheckpointError(
            f"{index} names {len(lost)} tensors that its files do not hold, such as {', '.join(lost[:5])}."
        )
    return stored


def _open_file(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing, but the checkpoint's index names it. Download it again.") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). It is truncated or corrupt; copy it again.") from error
