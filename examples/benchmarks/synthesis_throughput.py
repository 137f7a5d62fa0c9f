"""Examples per second, side by side on one server: hf-e5, an ideal client, and distilabel's E5 tasks.

    python examples/benchmarks/synthesis_throughput.py
    python examples/benchmarks/synthesis_throughput.py --distilabel path/to/venv/bin/python

The server answers after a log-normal wait. The ideal client is aiohttp in a loop with nothing else to do: no parsing,
no store. distilabel (`GenerateTextRetrievalData` in a pipeline, all rows of an input batch at once) runs in an
environment of its own, because it needs older libraries; its time is given with and without its start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
from llm_server import running_server

from hf_e5.synthesis.capabilities import ServerCapabilities
from hf_e5.synthesis.config import load_config
from hf_e5.synthesis.pipeline import synthesize
from hf_e5.synthesis.plan import Plan, Task


def run_ours(url: str, number: int, concurrency: int) -> float:
    """Return examples per second of a whole run, brainstorms and probe included, imports not."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        config = {"num_examples": number, "mixture": {"short_long": 1}}
        result = synthesize(config, folder, models={"m": 1.0}, base_url=url, concurrency=concurrency)
        assert result.examples == number
        return number / (time.monotonic() - start)


def run_ideal(url: str, number: int, concurrency: int) -> float:
    """Return requests per second of a client that only sends the same requests and reads the replies."""
    plan = Plan(load_config({"num_examples": number, "mixture": {"short_long": 1}, "models": ["m"]}))
    tasks = [Task("Given a question, retrieve documents that answer it.", "science")]
    bodies = []
    for position in plan.positions():
        call = plan.call(plan.example(position, tasks))
        bodies.append(json.dumps(ServerCapabilities().body(call, plan.config)).encode())

    async def main() -> float:
        connector = aiohttp.TCPConnector(limit=concurrency)
        async with aiohttp.ClientSession(connector=connector) as session:
            waiting = iter(bodies)

            async def worker() -> None:
                for body in waiting:
                    async with session.post(f"{url}/chat/completions", data=body) as response:
                        await response.read()

            start = time.monotonic()
            await asyncio.gather(*(worker() for _ in range(concurrency)))
            return number / (time.monotonic() - start)

    return asyncio.run(main())


DISTILABEL = """
import os, sys, time
os.environ["OPENAI_API_KEY"] = "none"
started = time.monotonic()
from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import GenerateTextRetrievalData

def main():
    url, number, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rows = [{"task": f"Given question {i}, retrieve documents that answer it."} for i in range(number)]
    with Pipeline("e5") as pipeline:
        load = LoadDataFromDicts(data=rows, batch_size=batch)
        task = GenerateTextRetrievalData(
            language="English", query_type="common", query_length="5 to 15 words", clarity="clear", num_words=50,
            difficulty="college", input_batch_size=batch,
            llm=OpenAILLM(model="m", base_url=url, api_key="none", generation_kwargs={"temperature": 1.0}),
        )
        load >> task
    begin = time.monotonic()
    data = pipeline.run(use_cache=False)["default"]["train"]
    assert len(data) == number and all(data["user_query"]), len(data)
    print("RESULT", time.monotonic() - begin, time.monotonic() - started)

if __name__ == "__main__":
    main()
"""


def run_distilabel(python: str, url: str, number: int, batch: int) -> tuple[float, float]:
    """Return examples per second in the pipeline, and with importing distilabel counted in."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "distilabel_e5.py"
        script.write_text(DISTILABEL)
        command = [python, "-W", "ignore", str(script), url, str(number), str(batch)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=550)
        results = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
        if not results:
            sys.exit(f"distilabel failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        inside, whole = map(float, results[0].split()[1:])
        return number / inside, number / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--latency", type=float, default=1.0, help="median seconds per answer")
    parser.add_argument("--spread", type=float, default=0.5, help="sigma of the log-normal latency")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--distilabel", metavar="PYTHON", help="interpreter of an environment with distilabel[openai]")
    parser.add_argument(
        "--input_batch_size", type=int, nargs="+", default=[50], help="of distilabel, whose default is 50"
    )
    parser.add_argument("--distilabel_examples", type=int, default=2000)
    args = parser.parse_args()
    with running_server(latency=args.latency, spread=args.spread) as url:
        print(f"{args.concurrency} requests at once, {args.latency:g} s median latency (sigma {args.spread:g})")
        for _ in range(args.rounds):
            ideal = run_ideal(url, args.examples, args.concurrency)
            ours = run_ours(url, args.examples, args.concurrency)
            print(f"ideal client {ideal:6.1f}/s   hf-e5 {ours:6.1f}/s   ratio {ours / ideal:.2f}")
        if args.distilabel:
            for batch in args.input_batch_size:
                inside, whole = run_distilabel(args.distilabel, url, args.distilabel_examples, batch)
                ours = run_ours(url, args.distilabel_examples, args.concurrency)
                print(
                    f"distilabel   {inside:6.1f}/s ({whole:.1f}/s with its start, input_batch_size {batch})   "
                    f"hf-e5 {ours:6.1f}/s   ratio {ours / inside:.1f}"
                )


if __name__ == "__main__":
    main()
