"""Write a few training examples with any OpenAI-compatible server, and look at them.

export OPENAI_API_KEY=...                                # OpenAI
python examples/synthesize.py --model gpt-4o-mini

vllm serve Qwen/Qwen3-8B                                 # or a server of your own: vLLM, llama.cpp, transformers
python examples/synthesize.py --model Qwen/Qwen3-8B --base_url http://localhost:8000/v1
"""

import argparse

from hf_e5 import synthesize
from hf_e5.records import read_rows


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", required=True)
parser.add_argument("--base_url")
parser.add_argument("--output", default="outputs/synthesize")
args = parser.parse_args()

# 1. Say what to generate. What is left out is as in the paper: six task types, 93 languages, all placeholders.
config = {"num_examples": 20, "mixture": {"short_long": 2, "sts": 1}, "languages": {"en": 3, "de": 1, "sw": 1}}

# 2. Generate. Running this again goes on where it stopped and asks for nothing twice.
result = synthesize(config, args.output, models={args.model: 1.0}, base_url=args.base_url, concurrency=8)

# 3. Look at what came back.
for record in read_rows(result.folder / "records.jsonl"):
    print(f"\n[{record['task_type']}, {record['language']}] {record['instruction']}")
    for field in ("query", "positive", "negative"):
        print(f"  {field:<10}{record[field][:150]}")
print(f"\n{result.examples} examples, {result.failures} failures; all answers and what they cost: {result.folder}")
