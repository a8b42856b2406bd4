"""Checks of the requests of speech models, and their replies as text and sound."""

from collections.abc import AsyncIterator, Sequence

from openmimo.core.errors import UserError
from openmimo.engine.server.backends.speech import SpeechDelta, SpeechRequest
from openmimo.engine.server.http.errors import ApiError, engine_failed, invalid
from openmimo.engine.server.http.service import Generation, Service


def check_work(service: Service, requests: Sequence[SpeechRequest], param: str) -> None:
    """Raise ApiError (400), for the field `param`, if a request can never run. Thread-safe."""
    for request in requests:
        try:
            service.backend.check(request)
        except UserError as error:
            raise invalid(str(error), param) from error


def no_sound() -> ApiError:
    """A 500: a reply that should have sound has none."""
    return engine_failed("the model ended its reply without sound. Give another seed, or a longer text.")


async def speech_deltas(generation: Generation) -> AsyncIterator[tuple[int, SpeechDelta]]:
    """Yield the deltas of a speech model's replies. Raises ApiError as `Generation.deltas`."""
    async for index, delta in generation.deltas():
        assert isinstance(delta, SpeechDelta), "other deltas are errors, which the generation raises"
        yield index, delta
