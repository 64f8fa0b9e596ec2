"""Clients that keep asking a fleet, half of them for streams, until they are told to stop; and what they got."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import aiohttp

from tests.fleets import Fleet

ANSWER_TOKENS = 8
PATIENCE_S = 180


@dataclass
class Result:
    """What the clients got so far."""

    answered: int = 0
    streamed: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def asked(self) -> int:
        return self.answered + self.streamed + len(self.failures)


async def _ask(session: aiohttp.ClientSession, fleet: Fleet, *, stream: bool) -> None:
    body = {
        "model": "chat",
        "messages": [{"role": "user", "content": "Name three colours."}],
        "max_tokens": ANSWER_TOKENS,
        "ignore_eos": True,
        "temperature": 0,
        "stream": stream,
    }
    async with session.post(f"{fleet.gateway}/v1/chat/completions", json=body) as answer:
        text = await answer.text()
        if answer.status != 200:
            raise ValueError(f"{answer.status}: {text[:300]}")
    if not stream:
        tokens = json.loads(text)["usage"]["completion_tokens"]
        if tokens != ANSWER_TOKENS:
            raise ValueError(f"{tokens} tokens")
        return
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise ValueError(f"a broken stream: {text[-300:]}")
    reasons = [choice["finish_reason"] for event in events[:-1] for choice in json.loads(event)["choices"]]
    if reasons[-1] != "length":
        raise ValueError(f"a stream that ended with {reasons[-1]}")


async def _client(fleet: Fleet, result: Result, goes_on: Callable[[], bool], *, stream: bool) -> None:
    headers = {"Authorization": f"Bearer {fleet.key}"}
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        while goes_on():
            try:
                await _ask(session, fleet, stream=stream)
            except (aiohttp.ClientError, TimeoutError, ValueError, LookupError) as error:
                result.failures.append(f"{type(error).__name__}: {error}")
            else:
                if stream:
                    result.streamed += 1
                else:
                    result.answered += 1


@contextmanager
def load(fleet: Fleet, clients: int, at_least: int = 0) -> Iterator[Result]:
    """Keep `clients` clients asking until the block ends and at least so many requests were made."""
    result = Result()
    ended = threading.Event()

    async def work() -> None:
        def goes_on() -> bool:
            return not ended.is_set() or result.asked < at_least

        await asyncio.gather(*(_client(fleet, result, goes_on, stream=n % 2 == 0) for n in range(clients)))

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    try:
        yield result
    finally:
        ended.set()
        thread.join()
