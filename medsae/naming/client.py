"""A client of OpenAI-compatible chat endpoints: bounded in flight, retries with back-off, answers by JSON schema or choice."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import httpx

from medsae.errors import ServiceError

RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Answers after which the same request may succeed: full queue, restarting or dead engine, gateway."""

TRANSIENT = ("connection", "timeout", "http")
"""Statuses (by their first word) of failures that are no property of the question; a resumed job asks again."""


@dataclass(frozen=True)
class Answer:
    """What became of one request.

    `status`: `ok`, or the reason why there is no answer: `truncated`, `schema`, `refused`, `http NNN`, `connection`, `timeout`.
    `value`: the parsed JSON object, or the chosen string. `probabilities`: of the choices, summing to 1, where log-probabilities were asked for.
    """

    status: str
    value: Any = None
    probabilities: dict[str, float] | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    attempts: int = 1

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def transient(self) -> bool:
        """Whether asking again could help."""
        return self.status.split(" ")[0] in TRANSIENT


@dataclass(frozen=True)
class Reply:
    """What one attempt brought: `status` in words, `code` (None: no answer at all), the decoded `body` of a 200, seconds to wait where told."""

    status: str
    code: int | None = None
    body: Any = None
    retry_after: float | None = None


@dataclass
class Usage:
    """Running totals of a client."""

    requests: int = 0
    failed: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, answer: Answer) -> None:
        self.requests += 1
        self.failed += not answer.ok
        self.retries += answer.attempts - 1
        self.prompt_tokens += answer.prompt_tokens
        self.cached_tokens += answer.cached_tokens
        self.completion_tokens += answer.completion_tokens


@dataclass
class ChatClient:
    """Asks one model behind an OpenAI-compatible server. Use as an async context manager, in one event loop.

    Args:
        url: base URL, with or without `/v1`.
        model: model id as the server lists it; None asks the server for its first.
        api_key: sent as a bearer token.
        concurrency: requests in flight.
        retries: repetitions after `RETRY_STATUS`, a lost connection or a time-out. Waits double from `backoff` seconds to `longest_wait`, with jitter;
            a server's Retry-After is obeyed.
        give_up: so many requests in a row whose retries all went unanswered end the client's work with a ServiceError: the service is gone, and a job would
            otherwise wait for hours. None never gives up.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    concurrency: int = 32
    retries: int = 6
    timeout: float = 300.0
    backoff: float = 0.5
    longest_wait: float = 10.0
    give_up: int | None = None
    usage: Usage = field(default_factory=Usage)

    async def __aenter__(self) -> ChatClient:
        base = self.url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        limits = httpx.Limits(max_connections=self.concurrency + 2, max_keepalive_connections=self.concurrency + 2)
        # trust_env=False: images of patients must not wander through a proxy that some variable names.
        self._http = httpx.AsyncClient(base_url=base, headers=headers, timeout=self.timeout, limits=limits, trust_env=False)
        self._begin()
        if self.model is None:
            self.model = (await self.models())[0]
        return self

    def _begin(self) -> None:
        self._slots = asyncio.Semaphore(self.concurrency)
        self._jitter = random.Random(0)
        self._lost = 0

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._http.aclose()

    async def models(self) -> list[str]:
        """Ids of the models that the server offers.

        Raises:
            ServiceError: the server cannot be reached, refuses the key, or lists none.
        """
        try:
            response = await self._http.get("/v1/models")
        except httpx.HTTPError as error:
            raise ServiceError(f"no naming service answers at {self.url} ({type(error).__name__}); start one or unset name.url") from error
        if response.status_code in (401, 403):
            raise ServiceError(f"the naming service at {self.url} refuses the API key: set the variable that name.api_key_env names")
        try:
            found = [str(m["id"]) for m in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ServiceError(
                f"{self.url}/v1/models answered {response.status_code} and no list of models; is it an OpenAI-compatible server?"
            ) from error
        if not found:
            raise ServiceError(f"the naming service at {self.url} offers no model")
        return found

    async def ask(
        self,
        messages: list[dict[str, Any]],
        *,
        schema: dict[str, Any] | None = None,
        choices: Sequence[str] | None = None,
        max_tokens: int = 300,
    ) -> Answer:
        """One question at temperature 0. What a server does to it is a status and no exception, until the service is given up.

        With `schema` the answer is a JSON object that follows it; with `choices`, one of these strings with the probability of each.

        Raises:
            ServiceError: `give_up` requests in a row were lost.
        """
        body: dict[str, Any] = {"model": self.model, "messages": messages, "temperature": 0.0, "seed": 0, "max_tokens": max_tokens}
        if schema is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
        if choices is not None:
            # Choices are single tokens here ("0", "1"), so the first token's log-probabilities are those of the answers.
            body |= {"structured_outputs": {"choice": list(choices)}, "max_tokens": 1, "logprobs": True, "top_logprobs": 10}
        async with self._slots:
            answer = await self._send(body, schema, choices)
        self.usage.add(answer)
        self._lost = self._lost + 1 if answer.transient else 0
        if self.give_up is not None and self._lost >= self.give_up:
            raise ServiceError(
                f"the naming service stopped answering ({answer.status}, {self._lost} requests in a row): what it answered is kept, run the stage again"
            )
        return answer

    async def _send(self, body: dict[str, Any], schema: dict[str, Any] | None, choices: Sequence[str] | None) -> Answer:
        reply = Reply("connection")
        for attempt in range(1, self.retries + 2):
            reply = await self.post(body)
            if reply.code == 200:
                return parse_answer(reply.body, schema, choices, attempt)
            if reply.code is not None and reply.code not in RETRY_STATUS:
                return Answer(reply.status, attempts=attempt)
            if attempt <= self.retries:
                wait = reply.retry_after
                await asyncio.sleep(self._wait(attempt) if wait is None else min(wait, self.longest_wait) + self._jitter.random() * self.backoff)
        return Answer(reply.status, attempts=self.retries + 1)

    async def post(self, body: dict[str, Any]) -> Reply:
        """Sends one request once."""
        try:
            response = await self._http.post("/v1/chat/completions", json=body)
        except httpx.TimeoutException:
            return Reply("timeout")
        except httpx.HTTPError:
            return Reply("connection")
        if response.status_code != 200:
            return Reply(status_of(response.status_code), response.status_code, None, _retry_after(response))
        try:
            return Reply("ok", 200, response.json())
        except ValueError:
            return Reply("ok", 200, None)

    def _wait(self, attempt: int) -> float:
        return min(self.backoff * 2.0 ** (attempt - 1), self.longest_wait) * (0.5 + self._jitter.random() / 2)


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None


def status_of(code: int) -> str:
    """What an HTTP status says of a request: `refused` where the request itself is the reason."""
    return "refused" if code in (400, 413, 422) else f"http {code}"


def parse_answer(body: Any, schema: dict[str, Any] | None, choices: Sequence[str] | None, attempts: int = 1) -> Answer:
    """The body of a chat endpoint's 200 as an Answer; whatever does not follow `schema` or `choices` is a failure with its reason, never a value."""
    try:
        choice = body["choices"][0]
        text = choice["message"]["content"] or ""
        usage = body.get("usage") or {}
        details = usage.get("prompt_tokens_details") or {}
    except (KeyError, IndexError, TypeError):
        return Answer("schema", attempts=attempts)
    bad = Answer(
        "schema",
        prompt_tokens=int(usage.get("prompt_tokens") or 0),
        cached_tokens=int(details.get("cached_tokens") or 0),
        completion_tokens=int(usage.get("completion_tokens") or 0),
        attempts=attempts,
    )
    if choices is not None:
        answer = text.strip()
        if answer not in choices:
            return bad
        return replace(bad, status="ok", value=answer, probabilities=_probabilities(choice, choices))
    if choice.get("finish_reason") == "length":
        return replace(bad, status="truncated")
    if schema is None:
        return replace(bad, status="ok", value=text)
    value = follows(text, schema)
    return bad if value is None else replace(bad, status="ok", value=value)


def _probabilities(choice: dict[str, Any], choices: Sequence[str]) -> dict[str, float] | None:
    """Probabilities of the choices among themselves; None where the server told no log-probability of any."""
    try:
        listed = choice["logprobs"]["content"][0]["top_logprobs"]
        seen = {c: max((float(t["logprob"]) for t in listed if t["token"].strip() == c), default=-math.inf) for c in choices}
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    top = max(seen.values())
    if not math.isfinite(top):
        return None
    weights = {c: math.exp(v - top) for c, v in seen.items()}
    total = sum(weights.values())
    return {c: w / total for c, w in weights.items()}


def follows(text: str, schema: dict[str, Any]) -> dict[str, Any] | None:
    """The JSON object in `text` if it follows `schema` (object of strings, booleans, integers, enums, bounded), else None.

    A server may ignore the schema, so the client checks again.
    """
    try:
        value = json.loads(text)
    except ValueError:
        return None
    if not isinstance(value, dict) or any(key not in value for key in schema["required"]):
        return None
    if any(key not in schema["properties"] for key in value):
        return None
    return value if all(_fits(value[key], rule) for key, rule in schema["properties"].items() if key in value) else None


def _fits(value: Any, rule: dict[str, Any]) -> bool:
    kind = {"string": str, "boolean": bool, "integer": int, "array": list}[rule["type"]]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        return False
    if isinstance(value, str):
        return rule.get("minLength", 0) <= len(value) <= rule.get("maxLength", math.inf) and value in rule.get("enum", [value])
    if isinstance(value, list):
        fitting = rule.get("minItems", 0) <= len(value) <= rule.get("maxItems", math.inf)
        return fitting and all(_fits(v, rule["items"]) for v in value)
    return isinstance(value, bool) or rule.get("minimum", -math.inf) <= value <= rule.get("maximum", math.inf)
