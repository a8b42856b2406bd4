"""Types and bounds of configuration fields."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from openmimo.core.config import from_dict, to_dict
from openmimo.core.errors import ConfigError
from openmimo.core.fields import Bounds, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, check_fields


@dataclass(frozen=True)
class Inner:
    rate: PositiveFloat = 0.5

    def __post_init__(self):
        check_fields(self, "inner")


@dataclass(frozen=True)
class Outer:
    steps: PositiveInt
    share: Fraction = 0.5
    limit: NonNegativeFloat | None = None
    mode: Literal["a", "b"] = "a"
    flag: bool = False
    names: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 2.0)
    biases: Mapping[int, float] = field(default_factory=dict)
    number: int | float | str = 0
    inner: Inner = Inner()
    options: dict[str, Any] = field(default_factory=dict)
    betas: tuple[Annotated[float, Bounds(least=0, below=1)], ...] = (0.9,)

    def __post_init__(self):
        check_fields(self, "outer")


WRONG = [
    ("steps", 0, "at least 1"),
    ("steps", 1.5, "type int"),
    ("steps", True, "type int"),
    ("steps", "3", "type int"),
    ("steps", None, "type int"),
    ("share", 1.01, "at most 1"),
    ("share", float("nan"), "finite"),
    ("limit", float("inf"), "finite"),
    ("limit", 10**400, "finite"),
    ("limit", -1, "at least 0"),
    ("mode", "c", "one of 'a', 'b'"),
    ("flag", "false", "type bool"),
    ("flag", 1, "type bool"),
    ("names", "abc", "a list"),
    ("names", ["a", 5], r"names\[1\]"),
    ("pair", (1,), "2 entries"),
    ("pair", (1, "x"), r"pair\[1\]"),
    ("biases", {"5": 1.0}, r"a key of [\w.]+biases"),
    ("biases", {5: float("nan")}, "finite"),
    ("inner", {"rate": 0}, "above 0"),
    ("inner", {"rat": 1}, "did you mean 'rate'"),
    ("betas", (0.9, 1.0), r"betas\[1\] is 1.0; it must be at least 0 and below 1"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG, ids=lambda value: str(value)[:24])
def test_a_value_that_does_not_fit_is_refused_by_name(name, value, message):
    with pytest.raises(ConfigError, match=message) as refused:
        Outer(**{"steps": 1, name: value})
    assert name in str(refused.value) or name == "inner"
    with pytest.raises(ConfigError, match=message):
        from_dict(Outer, {"steps": 1, name: value}, "file.json")


def test_values_are_normalized():
    made = Outer(
        steps=np.int64(3), share=np.float32(0.25), limit=2, names=["a"], pair=[1, 2], biases={np.int32(5): 1}, number=3
    )
    assert made == Outer(3, 0.25, 2.0, names=("a",), pair=(1, 2.0), biases={5: 1.0}, number=3)
    assert type(made.steps) is int
    assert type(made.limit) is float
    assert type(made.number) is int


def test_a_config_survives_json():
    made = Outer(3, limit=1.0, names=("a", "b"), inner=Inner(0.1), options={"any": [1, {"thing": None}]})
    assert from_dict(Outer, to_dict(made)) == made


def test_a_missing_field_is_named():
    with pytest.raises(ConfigError, match="file.json lacks 'steps'"):
        from_dict(Outer, {}, "file.json")
