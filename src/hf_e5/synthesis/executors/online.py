"""Requests are answered one by one, a fixed number of them at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from ..client import ChatClient
from ..plan import Request
from ..run import SynthesisRun


_PAUSE = 0.05  # seconds until a worker asks again for a request that depends on answers under way


class OnlineExecutor:
    """Answers requests with at most `concurrency` of them under way."""

    def __init__(self, synthesis: SynthesisRun, client: ChatClient, concurrency: int) -> None:
        self.synthesis = synthesis
        self.client = client
        self.concurrency = concurrency

    async def run(self) -> None:
        # All workers draw from one iterator, so there is no queue.
        requests = self.synthesis.requests()
        workers = [asyncio.create_task(self._work(requests)) for _ in range(self.concurrency)]
        try:
            await asyncio.gather(*workers)
        except Exception as error:
            self.synthesis.budget.stop(str(error), failed=True)
            # The other workers store the answers under way, which are paid for.
            await asyncio.gather(*workers, return_exceptions=True)
            raise

    async def _work(self, requests: Iterator[Request | None]) -> None:
        for request in requests:
            if request is None:
                await asyncio.sleep(_PAUSE)
            else:
                await self._answer(request)

    async def _answer(self, request: Request) -> None:
        """Ask until the request is done, or the budget closes."""
        synthesis, budget = self.synthesis, self.synthesis.budget
        while request.id not in synthesis.store.done and await budget.has_room():
            call = synthesis.plan.call(request, synthesis.store.next_attempt(request.id))
            expected = synthesis.prices.expected(call)
            budget.start(*expected)
            try:
                await synthesis.record(request, call.attempt, await self.client.ask(call))
            finally:
                budget.finish(*expected)
