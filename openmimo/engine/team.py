"""The ranks of an engine on several devices, as rank 0 sees them.

Rank 0 is the process of the engine. It starts the other ranks of this machine (`openmimo.engine.member`), sends each
step through a pipe before it executes the step itself, and reads no answer: results are the same on all ranks. The
ranks exchange sums and logits through gloo on CPUs and NCCL on accelerators.

    rank 0   plan -> send -> execute -> read the decided tokens -> plan ...
    rank 1   wait ---------> execute -> wait ...

A rank that ends by itself takes its part of the model with it, so the engine ends: the step that runs fails, and so
does every later one. All ranks but 0 end when rank 0 does.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import FrameType
from typing import NamedTuple, TypeVar

import torch

from openmimo.core.errors import SIGNALS, ConfigError, UserError
from openmimo.engine.cache import PageArena
from openmimo.engine.config import EngineConfig
from openmimo.engine.member import (
    ConnectRanks,
    DraftTokens,
    ExecuteStep,
    Loaded,
    LoadPart,
    Part,
    ScoreText,
    SetWeight,
    StartWorker,
)
from openmimo.engine.step import HeadInput, StepInput, StepOutput
from openmimo.engine.worker import Worker
from openmimo.kernels.attention import Integers
from openmimo.model.hf import checked_dtype, load_config
from openmimo.model.mimo import MiMo
from openmimo.parallel.inference import Division, check_division, text_logprobs
from openmimo.parallel.messages import decoded, encoded
from openmimo.runtime.device import device_count, free_memory_bytes, resolve_device

_CONNECT_SECONDS = 0.05  # between looks at whether a rank has ended, while the ranks connect
_LOSS_SECONDS = 5.0  # until the end of a rank explains why a collective failed
_MEMBER = "from openmimo.engine.member import main; main()"  # not -m: the records would be those of a module __main__
_END_SECONDS = 2.0  # for ranks to end by themselves
Record = TypeVar("Record", bound=tuple)


class LostRankError(UserError):
    """A rank has ended, so the engine cannot continue."""


class MemberProcess(NamedTuple):
    """Another rank.

    Attributes:
        process: Its process.
        connection: To it.
    """

    process: "subprocess.Popen[bytes]"
    connection: Connection


def start_member() -> MemberProcess:
    """Start a rank in a process of its own, which takes no Ctrl-C of the terminal."""
    own, other = Pipe()
    package_root = str(Path(__file__).parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    with other:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _MEMBER, str(other.fileno()), str(os.getpid())],
            pass_fds=[other.fileno()],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,
        )
    return MemberProcess(process, own)


@dataclass
class _Ranks:
    """The processes of the other ranks, and what became of them.

    Attributes:
        members: The other ranks, in order.
        loss: Which rank has ended and how; empty while all live.
        threads_before: Torch's CPU threads before rank 0 took its share; `close` restores them.
        is_closing: Whether they are meant to end.
        on_loss: Called once, in another thread, when a rank ends that is not meant to.
    """

    members: list[MemberProcess]
    threads_before: int
    loss: str = ""
    is_closing: bool = False
    on_loss: list[Callable[[], None]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_lost: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        """Notice the end of a rank in a thread for each."""
        for number, member in enumerate(self.members, start=1):
            name = f"openmimo-rank-{number}"
            threading.Thread(target=self._wait_for, args=(number, member), name=name, daemon=True).start()

    def _wait_for(self, number: int, member: MemberProcess) -> None:
        code = member.process.wait()
        how = f"ended with code {code}"
        if code < 0:
            how = f"was ended by signal {-code} ({signal.Signals(-code).name})"
        self.note(f"rank {number} of {len(self.members) + 1} (process {member.process.pid}) {how}")

    def note(self, loss: str) -> None:
        """Record that the engine cannot continue, once, unless the ranks are meant to end."""
        with self.lock:
            if self.is_closing or self.loss:
                return
            self.loss = loss
            callbacks = tuple(self.on_loss)
        self.is_lost.set()
        for callback in callbacks:
            callback()
        for member in self.members:  # the others wait for a rank that does not answer
            member.process.kill()

    def close(self) -> None:
        """End the other ranks: they end when their pipe does, and are killed if they work on."""
        with self.lock:
            self.is_closing = True
        for member in self.members:
            member.connection.close()
        deadline = time.monotonic() + _END_SECONDS
        for member in self.members:
            try:
                member.process.wait(max(deadline - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
        torch.set_num_threads(self.threads_before)


class Team:
    """The ranks of an engine.

    Args:
        path: A checkpoint folder.
        config: Settings of the engine, with `tp` and `ep`.
        dtype: Of weights and activations.
        device: "auto", "cpu" or an accelerator's type.
        weights: Format of the weights: plain or int8.
        start: Starts another rank (None: `start_member`).

    Attributes:
        divided: Rank 0's part of the model, with what it knows of the whole.

    Raises:
        UserError: The model cannot be divided among the ranks, there are too few devices, or the folder cannot be
            loaded. No process is left.
    """

    def __init__(
        self,
        path: str | Path,
        config: EngineConfig,
        *,
        dtype: str,
        device: str,
        weights: str,
        start: Callable[[], MemberProcess] | None = None,
    ):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"tp {config.tp} starts its own processes on this machine; run the command itself, and not by torchrun."
            )
        self._size = config.tp
        division = Division(0, config.tp, config.ep)
        check_division(load_config(path), division, weights)
        checked_dtype(dtype)
        found = _checked_device(device, config.tp)
        threads_before = torch.get_num_threads()
        threads = max(threads_before // config.tp, 1)
        setups = [
            LoadPart(str(path), Division(rank, config.tp, config.ep), dtype, found.type, weights, threads)
            for rank in range(config.tp)
        ]
        self._ranks = _Ranks([], threads_before)
        self._part: Part | None = None
        self._end = weakref.finalize(self, self._ranks.close)
        try:
            for setup in setups[1:]:
                self._ranks.members.append((start or start_member)())
                self._send_to(self._ranks.members[-1], encoded(setup))
            self._ranks.watch()
            part = self._part = Part(setups[0])
            self._loaded = [part.loaded(), *self._answers()]
            self._connect(part)
        except BaseException:
            self.close()
            raise
        self.divided = part.divided
        self._caches = [0] * self.size
        self._ranks.on_loss.append(part.group.abort)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._size

    @property
    def model(self) -> MiMo:
        """Rank 0's part of the model."""
        return self.divided.model

    @property
    def loss(self) -> str:
        """Why the engine cannot continue; empty while it can."""
        return self._ranks.loss

    @property
    def free_bytes(self) -> int:
        """Free memory for the cache of a rank. Ranks on CPUs share the memory of the machine."""
        if self.model.device.type == "cpu":
            return free_memory_bytes(self.model.device) // self.size
        return min(loaded.free_bytes for loaded in self._loaded)

    def on_loss(self, callback: Callable[[], None]) -> None:
        """Call a function, in another thread, when a rank ends by itself; at once if one has."""
        with self._ranks.lock:
            self._ranks.on_loss.append(callback)
            is_late = bool(self._ranks.loss)
        if is_late:
            callback()

    def close(self) -> None:
        """End the other ranks. The model cannot be used any more."""
        self._end()
        if self._part is not None:
            self._part.group.use(None)  # ends its threads, which a process forked later would wait for

    def fail(self, reason: str) -> None:
        """Kill the other ranks, because one does not answer. The engine cannot continue."""
        self._ranks.note(reason)

    def worker(self, arena: PageArena, config: EngineConfig, *, num_drafts: int, max_decided: int) -> Worker:
        """Make the workers of all ranks; returns that of rank 0, which makes the others execute each step too."""
        setup = StartWorker(
            arena.num_pages * arena.page_bytes,
            arena.dtype,
            config.page_positions,
            num_drafts,
            max_decided,
            config.integers,
        )
        self.send(setup)
        self._caches = [setup.cache_bytes, *(answer.num_bytes for answer in self._answers())]
        return LeadingWorker(self, arena, num_drafts=num_drafts, max_decided=max_decided, integers=config.integers)

    def send(self, record: tuple) -> bytes:
        """Send a record to the other ranks; returns the message. Raises LostRankError."""
        message = encoded(record)
        for member in self._ranks.members:
            self._send_to(member, message)
        return message

    def _send_to(self, member: MemberProcess, message: bytes) -> None:
        self._check()
        try:
            member.connection.send_bytes(message)
        except OSError as error:
            raise self._lost("a rank does not take messages") from error

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run what all ranks do at once. If it fails, the ranks are out of step, so the engine ends.

        Signals wait until the end of the block.

        Raises:
            LostRankError: Another rank has ended.
        """
        try:
            with _later_signals():
                yield
        except UserError:
            raise
        except RuntimeError as error:
            raise self._lost(f"rank 0 failed: {error}") from error
        except Exception as error:
            self._ranks.note(f"rank 0 failed: {error}")
            raise

    def _lost(self, otherwise: str) -> LostRankError:
        """Return the error after a failed exchange. It waits for the end of a rank, which is usually the reason."""
        self._ranks.is_lost.wait(_LOSS_SECONDS)
        self._ranks.note(otherwise)
        return LostRankError(f"{self.loss or otherwise}, so the engine has ended. Start it again.")

    def _check(self) -> None:
        if self.loss:
            raise LostRankError(f"{self.loss}, so the engine has ended. Start it again.")
        if not self._end.alive:
            raise UserError("the ranks of this engine have been closed; make another one.")

    def _answers(self) -> list[Loaded]:
        """Wait for the answer of every other rank. Raises UserError if one has failed."""
        answers = []
        for member in self._ranks.members:
            try:
                answer = decoded(member.connection.recv_bytes())
            except (EOFError, OSError) as error:
                raise self._lost("a rank has closed its pipe") from error
            assert isinstance(answer, Loaded)
            if answer.error:
                raise UserError(answer.error)
            answers.append(answer)
        return answers

    def _connect(self, part: Part) -> None:
        folder = tempfile.mkdtemp(prefix="openmimo-ranks-")
        try:
            self.send(ConnectRanks(str(Path(folder) / "store")))
            self._wait_for(lambda: part.connect(str(Path(folder) / "store")))
            self._answers()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _wait_for(self, connect: Callable[[], None]) -> None:
        """Connect in a thread, because torch notices neither signals nor the end of a rank meanwhile."""
        failures: list[RuntimeError] = []

        def run() -> None:
            try:
                connect()
            except RuntimeError as error:
                failures.append(error)

        thread = threading.Thread(target=run, name="openmimo-connect", daemon=True)
        thread.start()
        while thread.is_alive():
            self._check()
            thread.join(_CONNECT_SECONDS)
        if failures:
            raise self._lost(f"the ranks could not connect: {failures[0]}") from failures[0]

    def whole_shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a parameter or buffer of the whole model; None if there is none of that name."""
        return self.divided.whole_shape(name)

    def set_weights(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give all ranks their parts of new values of whole tensors."""
        for name, tensor in tensors.items():
            with self.together():
                self.send(SetWeight(name, tensor))
                self.divided.set_weight(name, tensor)

    @torch.inference_mode()
    def text_logprobs(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """As `parallel.inference.text_logprobs`, on all ranks."""
        with self.together():
            self.send(ScoreText(tokens_T))
            return text_logprobs(self.model, tokens_T)

    def report(self) -> dict[str, int | list[int] | str]:
        """Statistics of the ranks, for `LLM.stats`."""
        return {
            "num_ranks": self.size,
            "weight_bytes_by_rank": [loaded.num_bytes for loaded in self._loaded],
            "cache_bytes_by_rank": list(self._caches),
            "why_no_graphs": "tp is greater than 1",
        }

    def lines(self) -> list[str]:
        """Device and memory of each rank, a line each, and which options have no effect."""
        device = self.model.device.type
        return [
            f"rank {rank} of {self.size} on {device if device == 'cpu' else f'{device}:{rank}'}: "
            f"{loaded.num_bytes / 2**20:,.1f} MiB of weights, {cache / 2**20:,.1f} MiB of cache"
            for rank, (loaded, cache) in enumerate(zip(self._loaded, self._caches, strict=True))
        ] + ["with tp > 1, steps use no captured graphs and are not planned ahead"]


class LeadingWorker(Worker):
    """Rank 0's worker. The host fills steps in CPU memory; an accelerator gets them as one copy, as on every rank."""

    def __init__(self, team: Team, arena: PageArena, *, num_drafts: int, max_decided: int, integers: Integers | None):
        super().__init__(team.model, arena, num_drafts=num_drafts, max_decided=max_decided, integers=integers)
        self._team = team

    def execute(self, step: StepInput) -> StepOutput:
        """As `Worker.execute`, on all ranks."""
        with self._team.together():
            record = self._sent(ExecuteStep(step, self._arena.num_seats))
            return super().execute(record.step)

    def draft(self, heads: tuple[HeadInput, ...], width: int) -> torch.Tensor:
        """As `Worker.draft`, on all ranks."""
        with self._team.together():
            record = self._sent(DraftTokens(heads, width))
            return super().draft(record.heads, record.width)

    def _sent(self, record: Record) -> Record:
        """Send a record; returns it with tensors on this rank's device."""
        message = self._team.send(record)
        if self.model.device.type == "cpu":
            return record
        sent: Record = decoded(message, self.model.device)
        return sent


def _checked_device(device: str, tp: int) -> torch.device:
    """Return the device type of the ranks. Raises ConfigError if there are fewer devices than ranks."""
    found = resolve_device(device)
    if found.index is not None:
        raise ConfigError(f"device is {device!r}, but tp {tp} uses the devices 0 to {tp - 1}; give {found.type!r}.")
    if found.type != "cpu" and device_count() < tp:
        raise ConfigError(
            f"tp is {tp}, but torch sees {device_count()} accelerators; give a smaller tp, or --device cpu."
        )
    return found


@contextlib.contextmanager
def _later_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM that arrive in the block take effect after it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    before = {number: signal.signal(number, lambda *call: arrived.append(call)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for first in arrived[:1]:
            signal.raise_signal(first[0])
