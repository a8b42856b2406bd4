"""Building blocks of request models: strict and lenient objects, bounded texts, tagged unions.

A strict object rejects an unknown field by name. Validation stops at the first error of each list, and a value of a
union type is validated as one member only, so that a hostile body produces few errors. Tags of unions are written
<like this>, to distinguish them from fields.
"""

import functools
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, model_validator
from pydantic_core import PydanticCustomError

from openmimo.engine.server.http import limits

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Probability = Annotated[float, Field(gt=0.0, le=1.0)]
Penalty = Annotated[float, Field(ge=-2.0, le=2.0)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(max_length=limits.SHORT_CHARACTERS)]
Label = Annotated[str, Field(max_length=limits.LABEL_CHARACTERS)]
_MEDIA = ("image", "file", "audio", "video", "document")
StopText = Annotated[str, Field(min_length=1, max_length=limits.STOP_CHARACTERS)]


def few_entries(most: int) -> BeforeValidator:
    """Limit an object to `most` entries, which are counted before any is validated."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"it has {len(value)} entries; at most {most} are allowed.")
        return value

    return BeforeValidator(check)


def text_or(tag: str) -> Discriminator:
    """Select the union member <text> for a string and the member `tag` for any other value."""
    return Discriminator(lambda value: "<text>" if isinstance(value, str) else tag)


@functools.cache
def _field_names(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(field.alias or name for name, field in model.model_fields.items())


class Fields(BaseModel):
    """A JSON object without unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _knows_every_field(cls, value: Any) -> Any:
        # pydantic would report each unknown field, and a body may contain a hundred thousand of them.
        if isinstance(value, dict):
            known = _field_names(cls)
            for name in value:
                if name not in known:
                    raise PydanticCustomError("unknown_field", "unknown", {"name": name})
        return value


class LenientFields(BaseModel):
    """A JSON object that clients return as they received it, so unknown fields (refusal, annotations) are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


def check_is_text(part: Any) -> None:
    """Raise an error that says so if a part of a message is an image, a file or a sound."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and (name := next((name for name in _MEDIA if name in kind), None)) is not None:
        raise PydanticCustomError(
            "not_text", "this model reads text only; {name} input is not supported.", {"name": name}
        )
