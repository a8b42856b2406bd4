"""Strict validation of replies against the types of a client's package, for tests."""

from typing import Any

import pydantic


def check_type(kind: Any, value: Any) -> None:
    """Fail unless `value`, parsed JSON, has the type: no conversion of types, and every value one of those allowed.

    Fields that the type does not have are allowed: both packages keep them for the caller.
    """
    pydantic.TypeAdapter(kind).validate_python(value, strict=True)
