"""Answers one by one, many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from .client import ChatClient
from .job import Job
from .plan import Request


_PAUSE = 0.05  # seconds between two looks for a request that waits for answers under way


class OnlineExecutor:
    """Works off requests with at most `concurrency` of them under way."""

    def __init__(self, job: Job, client: ChatClient, concurrency: int) -> None:
        self.job = job
        self.client = client
        self.concurrency = concurrency

    async def work_off(self, requests: Iterator[Request | None]) -> None:
        """Answer every request of the stream (`Job.requests`)."""
        workers = [asyncio.create_task(self._work(requests)) for _ in range(self.concurrency)]
        try:
            await asyncio.gather(*workers)
        except Exception as error:
            self.job.budget.stop(str(error), failed=True)
            # The others bring home what is paid for.
            await asyncio.gather(*workers, return_exceptions=True)
            raise

    async def _work(self, requests: Iterator[Request | None]) -> None:
        # All workers draw from one iterator: nothing is queued, whatever the size of the plan.
        for request in requests:
            if request is None:
                await asyncio.sleep(_PAUSE)
            else:
                await self._answer(request)

    async def _answer(self, request: Request) -> None:
        """Ask until the request is done, or the budget closes."""
        attempt, last = self.job.attempts(request)
        done = False
        while not done and await self.job.budget.has_room():
            call = self.job.call(request, attempt)
            expected = sum(call.expected_tokens), self.job.expected_usd(call)
            self.job.budget.start(*expected)
            try:
                answer = await self.client.ask(call)
                done = await self.job.keep(request, attempt, last, answer)
            finally:
                self.job.budget.finish(*expected)
            attempt += 1
