"""The executors answer the requests of a run: one by one (`online`), or through the OpenAI Batch API (`batch`)."""

from typing import Protocol


class Executor(Protocol):
    """Works on a `SynthesisRun`."""

    async def run(self) -> None:
        """Answer every request of the run; returns early when the budget closes or the user interrupts."""
