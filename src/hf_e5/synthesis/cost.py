"""When to stop: limits on money and tokens, a server that fails all the time, a user who has had enough."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from .store import AnswerStore


MAX_FAILURES_IN_A_ROW = 100


@dataclass
class Budget:
    """What may be spent in a folder, over all its runs.

    Calls under way are counted at their expected size, so that a limit is passed by one answer at most, or so.

    Attributes:
        reason: why no further request may start; None while the run goes on.
        failed: the reason is a fault, not a limit or a wish.
        interrupted: the user wants the run to end soon.
    """

    store: AnswerStore
    max_usd: float | None = None
    max_tokens: int | None = None
    reason: str | None = field(default=None, init=False)
    failed: bool = field(default=False, init=False)
    interrupted: bool = field(default=False, init=False)
    _usd_under_way: float = field(default=0.0, init=False)
    _tokens_under_way: float = field(default=0.0, init=False)
    _calls_under_way: int = field(default=0, init=False)
    _failures_in_a_row: int = field(default=0, init=False)

    def stop(self, reason: str, *, failed: bool = False, interrupted: bool = False) -> None:
        """Let no further request start. The first reason stays."""
        if self.reason is None:
            self.reason, self.failed = reason, failed
        self.interrupted = self.interrupted or interrupted

    def is_open(self) -> bool:
        """Tell whether the run goes on; closes it when a limit is reached."""
        if self.max_usd is not None and self.store.usd >= self.max_usd:
            self.stop(f"max_usd {self.max_usd:g} is reached")
        if self.max_tokens is not None and self.store.tokens >= self.max_tokens:
            self.stop(f"max_tokens {self.max_tokens} is reached")
        return self.reason is None

    def is_full(self) -> bool:
        """Tell whether what is under way may use up what is left: then it must come home before more starts."""
        return self._calls_under_way > 0 and (
            (self.max_usd is not None and self.store.usd + self._usd_under_way >= self.max_usd)
            or (self.max_tokens is not None and self.store.tokens + self._tokens_under_way >= self.max_tokens)
        )

    async def has_room(self) -> bool:
        """Wait until another call may start; False if the run is to end."""
        while self.is_open() and self.is_full():
            await asyncio.sleep(0.05)
        return self.reason is None

    def start(self, tokens: float, usd: float, calls: int = 1) -> None:
        """Count calls as under way, at what they are expected to take."""
        self._tokens_under_way += tokens
        self._usd_under_way += usd
        self._calls_under_way += calls

    def finish(self, tokens: float, usd: float, calls: int = 1) -> None:
        """Take back what `start` counted: the store has the true numbers by now."""
        self.start(-tokens, -usd, -calls)

    def note(self, error: str | None) -> None:
        """Watch for a server that fails every request: it would spend the budget on nothing."""
        self._failures_in_a_row = self._failures_in_a_row + 1 if error else 0
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            self.stop(f"the last {MAX_FAILURES_IN_A_ROW} answers failed, the last one: {error}", failed=True)
