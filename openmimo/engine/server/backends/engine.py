"""The engine as the server's backend.

Only the backend's thread changes the engine's state. `check` runs in other threads and changes only the structure
compiler, which has a lock and compiles each grammar once.
"""

from openmimo.core.records import Delta, Request
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.engine import Engine
from openmimo.engine.server.backends.protocol import BackendGauges
from openmimo.engine.server.backends.threaded import ThreadedBackend


class _EngineSteps:
    """The steps of an engine."""

    def __init__(self, engine: Engine):
        self._engine = engine

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def submit(self, request: Request) -> None:
        self._engine.submit(request)

    def abort(self, request_id: str) -> None:
        self._engine.abort(request_id)

    def step(self) -> list[Delta]:
        return [sequence.take_delta() for sequence in self._engine.step()]


class EngineBackend(ThreadedBackend):
    """Serve an engine. No other code may step the engine until `close` returns."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, model_name: str, model_aliases: tuple[str, ...] = ()):
        self.model_name = model_name
        self.model_aliases = model_aliases
        self.tokenizer = tokenizer
        self.max_positions = engine.model.config.max_positions
        self._engine = engine
        super().__init__(_EngineSteps(engine))

    def check(self, request: Request) -> None:
        """Raise UserError if the request can never run. Thread-safe."""
        self._engine.check(request)  # reads only constant state; the structure compiler has a lock

    def gauges(self) -> BackendGauges:
        """Return the state of the engine for /metrics and /health."""
        engine, stats = self._engine, self._engine.stats
        return BackendGauges(
            num_waiting=engine.num_waiting,
            num_running=engine.num_running,
            cache_bytes_used=engine.arena.num_used * engine.arena.page_bytes,
            cache_bytes_total=engine.arena.num_pages * engine.arena.page_bytes,
            num_prompt_tokens=stats.num_prompt_tokens + stats.num_cached_tokens,
            num_cached_tokens=stats.num_cached_tokens,
            num_new_tokens=stats.num_new_tokens,
            drafts_offered=tuple(stats.offered),
            drafts_accepted=tuple(stats.accepted),
            steps_by_drafts=tuple(stats.steps_by_drafts),
            num_graphs=stats.num_graphs,
            graph_seconds=stats.graph_seconds,
            graph_bytes=stats.graph_bytes,
            num_graph_passes=stats.num_graph_passes,
            num_other_passes=stats.num_other_passes,
            num_ranks=1 if engine.ranks is None else engine.ranks.size,
            is_healthy=self.is_healthy and not (engine.ranks and engine.ranks.loss),
        )
