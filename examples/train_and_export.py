"""Train from Python, export, load: the same as the recipe and `hf-e5 export`, in a dozen lines.

    python examples/train_and_export.py MODEL [OUT]

MODEL is a Hub id, a folder or a .gguf file. Twenty short steps show the way; they do not make a good model.
"""

import sys

from peft import LoraConfig
from sentence_transformers import SentenceTransformer

from hf_e5 import E5Model, E5Trainer, E5TrainingArguments, export_sentence_transformer, load_mixture


def main(base: str, out: str = "outputs/example") -> None:
    # 1. The model: a decoder with a fresh LoRA adapter; only the adapter trains.
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    model = E5Model.from_pretrained(base, peft_config=lora)

    # 2. The data: columns instruction, query, positive, negative. Also a Hub id, a built folder or a mixture YAML.
    rows = load_mixture("examples/data/triplets.jsonl")

    # 3. Training: the paper's settings, but for what fits twenty steps.
    args = E5TrainingArguments(
        output_dir=f"{out}/checkpoint",
        per_device_train_batch_size=16,
        query_max_length=64,
        passage_max_length=64,
        max_steps=20,
        learning_rate=3e-3,
        warmup_steps=2,
    )
    trainer = E5Trainer(model, args, train_dataset=rows)
    trainer.train()
    trainer.save_model()

    # 4. Export: written, loaded and compared with the checkpoint before the folder gets its name.
    print(export_sentence_transformer(f"{out}/checkpoint", f"{out}/model", merge=True))

    # 5. Use
    embedder = SentenceTransformer(f"{out}/model")
    documents = embedder.encode_document(["K2 is 8,611 metres high.", "Bread needs flour, water, salt and yeast."])
    print(embedder.similarity(embedder.encode_query("how tall is K2"), documents))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:3])
