"""Geometry of one attention layer, without torch. `config.py` puts layers together to a model."""

from dataclasses import dataclass
from typing import Annotated

from openmimo.core.fields import Bounds, NonNegativeInt, check_fields

# The largest values are far above every published model: an impossible one is refused before a tensor is described, and
# no product of them overflows 64 bits.
Size = Annotated[int, Bounds(least=1, most=1 << 20)]
HeadCount = Annotated[int, Bounds(least=1, most=1 << 16)]
Positions = Annotated[int, Bounds(least=1, most=1 << 31)]
RopeTheta = Annotated[float, Bounds(least=1, most=1e15)]


@dataclass(frozen=True)
class AttentionConfig:
    """Geometry of one attention layer.

    Attributes:
        kind: A file in `openmimo/model/attention`, or `package.module:Object`.
        num_heads: Query heads.
        num_kv_heads: Key/value heads.
        key_dim: Dims of a query and a key.
        value_dim: Dims of a value.
        rotary_dim: The leading dims of query and key that are rotated.
        rope_theta: RoPE base.
        window_keys: How many keys a query sees, itself included (None for full attention).
        sink: A learned logit per query head that takes probability and gives no value.
        kv_from: Number of the earlier layer whose keys and values this layer reads (None: its own).
        score_block: Keys of a block, of a layer that leaves block scores in the context for a later layer (None: it
            leaves none).
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
