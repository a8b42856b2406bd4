"""The models that answer: the engine in this process, or a server with OpenAI's API."""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from typing import Any, Protocol

from openmimo.core.errors import UserError
from openmimo.core.records import SamplingParams
from openmimo.engine.llm import LLM
from openmimo.evals.task import Example, Room

_TIMEOUT_SECONDS = 3600.0
_ATTEMPTS, _FIRST_PAUSE_SECONDS = 4, 1.0
_BUSY = (408, 409, 429, 500, 502, 503, 504)


class Answerer(Protocol):
    """A model that answers examples."""

    def answers(self, room: Room, examples: list[Example]) -> list[str]:
        """The texts of the answers, decoded greedily. Raises UserError if the model fails."""
        ...


class LocalModel:
    """The engine in this process."""

    def __init__(self, llm: LLM):
        self._llm = llm

    def answers(self, room: Room, examples: list[Example]) -> list[str]:
        """As `Answerer.answers`. An answer on token ids has exactly the number of tokens of the key."""
        params = [
            SamplingParams(max_tokens=example.max_tokens, temperature=0.0, ignore_eos=bool(example.token_ids))
            for example in examples
        ]
        completions = self._llm.generate([room.prompt_ids(example) for example in examples], params)
        for completion in completions:
            if completion.error:
                raise UserError(f"At {room.length} tokens: {completion.error}.")
        return [room.tokenizer.decode(completion.token_ids) for completion in completions]


class Endpoint:
    """A server with OpenAI's API.

    Args:
        base_url: Address that ends before `/completions`.
        model: Name of the model (None: the first of the list of the server).

    Raises:
        UserError: The server does not answer, or lists no model.
    """

    def __init__(self, base_url: str, model: str | None):
        self._base_url = base_url.rstrip("/")
        self._model = model or self._first_model()

    def answers(self, room: Room, examples: list[Example]) -> list[str]:
        """As `Answerer.answers`, all requests at once. Prompts are texts, or token ids in tasks on token ids."""
        texts = [""] * len(examples)
        failures: list[UserError] = []

        def ask(index: int) -> None:
            try:
                texts[index] = self._answer(room, examples[index])
            except UserError as error:
                failures.append(error)

        # daemons, so that an interrupted run does not wait for the server
        threads = [threading.Thread(target=ask, args=(index,), daemon=True) for index in range(len(examples))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return texts

    def _answer(self, room: Room, example: Example) -> str:
        body: dict[str, Any] = {"model": self._model, "max_tokens": example.max_tokens, "temperature": 0.0}
        if room.form == "chat" and not example.token_ids:
            messages = [{"role": turn.role, "content": turn.content} for turn in example.turns]
            return self._text("/chat/completions", body | {"messages": messages}, ("message", "content"))
        prompt = list(example.token_ids) or example.base_text()
        return self._text("/completions", body | {"prompt": prompt}, ("text",))

    def _text(self, route: str, body: dict[str, Any], keys: tuple[str, ...]) -> str:
        reply = self._call(route, body)
        try:
            value = reply["choices"][0]
            for key in keys:
                value = value[key]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self._base_url}{route} answers without {'.'.join(keys)}: {str(reply)[:200]}.") from error
        return value if isinstance(value, str) else ""

    def _first_model(self) -> str:
        reply = self._call("/models", None)
        try:
            return str(reply["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self._base_url}/models lists no model; give its name with --model.") from error

    def _call(self, route: str, body: dict[str, Any] | None) -> Any:
        """The parsed reply. A busy server is asked again after a pause."""
        address = self._base_url + route
        for attempt in range(_ATTEMPTS):
            try:
                with urllib.request.urlopen(self._request(address, body), timeout=_TIMEOUT_SECONDS) as response:
                    return json.loads(response.read())
            except urllib.error.HTTPError as error:
                if error.code not in _BUSY or attempt == _ATTEMPTS - 1:
                    text = error.read(400).decode(errors="replace")
                    raise UserError(f"{address} answers with status {error.code}: {text}") from error
            except ValueError as error:
                raise UserError(f"{address} does not answer with JSON: {error}.") from error
            except OSError as error:
                if attempt == _ATTEMPTS - 1:
                    raise UserError(f"{address} does not answer: {error}.") from error
            time.sleep(_FIRST_PAUSE_SECONDS * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _request(self, address: str, body: dict[str, Any] | None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(address, data=data, headers=headers)
