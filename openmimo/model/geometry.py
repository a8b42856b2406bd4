"""Geometry of one attention layer, without torch. `config.py` combines layers into a model."""

from dataclasses import dataclass
from typing import Annotated

from openmimo.core.fields import Bounds, NonNegativeInt, check_fields

# The upper bounds are far above every published model. They refuse an impossible config before a tensor is described,
# and no product of sizes overflows 64 bits.
Size = Annotated[int, Bounds(least=1, most=1 << 20)]
HeadCount = Annotated[int, Bounds(least=1, most=1 << 16)]
Positions = Annotated[int, Bounds(least=1, most=1 << 31)]
RopeTheta = Annotated[float, Bounds(least=1, most=1e15)]


@dataclass(frozen=True)
class AttentionConfig:
    """Geometry of one attention layer.

    Attributes:
        kind: Name of a file in `openmimo/model/attention`, or `package.module:Object`.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        key_dim: Dims of a query and a key.
        value_dim: Dims of a value.
        rotary_dim: Number of leading dims of queries and keys that are rotated.
        rope_theta: RoPE base.
        window_keys: Keys that a query sees, its own included (None for full attention).
        sink: Whether each query head has a learned sink logit, which takes probability and has no value.
        kv_from: Index of the earlier layer whose keys and values this layer reads (None: its own).
        score_block: Keys of a block, if the layer stores block scores in the context for a later layer (None: no
            scores).
    """

    kind: str
    num_heads: HeadCount
    num_kv_heads: HeadCount
    key_dim: Size
    value_dim: Size
    rotary_dim: Size
    rope_theta: RopeTheta
    window_keys: Positions | None = None
    sink: bool = False
    kv_from: NonNegativeInt | None = None
    score_block: Size | None = None

    def __post_init__(self) -> None:
        check_fields(self, f"attention {self.kind!r}")
