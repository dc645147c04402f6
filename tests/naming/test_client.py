"""The client against a real HTTP server: retries, bounds, and what is an answer."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsae.errors import ServiceError
from medsae.naming.client import Answer, ChatClient, follows, parse_answer
from medsae.naming.judges import list_schema
from medsae.naming.prompts import NAME_ANSWER
from tests.support.scripted import Script, chat, scripted_server

GOOD = {"description": "Fluid.", "shared": True, "concept": "pleural effusion", "kind": "finding", "confidence": 80}
QUESTION: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def url(script: Script) -> Iterator[str]:
    with scripted_server(script) as address:
        yield address


def ask(url: str, **options: Any) -> tuple[Answer, ChatClient]:
    async def run() -> tuple[Answer, ChatClient]:
        async with ChatClient(url, backoff=0.01, **options) as client:
            return await client.ask(QUESTION, schema=NAME_ANSWER), client

    return asyncio.run(run())


def test_429_503_and_500_are_asked_again_and_counted(url: str, script: Script) -> None:
    script.faults = [429, 503, 500, chat(json.dumps(GOOD))]
    answer, client = ask(url, retries=3)
    assert answer.ok
    assert answer.value == GOOD
    assert answer.attempts == 4
    assert client.usage.retries == 3
    assert client.usage.cached_tokens == 60


def test_retries_end(url: str, script: Script) -> None:
    script.faults = [503] * 5
    answer, client = ask(url, retries=2)
    assert (answer.status, answer.attempts, answer.transient) == ("http 503", 3, True)
    assert script.requests == 3
    assert client.usage.failed == 1


def test_a_service_that_is_gone_is_given_up(url: str, script: Script) -> None:
    async def run() -> None:
        async with ChatClient(url, backoff=0.001, retries=1, give_up=3, concurrency=1) as client:
            for _ in range(9):
                await client.ask(QUESTION, schema=NAME_ANSWER)

    script.faults = [503, 503, 400, *[503] * 9]
    with pytest.raises(ServiceError, match=r"stopped answering \(http 503, 3 requests in a row\): what it answered is kept"):
        asyncio.run(run())
    # One lost, one refused (an answer), three lost.
    assert script.requests == 2 + 1 + 6


def test_a_refusal_is_not_asked_again(url: str, script: Script) -> None:
    script.faults = [400]
    answer, _ = ask(url, retries=5)
    assert (answer.status, answer.attempts, answer.transient) == ("refused", 1, False)


def test_requests_in_flight_are_bounded(url: str, script: Script) -> None:
    script.delay = 0.02
    script.faults = [chat("x")] * 0

    async def run() -> None:
        async with ChatClient(url, concurrency=3, retries=0) as client:
            await asyncio.gather(*(client.ask(QUESTION, choices=("0", "1")) for _ in range(20)))

    script.faults = [chat("1") for _ in range(20)]
    asyncio.run(run())
    assert script.requests == 20
    assert script.most_in_flight <= 3


def test_nobody_there_is_one_line() -> None:
    with pytest.raises(ServiceError, match=r"no naming service answers at http://127\.0\.0\.1:9"):
        ask("http://127.0.0.1:9")


def test_a_wrong_key_is_said(url: str, script: Script) -> None:
    script.key = "right"
    answer, _ = ask(url, api_key="wrong", retries=1)
    assert answer.status == "http 401"
    assert ask(url, api_key="right", retries=0)[0].status != "http 401"


def test_a_server_that_is_lost_in_the_middle_is_a_status(script: Script) -> None:
    async def run() -> Answer:
        with scripted_server(script) as url:
            client = await ChatClient(url, retries=1, backoff=0.01).__aenter__()
        try:
            return await client.ask(QUESTION, schema=NAME_ANSWER)
        finally:
            await client.__aexit__(None, None, None)

    assert asyncio.run(run()).status == "connection"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (json.dumps(GOOD), "ok"),
        ("not json", "schema"),
        ("", "schema"),
        ("[]", "schema"),
        (json.dumps({**GOOD, "kind": "mood"}), "schema"),
        (json.dumps({**GOOD, "confidence": 101}), "schema"),
        (json.dumps({**GOOD, "confidence": True}), "schema"),
        (json.dumps({**GOOD, "shared": "yes"}), "schema"),
        (json.dumps({**GOOD, "concept": ""}), "schema"),
        (json.dumps({**GOOD, "concept": "x" * 81}), "schema"),
        (json.dumps({**GOOD, "more": 1}), "schema"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "kind"}), "schema"),
    ],
)
def test_only_what_follows_the_schema_is_an_answer(text: str, status: str) -> None:
    answer = parse_answer(chat(text), NAME_ANSWER, None)
    assert answer.status == status
    assert (answer.value is None) == (status != "ok")


def test_a_cut_off_answer_is_none_even_if_it_parses() -> None:
    assert parse_answer(chat(json.dumps(GOOD), finish="length"), NAME_ANSWER, None).status == "truncated"


@pytest.mark.parametrize("body", [None, [], {}, {"choices": []}, {"choices": [{"message": {}}]}, {"choices": [{"message": None}]}])
def test_a_body_of_another_shape_is_a_failure(body: object) -> None:
    assert parse_answer(body, NAME_ANSWER, None).status == "schema"


def test_probabilities_are_those_of_the_choices_among_themselves() -> None:
    answer = parse_answer(chat("1", logprobs={"1": 0.6, "0": 0.2, "yes": 0.2}), None, ("0", "1"))
    assert answer.probabilities == pytest.approx({"0": 0.25, "1": 0.75})
    assert parse_answer(chat("1"), None, ("0", "1")).probabilities is None
    assert parse_answer(chat("maybe"), None, ("0", "1")).status == "schema"


@given(st.lists(st.integers(-1, 2), max_size=7))
def test_lists_follow_their_schema(values: list[int]) -> None:
    right = len(values) == 5 and all(v in (0, 1) for v in values)
    assert (follows(json.dumps({"shown": values}), list_schema(5)) is not None) == right


def test_a_missing_second_choice_has_probability_zero() -> None:
    answer = parse_answer(chat("1", logprobs={"1": 1.0}), None, ("0", "1"))
    assert answer.probabilities == {"0": 0.0, "1": 1.0}
    assert not math.isnan(sum(answer.probabilities.values()))
