"""`openmimo serve`: load a checkpoint, or the stub, and serve requests until a signal stops the server.

The first SIGTERM or Ctrl-C drains the server. A second one aborts the requests that are still running.
"""

import asyncio
import gc
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from openmimo.core.errors import ConfigError, DataError, UserError
from openmimo.core.records import Message, Request, SamplingParams, Structure
from openmimo.core.registry import load_object
from openmimo.data.audio.files import optional_module
from openmimo.data.chat.template import encode_chat
from openmimo.data.tokenizer import Tokenizer
from openmimo.engine.config import EngineConfig, WeightFormat
from openmimo.engine.engine import Engine
from openmimo.engine.runner import Ranks
from openmimo.engine.server.app import create_app
from openmimo.engine.server.backends.engine import EngineBackend
from openmimo.engine.server.backends.protocol import Backend
from openmimo.engine.server.backends.speech import SpeechBackend
from openmimo.engine.server.backends.stub import StubBackend
from openmimo.engine.server.config import ServerConfig
from openmimo.engine.step import PROMPTS, captured_batches, captured_prompt_tokens
from openmimo.model.audio.language_config import is_audio_folder
from openmimo.model.hf import load_model
from openmimo.runtime.device import resolve_device

_RUN_MODEL = "model"  # the checkpoint folder of a run
_WARM_UP_TOKENS = 8
_TEXT_LENGTHS = (16, 600)  # of up to 512 and 2,048 positions, the sizes of tables of pages in captured passes
_FLUSH_SECONDS = 5  # time for clients to read the ends of their replies after all replies are complete
_AUDIO_PACKAGES = ("soundfile", "soxr", "python_multipart")
_FAILURE_SECONDS = 2  # time for requests to end by themselves after a rank was lost
_STUCK_SECONDS = 5  # after a second signal, for requests to end; after that a rank does not answer
_EXIT_SECONDS = 15  # after that the process ends although work on an accelerator has not
_QUEUED_MESSAGES = 1  # of a WebSocket connection, while a reply is generated


class Server(uvicorn.Server):
    """A web server with a graceful shutdown: running requests finish, new ones get a 503."""

    def __init__(self, backend: Backend, config: ServerConfig, ranks: Ranks | None = None):
        app = create_app(backend, config)
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=_FLUSH_SECONDS,
                ws_max_size=config.max_body_bytes,
                ws_max_queue=_QUEUED_MESSAGES,
            )
        )
        self._service = app.state.service
        self._ranks = ranks
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """The address that the server listens on; valid once `started` is true."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen and print the address."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            print(f"{self._service.model_name} answers at {self.url} (chat page) and {self.url}/v1 (API)", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGTERM and SIGINT."""
        if self._service.is_draining:
            assert self._loop is not None  # draining starts in the loop
            self._loop.call_soon_threadsafe(self._service.end_all)
            if self._ranks is not None:
                reason = "a rank did not answer after the second signal"
                _start_timer(_STUCK_SECONDS, self._ranks.fail, reason)
        elif self._loop is None:
            self.should_exit = True
        else:
            self.begin_drain()

    def begin_drain(self) -> None:
        """Stop the server once its running requests have finished. Thread-safe; requires a started server."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._start_drain)

    def _start_drain(self) -> None:
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        await self._service.drain()
        self.should_exit = True

    def fail(self) -> None:
        """End all requests with an error and stop the server, because the engine cannot continue. Thread-safe."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._start_failing)

    def _start_failing(self) -> None:
        self._draining = asyncio.create_task(self._fail())

    async def _fail(self) -> None:
        await asyncio.sleep(_FAILURE_SECONDS)  # a step that fails ends its requests with a better error
        self._service.is_draining = True
        self._service.end_all()
        self.should_exit = True


def _start_timer(seconds: float, action: Callable[..., object], argument: object) -> None:
    timer = threading.Timer(seconds, action, (argument,))
    timer.daemon = True
    timer.start()


def serve(backend: Backend, config: ServerConfig, ranks: Ranks | None = None) -> None:
    """Serve requests until SIGTERM or Ctrl-C, then drain.

    Raises:
        UserError: One of `ranks` has ended, so that the server has stopped.
    """
    gc.collect()
    gc.freeze()  # the loaded model lives as long as the process; scanning it would pause every request
    check_address(config)  # another server may have taken the port while the model was loaded
    server = Server(backend, config, ranks)
    if ranks is None:
        server.run()
        return

    def fail() -> None:
        _start_timer(_EXIT_SECONDS, os._exit, 1)  # a lost collective may block the engine's thread
        server.fail()

    ranks.on_loss(fail)
    server.run()
    loss = ranks.loss
    ranks.close()
    if loss:
        raise UserError(f"{loss}, so the server has stopped. Start it again.")


def launch(
    path: str,
    server: ServerConfig,
    engine: EngineConfig,
    *,
    dtype: str,
    device: str,
    threads: int | None,
    weights: WeightFormat,
) -> None:
    """Load the checkpoint in `path` and serve it until a signal stops the server.

    Args:
        path: Folder of a checkpoint in the Hugging Face layout.
        server: Address, access and limits of the server.
        engine: Batch and cache sizes, and speculation.
        dtype: Name of a torch dtype, or "auto": float32 on the CPU and bfloat16 elsewhere.
        device: Name of a torch device, or "auto".
        threads: Number of torch's CPU threads; None keeps torch's default.
        weights: How weight matrices are held; see `load_model`.

    Raises:
        UserError: An argument or the checkpoint is invalid. Raised before the server accepts requests.
    """
    check_address(server)
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; it must be at least 1.")
    if is_audio_folder(path):
        launch_audio(path, server, engine, dtype=dtype, device=device, threads=threads, weights=weights)
        return
    if threads is not None:
        torch.set_num_threads(threads)
    tokenizer = Tokenizer.load(path)
    torch_device = resolve_device(device)
    if dtype == "auto":
        dtype = "float32" if torch_device.type == "cpu" else "bfloat16"
    ranks: Ranks | None = None
    if engine.tp > 1:
        ranks = load_object("openmimo.engine.team:Team")(
            path, engine, dtype=dtype, device=str(torch_device), weights=weights
        )
    model = load_model(path, dtype=dtype, device=str(torch_device), weights=weights) if ranks is None else ranks.model
    try:
        served_engine = Engine(model, tokenizer, engine, ranks=ranks)
        for line in ranks.lines() if ranks else ():
            print(line, flush=True)
        warm_up(served_engine, tokenizer, captures=server.warm_up)
        name, *aliases = served_names(path)
        serve(EngineBackend(served_engine, tokenizer, model_name=name, model_aliases=tuple(aliases)), server, ranks)
    finally:
        if ranks is not None:
            ranks.close()


def launch_audio(
    path: str,
    server: ServerConfig,
    engine: EngineConfig,
    *,
    dtype: str,
    device: str,
    threads: int | None,
    weights: WeightFormat,
) -> None:
    """As `launch`, for a model that hears and speaks. Its text model answers requests without sound.

    Raises:
        UserError: An argument or the checkpoint is invalid, or a package of the extra `audio` is missing.
    """
    from openmimo.engine.audio.engine import AudioEngine
    from openmimo.engine.server.backends.audio import AudioModel, read_voices

    check_address(server)
    for package in _AUDIO_PACKAGES:
        optional_module(package)
    if engine.tp > 1:
        raise ConfigError(f"--tp {engine.tp} is not supported for audio models; leave it out.")
    if weights != "plain":
        raise ConfigError(f"--weights {weights} is not supported for audio models; leave it out.")
    if threads is not None:
        torch.set_num_threads(threads)
    torch_device = resolve_device(device)
    if dtype == "auto":
        dtype = "float32" if torch_device.type == "cpu" else "bfloat16"
    audio = AudioEngine(path, device=str(torch_device), dtype=dtype)
    text_engine = Engine(audio.model, audio.tokenizer, engine)
    warm_up(text_engine, audio.tokenizer, captures=server.warm_up)
    name, *aliases = served_names(path)
    text = EngineBackend(text_engine, audio.tokenizer, model_name=name, model_aliases=tuple(aliases))
    model = AudioModel(audio, read_voices(Path(path), audio.sample_rate))
    serve(SpeechBackend(model, text, most_running=engine.max_sequences), server)


def warm_up(engine: Engine, tokenizer: Tokenizer, *, captures: bool = True) -> None:
    """Run a short chat and a form, so that no request waits for kernels to compile or for the grammar checker to start.

    Args:
        engine: The engine to serve.
        tokenizer: Its tokenizer.
        captures: Whether an accelerator also runs batches of all captured sizes, so that few requests wait for one.

    Raises:
        UserError: The model cannot generate, for example because its weights hold NaN.
    """
    try:
        ids = encode_chat(tokenizer, [Message("user", "Hello")])
    except DataError:  # a template that rejects this conversation may accept those of clients
        ids = tokenizer.encode("Hello")
    prompt = tuple(ids[: engine.model.config.max_positions - 1])
    forms = [None, Structure("json_object")] if engine.eos_ids else [None]
    for form in forms:
        params = SamplingParams(max_tokens=_WARM_UP_TOKENS, temperature=0.0, structure=form)
        sequence = engine.submit(Request("warm-up", prompt, params))
        while not sequence.finish_reason:
            engine.step()
        if sequence.error:
            raise UserError(f"{sequence.error}.")
    if captures and engine.captures_graphs:
        print("capturing graphs; --no-warm-up leaves this to the first requests", flush=True)
        start = time.perf_counter()
        run_captured_sizes(engine)
        stats, seconds = engine.stats, time.perf_counter() - start
        print(f"{stats.num_graphs} graphs of {stats.graph_bytes / 2**20:.0f} MiB in {seconds:.0f} s", flush=True)
    engine.forget_cached()
    engine.forget_acceptance()
    engine.reset_stats()


def run_captured_sizes(engine: Engine) -> None:
    """Run batches of every size that is captured, with short and longer texts, and prompts of every such size.

    Graphs of texts beyond 2,048 positions are captured at their first use.
    """
    greatest, _ = engine.config.prompt_tokens(on_cpu=False)
    for length, temperature in itertools.product(_TEXT_LENGTHS, (0.0, 1.0) if engine.num_drafts else (1.0,)):
        for count in reversed(captured_batches(engine.config.max_sequences)):
            # A step reads up to 16 prompts. The first texts go on until the last prompt is read. The prompts are equal,
            # so that most of them come from the cache.
            num_tokens = _WARM_UP_TOKENS + count // 4
            _run_batch(engine, [range(length)] * count, num_tokens=num_tokens, temperature=temperature)
    for size in captured_prompt_tokens(greatest):
        engine.forget_cached()
        _run_batch(engine, [range(first, first + size // PROMPTS) for first in range(PROMPTS)], num_tokens=1)
        engine.forget_cached()
        _run_batch(engine, [range(size)], num_tokens=1)


def _run_batch(engine: Engine, prompts: list[range], *, num_tokens: int, temperature: float = 1.0) -> None:
    """Run texts after these prompts at once. Leaves out those that can never run."""
    vocab_size = engine.model.config.vocab_size
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=temperature, top_p=0.9, logprobs=True)
    for number, prompt in enumerate(prompts):
        request = Request(f"warm-up {number}", tuple(token % vocab_size for token in prompt), params)
        try:
            engine.submit(request)
        except UserError:
            continue
    while engine.has_work:
        engine.step()


def served_names(path: str) -> tuple[str, ...]:
    """Return the name of a checkpoint in the API, and other names that requests may use.

    It is the name of the folder. Runs store their checkpoint in RUN/model, which is served as RUN and, because it was
    called so earlier, also as "model".
    """
    folder = Path(path).resolve()
    if folder.name == _RUN_MODEL and folder.parent.name:
        return folder.parent.name, _RUN_MODEL
    return (folder.name,)


def launch_stub(server: ServerConfig) -> None:
    """Serve `StubBackend`, which echoes prompts without a model."""
    check_address(server)
    serve(StubBackend(), server)


def check_address(server: ServerConfig) -> None:
    """Raise ConfigError if the server cannot listen at its host and port. Called before a model is loaded."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "this is not a host name"
        raise ConfigError(
            f"the server cannot listen on --host {server.host} --port {server.port}: {reason}. Give another port "
            "(0: a free one) or an address of this machine."
        ) from error
