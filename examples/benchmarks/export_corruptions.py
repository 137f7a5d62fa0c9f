"""Corrupted exports, and what each measure of `hf-e5 verify` says of them.

    python examples/benchmarks/export_corruptions.py

SmolLM2-135M with a random LoRA adapter, merged into bfloat16 and as an adapter on a bfloat16 base, which has the same
other files. Prints a Markdown table for each; "old" is the check that was there before: the largest difference to the
checkpoint, at most 1e-2.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from corruptions import FILES, KINDS, OTHER_BASE, WEIGHTS, corrupt, export, make_checkpoint
from step_common import default_model

from hf_e5.export.settings import ExportSettings, merge_and_cast
from hf_e5.export.verify import BOUND, Probes, disagreements, load_exported, max_difference
from hf_e5.modeling.encoder import E5Model


OLD_BOUND = 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder, Hub id or .gguf file (default: SmolLM2-135M)")
    parser.add_argument("--std", type=float, default=0.05, help="of the random lora_B")
    args = parser.parse_args()
    for kind, (merge, dtype) in KINDS.items():
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            checkpoint = make_checkpoint(args.model or default_model(), dtype, work, args.std)
            right = export(checkpoint, work / "right", merge)
            settings = ExportSettings.read(right)
            model = E5Model.from_pretrained(checkpoint, dtype=torch.float32)
            probes = Probes.of(model.tokenizer, settings)
            trained = probes.encode(model)
            with model.backbone.disable_adapter():
                print(f"\n{kind}; the adapter: {probes.drift(probes.encode(model), trained)}\n")
            merge_and_cast(model, settings)
            reference = probes.encode(model.float()) if merge else trained
            print("| corruption | largest difference | smallest cosine | to the checkpoint | old check, 1e-2 "
                  "| fidelity, 1e-5 | stored settings |\n|---|---|---|---|---|---|---|")  # fmt: skip
            for name in ["none (right)", *WEIGHTS, OTHER_BASE, *(FILES if merge else [])]:
                corrupted = name != "none (right)"
                folder = corrupt(name, checkpoint, right, work / "corrupted", merge) if corrupted else right
                exported = load_exported(folder)
                vectors = probes.encode_exported(exported)
                fidelity, cosine = max_difference(vectors, reference), torch.cosine_similarity(vectors, reference)
                old = (vectors - trained).abs().max().item()
                caught = (old > OLD_BOUND, fidelity > BOUND, bool(disagreements(exported, probes)))
                marks = " | ".join("caught" if found else "passes" for found in caught)
                print(f"| {name} | {fidelity:.1e} | {cosine.min():.6f} | {old:.1e} | {marks} |", flush=True)
                for leftover in work.glob("corrupted*"):
                    shutil.rmtree(leftover)


if __name__ == "__main__":
    main()
