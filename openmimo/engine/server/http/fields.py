"""Building blocks of request models: strict and lenient objects, bounded texts, tagged unions.

An object of known fields ignores and reports unknown ones, or rejects them by name. Validation stops at the first error
of each list, and a value of a union type is validated as one member only, so that a hostile body produces few errors.
Tags of unions are written <like this>, to distinguish them from fields.
"""

import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from openmimo.engine.server.http import limits
from openmimo.engine.server.http.limits import shortened

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


# Fields of other APIs and servers that may be ignored without notice. They are hints about style, speed or caching, or
# they state what this server does anyway.
_HARMLESS = frozenset(
    {
        "add_special_tokens",
        "cache_control",
        "client_metadata",
        "prediction",
        "request_id",
        "spaces_between_special_tokens",
        "verbosity",
    }
)


class IgnoredFields:
    """The unknown fields that a validation has ignored, in order of occurrence. Only the first of many are kept."""

    def __init__(self) -> None:
        self.found: list[tuple[dict[str, Any], str]] = []

    def add(self, owner: dict[str, Any], name: str) -> None:
        """Record the unknown field `name` of the object `owner`."""
        if len(self.found) < limits.IGNORED_FIELDS:
            self.found.append((owner, name))

    def paths(self, body: Any) -> tuple[str, ...]:
        """The distinct paths of the fields in `body`, such as tools[].function.example."""
        names: dict[int, list[str]] = {}
        for owner, name in self.found:
            names.setdefault(id(owner), []).append(shortened(name, limits.PATH_CHARACTERS))
        paths: dict[str, None] = {}
        level = [("", body)]
        num_visited = 0
        while level and names and num_visited < limits.SCHEMA_VALUES:
            num_visited += len(level)
            for path, value in level:
                paths.update(dict.fromkeys(f"{path}{name}" for name in names.pop(id(value), ())))
            level = [inner for path, value in level for inner in _inside(path, value)]
        paths.update(dict.fromkeys(name for left in names.values() for name in left))
        return tuple(paths)


def _inside(path: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"{path}{name}.", inner) for name, inner in value.items() if isinstance(inner, dict | list)]
    if isinstance(value, list):
        prefix = f"{path.removesuffix('.')}[]."
        return [(prefix, inner) for inner in value if isinstance(inner, dict | list)]
    return []


class Fields(BaseModel):
    """A JSON object of known fields.

    Unknown fields are rejected, or ignored and reported if the validation's context is an `IgnoredFields`. An unknown
    field that is null counts as absent.

    Attributes:
        unsupported: Known fields that this server cannot obey, with advice. Only false and empty values are accepted.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
    unsupported: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _knows_every_field(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would report each unknown field, and a body may contain a hundred thousand of them.
        if not isinstance(value, dict) or value.keys() <= _field_names(cls):
            return value
        known = _field_names(cls)
        ignored = info.context
        for name, given in value.items():
            if name in known or given is None or name in _HARMLESS:
                continue
            if name in cls.unsupported:
                if given:
                    raise PydanticCustomError(
                        "unsupported_field", "unsupported", {"name": name, "advice": cls.unsupported[name]}
                    )
            elif isinstance(ignored, IgnoredFields):
                ignored.add(value, name)
            else:
                raise PydanticCustomError("unknown_field", "unknown", {"name": name})
        return {name: given for name, given in value.items() if name in known}


class LenientFields(BaseModel):
    """A JSON object that clients return as they received it, so unknown fields (refusal, annotations) are ignored."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


def check_is_text(part: Any) -> None:
    """Raise an error that says so if a part of a message is an image, a file or a sound."""
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and (name := next((name for name in _MEDIA if name in kind), None)) is not None:
        raise PydanticCustomError(
            "not_text", "this endpoint reads text only; {name} input is not supported.", {"name": name}
        )
