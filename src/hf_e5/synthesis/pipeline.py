"""`synthesize`: from a configuration to a folder of records."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError
from ..files import whole_file
from .capabilities import ServerCapabilities
from .client import ChatClient, Unavailable
from .config import SynthesisConfig, load_config
from .cost import BATCH_DISCOUNT, Budget, PriceList
from .executors import Executor
from .executors.batch import BatchExecutor
from .executors.online import OnlineExecutor
from .plan import Plan
from .run import SynthesisRun
from .store import AnswerStore


SERVER_NAME = "server.json"


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class SynthesisOptions:
    """The keyword arguments of `synthesize`; those with a `help` text are flags of `hf-e5 synthesize` as they are."""

    models: dict[str, float] | None = None
    base_url: str | None = _option(None, "OpenAI-compatible server, e.g. http://localhost:8000/v1")
    seed: int = _option(0, "the same seed plans the same requests")
    shard: tuple[int, int] = (0, 1)
    max_examples: int | None = _option(None, "stop after the first N examples of the plan")
    max_usd: float | None = _option(None, "stop when the folder has cost this much")
    max_tokens: int | None = _option(None, "stop when the folder has used this many tokens")
    concurrency: int = _option(64, "requests at once")
    requests_per_minute: float | None = _option(None, "upper limit on what is sent")
    tokens_per_minute: float | None = _option(None, "upper limit on what is sent")
    mode: Literal["online", "batch"] = _option("online", "batch: OpenAI Batch API")
    retry_failures: bool = _option(False, "ask again for what is in failures.jsonl")
    poll_seconds: float = 30.0

    def __post_init__(self) -> None:
        number, of = self.shard
        if not 0 <= number < of:
            raise InputError(f"shard {number}/{of}: expected i/n with i from 0 to n - 1")
        if self.concurrency < 1:
            raise InputError(f"concurrency {self.concurrency}: expected 1 or more")
        for name in ("max_examples", "max_usd", "max_tokens", "requests_per_minute", "tokens_per_minute"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise InputError(f"{name} {value}: expected a positive number")


@dataclass(frozen=True)
class SynthesisResult:
    """What a folder holds after a run: counts over all its runs, tokens and USD spent, why the run ended early."""

    folder: Path
    planned: int
    examples: int
    failures: int
    prompt_tokens: int
    completion_tokens: int
    usd: float
    reason: str | None
    failed: bool


def synthesize(
    config: str | Path | dict[str, Any] | SynthesisConfig,
    output: str | Path,
    *,
    models: dict[str, float] | None = None,
    base_url: str | None = None,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    max_examples: int | None = None,
    max_usd: float | None = None,
    max_tokens: int | None = None,
    concurrency: int = 64,
    requests_per_minute: float | None = None,
    tokens_per_minute: float | None = None,
    mode: Literal["online", "batch"] = "online",
    retry_failures: bool = False,
    poll_seconds: float = 30.0,
) -> SynthesisResult:
    """Generate records with an LLM (paper, section 3.1), or go on where an earlier run in the folder ended.

    Only `seed` and `shard` change what is planned.

    Args:
        config: a YAML file, or the same as a mapping (`SynthesisConfig`).
        output: the folder for `records.jsonl` and `failures.jsonl`; `store` tells what else is in it.
        models: model names and their shares of the calls; replaces those of the configuration.
        base_url: address of an OpenAI-compatible server; `OPENAI_BASE_URL` or OpenAI itself when None.
        seed: two runs with one configuration and seed plan the same.
        shard: `(i, n)`: this machine's part of the plan; the outputs of all n concatenate.
        max_examples: stop after this many of the plan's examples.
        max_usd: stop when all runs in the folder together have cost this many USD.
        max_tokens: stop when all runs in the folder together have used this many tokens.
        concurrency: requests under way at once.
        requests_per_minute: upper limit on the requests that are sent.
        tokens_per_minute: upper limit on their tokens, prompt and answer.
        mode: `online`, or `batch` for the OpenAI Batch API.
        retry_failures: ask again for the examples in `failures.jsonl`.
        poll_seconds: how often `batch` polls its batches.

    Raises:
        InputError: wrong configuration, key, model or address, or a folder that was begun with another plan.
    """
    options = SynthesisOptions(**{name: value for name, value in locals().items() if name not in ("config", "output")})
    main = partial(_run, make_plan(config, options), Path(output), options)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    with ThreadPoolExecutor(1) as thread:  # a notebook runs a loop of its own
        return thread.submit(lambda: asyncio.run(main())).result()


def make_plan(config: str | Path | dict[str, Any] | SynthesisConfig, options: SynthesisOptions) -> Plan:
    """Return the plan of a run.

    Raises:
        InputError: wrong configuration, no model is named, or a budget in USD is set for a model without a price.
    """
    loaded = load_config(config, models=options.models)
    if not loaded.models:
        raise InputError("models: name one as an argument or in the configuration")
    prices = PriceList(loaded.prices)
    unpriced = [model for model in loaded.models if prices.find(model) is None]
    if options.max_usd is not None and unpriced:
        hint = f"prices: {{{unpriced[0]}: [IN, OUT]}}"
        raise InputError(f"max_usd: no price is known for {unpriced[0]}; add `{hint}` (USD per million tokens)")
    return Plan(loaded, options.seed, options.shard)


async def _run(plan: Plan, folder: Path, options: SynthesisOptions) -> SynthesisResult:
    config, batched = plan.config, options.mode == "batch"
    async with AsyncExitStack() as stack:
        client = ChatClient(
            options.base_url,
            config,
            requests_per_minute=options.requests_per_minute,
            tokens_per_minute=options.tokens_per_minute,
        )
        stack.push_async_callback(client.close)
        store = AnswerStore(folder, plan.identity)
        stack.callback(store.close)
        stack.push_async_callback(store.drain)
        if options.retry_failures:
            store.reopen_failures()
        budget = Budget(store, options.max_usd, options.max_tokens)
        synthesis = SynthesisRun(plan, store, budget, options.max_examples, BATCH_DISCOUNT if batched else 1.0)
        stack.callback(synthesis.close)
        client.capabilities.update(_load_capabilities(folder, client.base_url))
        stack.callback(_save_capabilities, folder, client)
        _stop_on_signals(budget)
        try:
            for model in config.models:
                if model not in client.capabilities and budget.is_open():
                    await client.probe(model, synthesis.record_probe)
                    _save_capabilities(folder, client)
            executor: Executor = (
                BatchExecutor(synthesis, client, options.poll_seconds)
                if batched
                else OnlineExecutor(synthesis, client, options.concurrency)
            )
            await executor.run()
        except Unavailable as error:
            budget.stop(str(error), failed=True)
    return SynthesisResult(
        folder=folder,
        planned=synthesis.num_examples,
        examples=store.examples,
        failures=len(store.failed),
        prompt_tokens=store.prompt_tokens,
        completion_tokens=store.completion_tokens,
        usd=store.usd,
        reason=budget.reason,
        failed=budget.failed,
    )


def _stop_on_signals(budget: Budget) -> None:
    """Let the first Ctrl-C (or SIGTERM) end the run after the answers under way; the second one ends it at once."""
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        budget.stop("interrupted", interrupted=True)
        loop.remove_signal_handler(number)
        print("\nstopping after the answers under way; once more to stop at once", file=sys.stderr)

    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError, RuntimeError, ValueError):  # not the main thread, or Windows
            loop.add_signal_handler(number, stop, number)


def _load_capabilities(folder: Path, base_url: str | None) -> dict[str, ServerCapabilities]:
    try:
        saved = json.loads((folder / SERVER_NAME).read_text(encoding="utf-8"))
        if saved["base_url"] == base_url:
            return {model: ServerCapabilities(**values) for model, values in saved["models"].items()}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing known: the server is probed again
    return {}


def _save_capabilities(folder: Path, client: ChatClient) -> None:
    models = {model: asdict(capabilities) for model, capabilities in client.capabilities.items()}
    with whole_file(folder / SERVER_NAME, "w") as file:
        file.write(json.dumps({"base_url": client.base_url, "models": models}, indent=2) + "\n")
