"""What the tests of the step share: rows that hit every corner, and plain autograd to compare with."""

import random

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from hf_e5.modeling.encoder import E5Model
from hf_e5.training.gradcache import ContrastiveStep
from hf_e5.training.objective import ContrastiveObjective
from support import lora_config


def make_model(checkpoint, *, use_peft=True, dropout=0.0, dtype=torch.float32):
    torch.manual_seed(0)
    config = lora_config(lora_dropout=dropout)
    model = E5Model.from_pretrained(checkpoint, dtype=dtype, peft_config=config if use_peft else None)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def make_rows(count, *, seed=0, longest=60, instructions=3):
    """Rows of random tokens with shared instructions, texts that repeat, one-token texts, 0 to 2 negatives."""
    generator = random.Random(seed)

    def text(low=1):
        return [generator.randrange(2, 500) for _ in range(generator.randint(low, longest))]

    prompts = [[0, *text(8)][:20] for _ in range(instructions)]
    documents = [text() for _ in range(2 * count)]  # drawn with replacement: some stand in several rows
    rows = []
    for number in range(count):
        prompt = prompts[number % instructions]
        rows.append(
            {
                "query_ids": prompt + text(),
                "query_prefix_length": len(prompt),
                "positive_ids": generator.choice(documents),
                "negative_ids": [generator.choice(documents) for _ in range(number % 3)],
            }
        )
    rows.append({**rows[0], "positive_ids": [7]})  # the first query again, with another positive of one token
    return rows


def make_step(model, accelerator=None, *, mini_batch_num_tokens=150, keep_graph_num_tokens=0, **changes):
    options = {"temperature": 0.05, "gather_across_devices": True, "mask_duplicates": True, **changes}
    return ContrastiveStep(
        model,
        ContrastiveObjective(**options),
        accelerator or Accelerator(cpu=True),
        mini_batch_num_tokens=mini_batch_num_tokens,
        keep_graph_num_tokens=keep_graph_num_tokens,
    )


def run_step(model, batch, **changes):
    model.zero_grad()
    output = make_step(model, **changes)(batch)
    return output, {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


def reference(model, rows, mask_duplicates=True, temperature=0.05):
    """Every text of every row in one padded float64 forward, explicit masks, one backward."""
    model.zero_grad()
    dtype = model.dtype
    model.backbone.double()
    texts = [row["query_ids"] for row in rows] + [row["positive_ids"] for row in rows]
    texts += [ids for row in rows for ids in row["negative_ids"]]
    batch = model.tokenizer.pad({"input_ids": texts}, return_tensors="pt")
    hidden = model.backbone(**batch).last_hidden_state
    places = torch.arange(hidden.shape[1]).expand(len(texts), -1)
    last = places.masked_fill(batch["attention_mask"] == 0, -1).amax(1)
    vectors = F.normalize(hidden[torch.arange(len(texts)), last], dim=-1)
    queries, documents, document_texts = vectors[: len(rows)], vectors[len(rows) :], texts[len(rows) :]
    logits = queries @ documents.T / temperature
    if mask_duplicates:
        positives = {}
        for row in rows:
            positives.setdefault(tuple(row["query_ids"]), []).append(row["positive_ids"])
        for i, row in enumerate(rows):
            for j, ids in enumerate(document_texts):
                repeats = document_texts.index(ids) != j and ids != row["positive_ids"]
                is_positive = ids in positives[tuple(row["query_ids"])]
                if i != j and (repeats or is_positive):
                    logits[i, j] = -torch.inf
    loss = F.cross_entropy(logits, torch.arange(len(rows)))
    loss.backward()
    grads = {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}
    model.to(dtype).zero_grad()
    return loss.item(), grads


def relative_error(grads, expected):
    return max(((grads[name] - value).norm() / value.norm()).item() for name, value in expected.items())


def flat_error(grads, expected):
    """Relative error of the gradient as one vector: direction and length together."""
    flat, expected_flat = (
        torch.cat([part[name].flatten().double() for name in expected]) for part in (grads, expected)
    )
    return ((flat - expected_flat).norm() / expected_flat.norm()).item()
