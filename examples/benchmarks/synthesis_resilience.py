"""Synthesis against a server that fails in every way, and under kill -9.

    python examples/benchmarks/synthesis_resilience.py --examples 10000 --kills 20

Every fault of `llm_server.py` hits 5 % of the requests: 429, 500, 503, time-outs, dropped connections, bodies that are
no JSON, malformed answers, truncated answers, answers of the wrong shape. The run is killed `--kills` times at random
moments and started again. In the end every planned example must be in `records.jsonl` or `failures.jsonl`, once.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from llm_server import running_server, stats

from hf_e5.records import read_rows
from hf_e5.synthesis.config import load_config
from hf_e5.synthesis.plan import Plan


def account(folder: Path, config: dict) -> dict[str, int]:
    """Compare a finished folder with its plan; raises AssertionError if an example is missing or there twice."""
    plan = Plan(load_config(config))
    planned = {plan.example_id(position) for position in plan.positions()}
    records = [row["id"] for row in read_rows(folder / "records.jsonl")]
    failures = [row["id"] for row in read_rows(folder / "failures.jsonl") if row["kind"] == "example"]
    seen = Counter(records + failures)
    assert set(seen) == planned, f"{len(planned - set(seen))} lost, {len(set(seen) - planned)} not planned"
    assert max(seen.values()) == 1, f"{sum(count > 1 for count in seen.values())} examples twice"
    answered = Counter(row["id"] for row in read_rows(folder / "answers.jsonl") if row["error"] is None)
    assert max(answered.values()) == 1, "a request was answered and asked again"
    return {"planned": len(planned), "records": len(records), "failures": len(failures)}


def run(folder: Path, config: Path, url: str, concurrency: int, kill_after: float | None) -> bool:
    """Run the command; kill it `kill_after` seconds after its first new answer. Returns True if it came to its end."""
    command = [sys.executable, "-m", "hf_e5.cli", "synthesize", "--config", str(config), "--model", "mock"]
    command += ["--base_url", url, "--output", str(folder), "--concurrency", str(concurrency)]
    log = folder / "answers.jsonl"
    size = log.stat().st_size if log.exists() else 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while kill_after is not None and process.poll() is None:
        time.sleep(0.02)
        if log.exists() and log.stat().st_size > size:
            time.sleep(kill_after)
            process.kill()
            break
    return process.wait() == 0


def kill_and_resume(
    folder: Path, config: dict, kills: int, concurrency: int, faults: float, latency: float, seed: int = 0
) -> dict[str, int]:
    """Kill a run `kills` times, let it finish, and account for every example."""
    folder.mkdir(parents=True, exist_ok=True)
    config_file = folder / "config.yaml"
    config_file.write_text(json.dumps(config))
    rng = random.Random(seed)
    out, log = folder / "out", folder / "out" / "answers.jsonl"
    killed, kept = 0, b""
    with running_server(faults=faults, latency=latency, seed=seed) as url:
        while killed < kills and not run(out, config_file, url, concurrency, rng.uniform(0.0, 1.5)):
            killed += 1
            content = log.read_bytes()
            assert content.startswith(kept), "a line that was on the disk has changed"
            kept = content[: content.rfind(b"\n") + 1]
        while not run(out, config_file, url, concurrency, None):
            pass
        assert log.read_bytes().startswith(kept), "a line that was on the disk has changed"
        served = stats(url)
    result = account(out, config)
    answered = {row["id"] for row in read_rows(log) if row["error"] is None}
    assert answered <= set(served["served"]), "an answer in the log was never given"
    # What the server had sent when the process died, and no disk ever saw: at most what was under way at the kills.
    again = sum(count - (key in answered) for key, count in served["served"].items() if not key.startswith("probe"))
    assert again <= killed * concurrency
    return {**result, "kills": killed, "under_way_at_kills": again, "outcomes": served["outcomes"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--part", choices=("faults", "kills"), help="default: both")
    parser.add_argument("--faults", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = {"num_examples": args.examples, "timeout": 2, "models": ["mock"]}

    with tempfile.TemporaryDirectory() as temporary:
        if args.part != "kills":
            show_faults(Path(temporary), config, args)
        if args.part != "faults":
            show_kills(Path(temporary), config, args)


def show_faults(folder: Path, config: dict, args: argparse.Namespace) -> None:
    config_file = folder / "config.yaml"
    config_file.write_text(json.dumps(config))
    with running_server(faults=args.faults, latency=0.1, seed=args.seed) as url:
        start = time.monotonic()
        assert run(folder / "faults", config_file, url, args.concurrency, None)
        seconds = time.monotonic() - start
        served = stats(url)
    counts = account(folder / "faults", config)
    repeats = sum(count - 1 for count in served["served"].values())
    print(f"faults: {counts['planned']} planned = {counts['records']} records + {counts['failures']} failures")
    print(f"        {served['requests']} requests in {seconds:.0f} s; statuses {served['statuses']}")
    print(f"        answers with status 200: {served['outcomes']}")
    print(f"        usable answers asked for twice: {repeats}; verdict on the client: {served['verdict']}")
    for finding in served["findings"]:
        print(f"        {finding}")


def show_kills(folder: Path, config: dict, args: argparse.Namespace) -> None:
    start = time.monotonic()
    counts = kill_and_resume(
        folder / "kills", config, args.kills, args.concurrency, args.faults, latency=0.1, seed=args.seed
    )
    seconds = time.monotonic() - start
    print(f"kills:  {counts['kills']} x kill -9 in {seconds:.0f} s", end="; ")
    print(f"{counts['planned']} planned = {counts['records']} records + {counts['failures']} failures")
    print(f"        usable answers under way at a kill, and asked for again: {counts['under_way_at_kills']}")


if __name__ == "__main__":
    main()
