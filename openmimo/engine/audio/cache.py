"""The key/value cache of one generation: the engine's pages for the backbone, with inputs that are embedded already.

T new positions, D model dim.
"""

import torch

from openmimo.engine.cache import PageArena, PageTables, plan_pages
from openmimo.engine.step import Span, StepBuffers
from openmimo.engine.worker import PagedContext, RotaryRows
from openmimo.model.audio.language import AudioLanguageModel


class BackboneCache:
    """Runs the backbone over the new positions of one sequence.

    Args:
        model: The model.
        max_positions: The most positions of the sequence.
    """

    def __init__(self, model: AudioLanguageModel, max_positions: int):
        self._model = model
        layers, dtype = model.config.attention_layers(), model.activation_dtype
        layout = plan_pages(layers, dtype=dtype)
        num_pages = sum(group.pages_until(max_positions) for group in layout.groups)
        self._arena = PageArena(
            layers,
            cache_bytes=num_pages * layout.page_numbers * dtype.itemsize,
            dtype=dtype,
            device=model.device,
        )
        self._tables = PageTables(self._arena, margin=0)
        self._context = PagedContext(self._arena, RotaryRows(model.device, max_positions))
        self._buffers = StepBuffers(
            self._arena,
            model.device,
            range(len(model.config.layers)),
            max_tokens=max_positions,
            max_sequences=1,
            max_positions=max_positions,
        )
        self.length = 0

    @torch.inference_mode()
    def run(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the final states [T, D] of new positions, and keep their keys and values."""
        start, stop = self.length, self.length + len(x_TD)
        self._tables.reach(stop)
        step = self._buffers.fill([Span(self._tables, start, stop)], [0] * len(x_TD))
        self._buffers.send()
        states_TD = self._model.model(x_TD, self._context.bind(step)).post_norm_TD
        self._tables.leave_behind(stop)
        self.length = stop
        return states_TD
