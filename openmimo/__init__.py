"""openmimo: the MiMo-V2-Flash system as open software. Importing this package does not import torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmimo.core.records import Completion, Message, SamplingParams
    from openmimo.engine.config import EngineConfig
    from openmimo.engine.llm import LLM
    from openmimo.model.hf import load_model, save_model

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "EngineConfig", "Message", "SamplingParams", "load_model", "save_model"]

_HOME = {
    "LLM": "openmimo.engine.llm",
    "EngineConfig": "openmimo.engine.config",
    "Completion": "openmimo.core.records",
    "Message": "openmimo.core.records",
    "SamplingParams": "openmimo.core.records",
    "load_model": "openmimo.model.hf",
    "save_model": "openmimo.model.hf",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'openmimo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
