"""Requests that keep coming, whatever becomes of those before."""

import asyncio
import json
import threading
import time
from collections import Counter

import aiohttp


class Load:
    """POSTs `body` to `url` at a rate, from a thread of its own, until the block ends; then `answers` has them all.

    An answer is (second since the start when it was due, status or the error's name, its model or what else it says).
    """

    def __init__(self, url: str, body: dict, rate: float) -> None:
        self._url, self._body, self._rate = url, body, rate
        self._ended = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.answers: list[tuple[float, int | str, str]] = []

    def __enter__(self) -> "Load":
        self.started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def statuses(self) -> Counter:
        """How many answers of each status."""
        return Counter(status for _, status, _ in self.answers)

    def models(self) -> list[str]:
        """The versions that answered, in the order in which requests were due."""
        return [model for _, status, model in sorted(self.answers) if status == 200]

    async def _run(self) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session, asyncio.TaskGroup() as group:
            sent = 0
            while not self._ended.is_set():
                due = sent / self._rate
                await asyncio.sleep(self.started + due - time.monotonic())
                group.create_task(self._ask(session, due))
                sent += 1

    async def _ask(self, session: aiohttp.ClientSession, due: float) -> None:
        try:
            async with session.post(self._url, json=self._body) as response:
                text = await response.text()
                is_ours = response.content_type == "application/json"
                model = json.loads(text).get("model", "") if is_ours else f"not JSON: {text[:200]}"
                self.answers.append((due, response.status, model))
        except (aiohttp.ClientError, TimeoutError) as error:
            self.answers.append((due, type(error).__name__, ""))
