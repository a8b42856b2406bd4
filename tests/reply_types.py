"""Strict validation of replies against the types of a client's package, for tests."""

import functools
from typing import Any

import pydantic


@functools.cache  # building one takes longer than a request
def _adapter(kind: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(kind)


def check_type(kind: Any, value: Any) -> None:
    """Fail unless `value`, parsed JSON, has the type: no conversion of types, and every value one of those allowed.

    Fields that the type does not have are allowed: both packages keep them for the caller.
    """
    _adapter(kind).validate_python(value, strict=True)
