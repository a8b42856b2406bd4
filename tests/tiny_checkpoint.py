"""A checkpoint small enough to serve in a test: random weights, three MTP heads, a tokenizer with its chat format."""

from dataclasses import replace
from pathlib import Path

from conftest import randomize, tiny_config

from openmimo.data.tokenizer import Tokenizer
from openmimo.model.hf import save_model
from openmimo.model.mimo import MiMo

_CORPUS = ["The quick brown fox jumps over the lazy dog, 0123456789.\n", "def add(a, b):\n    return a + b\n"]


def save_tiny_checkpoint(folder: Path) -> Path:
    """Writes the checkpoint; its model has a layer of each attention kind, and 4,096 positions."""
    tokenizer = Tokenizer.train(_CORPUS, vocab_size=320)
    config = replace(tiny_config(num_layers=2, mtp_heads=3), vocab_size=tokenizer.vocab_size, max_positions=4096)
    save_model(randomize(MiMo(config), 0), folder)
    tokenizer.save(folder)
    return folder
