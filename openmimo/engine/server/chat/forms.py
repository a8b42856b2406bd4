"""Checks of complete replies for what a form demands and a grammar cannot express: `uniqueItems`."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from openmimo.core.records import Structure
from openmimo.engine.structure_check import resolved


def form_warnings(structure: Structure | None, texts: Iterable[str]) -> list[str]:
    """Return warnings about lists that have repeated items although the schema has `uniqueItems` there.

    Args:
        structure: The structure of the replies.
        texts: The replies. Those that are not JSON, such as cut ones, are not checked.
    """
    if structure is None or structure.kind != "json_schema" or '"uniqueItems"' not in structure.source:
        return []
    root = json.loads(structure.source)
    paths: dict[str, None] = {}
    for text in texts:
        try:
            paths.update(dict.fromkeys(_repeated(root, root, json.loads(text), "")))
        except (ValueError, RecursionError):  # no JSON, or nested too deep to be checked
            continue
    return [f"repeated items: {', '.join(path or 'the list' for path in paths)}"] if paths else []


def _repeated(schema: Any, root: Any, value: Any, path: str) -> Iterator[str]:
    """Yield the paths of lists with repeated items. Every step goes into the value, so there are as many as values."""
    schema = _only_option(resolved(schema, root), root)
    if not isinstance(schema, dict):
        return
    if isinstance(value, list):
        texts = [json.dumps(item, sort_keys=True) for item in value] if schema.get("uniqueItems") is True else []
        if len(set(texts)) < len(texts):
            yield path
        for item in value:
            yield from _repeated(schema.get("items"), root, item, f"{path}[]")
    elif isinstance(value, dict):
        properties = schema.get("properties")
        known = properties if isinstance(properties, dict) else {}
        for name, inner in value.items():
            part = known.get(name, schema.get("additionalProperties"))
            yield from _repeated(part, root, inner, f"{path}.{name}" if path else name)


def _only_option(schema: Any, root: Any) -> Any:
    """The other option of a schema that allows null as well, which is how pydantic writes optional fields."""
    options = schema.get("anyOf") if isinstance(schema, dict) else None
    if not isinstance(options, list):
        return schema
    others = [option for option in options if option != {"type": "null"}]
    return resolved(others[0], root) if len(others) == 1 else schema
