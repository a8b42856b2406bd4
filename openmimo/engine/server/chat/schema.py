"""Schemas that requests of every wire format contain: the parameters of tools and the form of a reply."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo

from openmimo.engine.server.http import limits
from openmimo.engine.server.http.bodies import check_tree, dicts_in
from openmimo.engine.server.http.fields import IgnoredFields
from openmimo.engine.structure_check import unique_lists


def _check_output_schema(schema: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    check_tree(schema, limits.SCHEMA_VALUES)
    text = json.dumps(schema)
    if len(text) > limits.STRUCTURE_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters; at most {limits.STRUCTURE_CHARACTERS} are allowed.")
    if text.count('"$ref"') > limits.SCHEMA_REFERENCES:
        raise ValueError(f"it contains more than {limits.SCHEMA_REFERENCES} references ($ref).")
    if isinstance(info.context, IgnoredFields):
        for part in dicts_in(schema):
            if part.get("uniqueItems") is True and unique_lists(part, schema) is None:
                info.context.add(part, "uniqueItems")  # the grammar cannot express it
    return schema


OutputSchema = Annotated[dict[str, Any], AfterValidator(_check_output_schema)]


def _check_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    check_tree(parameters, limits.SCHEMA_VALUES)
    properties = parameters.get("properties") or {}
    if not isinstance(properties, dict) or not all(isinstance(one, dict | bool) for one in properties.values()):
        raise ValueError("properties must be an object that maps each parameter to a schema (an object or a boolean).")
    return parameters


def check_tools(tools: list[Any]) -> list[Any]:
    """Raise ValueError if the schemas of all tools contain too many values in total."""
    if sum(check_tree(tool.parameters_schema, limits.SCHEMA_VALUES) for tool in tools) > limits.TOOL_VALUES:
        raise ValueError(f"their parameters contain more than {limits.TOOL_VALUES} values in total.")
    return tools


FunctionParameters = Annotated[dict[str, Any], AfterValidator(_check_parameters)] | None
