"""Ways in which an exported folder can be wrong, for the table of `export_corruptions.py` and for the tests.

A corruption of the weights is the export of a changed adapter; any other is a changed file of the right export.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from step_common import load_model

from hf_e5.export.sentence_transformer import export_sentence_transformer
from hf_e5.modeling.encoder import E5Model


Weights = dict[str, torch.Tensor]
KINDS = {"merged into bfloat16": (True, torch.float32), "adapter on a bfloat16 base": (False, torch.bfloat16)}
MAX_LENGTH = 96
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
CHAT = {  # in `sentence_bert_config.json`: a template alone is not applied where that file does not say "message"
    "processor_kwargs": {"chat_template": "{% for m in messages %}USER {{ m['content'] }}{% endfor %}"},
    "modality_config": {"text": FORWARD, "message": {**FORWARD, "format": "flat"}},
    "module_output_name": "token_embeddings",
}


def scale(weights: Weights, module: str, factor: float) -> None:
    for name in weights:
        if f"{module}.lora_B" in name:
            weights[name] = weights[name] * factor


def swap(weights: Weights, one: str, other: str) -> None:
    first, second = (next(name for name in weights if f"{module}.lora_A" in name) for module in (one, other))
    weights[first], weights[second] = weights[second], weights[first]


def add_noise(weights: Weights, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, value in weights.items():
        weights[name] = value + share * value.std() * torch.randn(value.shape, generator=generator)


def double_eos(tokenizer: dict) -> None:
    rule = tokenizer["post_processor"]["single"]
    rule.append(rule[-1])


def add_bos(tokenizer: dict) -> None:
    token = tokenizer["added_tokens"][0]
    entry = {"id": token["content"], "ids": [token["id"]], "tokens": [token["content"]]}
    tokenizer["post_processor"]["special_tokens"][token["content"]] = entry
    tokenizer["post_processor"]["single"].insert(0, {"SpecialToken": {"id": token["content"], "type_id": 0}})


def set_prompt(name: str, change: Callable[[str], str]) -> tuple[str, Callable]:
    def edit(config: dict) -> None:
        config["prompts"][name] = change(config["prompts"][name])

    return "config_sentence_transformers.json", edit


def set_value(file: str, **values: object) -> tuple[str, Callable]:
    return file, lambda config: config.update(values)


WEIGHTS: dict[str, Callable[[Weights], None]] = {
    "LoRA of k_proj, layer 0, left out": lambda w: scale(w, "layers.0.self_attn.k_proj", 0),
    "LoRA of down_proj, layer 1, left out": lambda w: scale(w, "layers.1.mlp.down_proj", 0),
    "A of q_proj and k_proj swapped, layer 1": lambda w: swap(w, "1.self_attn.q_proj", "1.self_attn.k_proj"),
    "LoRA scale x 0.99": lambda w: scale(w, "", 0.99),
    "adapter of another step (1 % noise)": lambda w: add_noise(w, 0.01),
}
OTHER_BASE = "another base (1 % noise)"
FILES: dict[str, tuple[str, Callable]] = {
    "EOS missing": ("tokenizer.json", lambda tokenizer: tokenizer["post_processor"]["single"].pop()),
    "EOS doubled": ("tokenizer.json", double_eos),
    "an extra BOS": ("tokenizer.json", add_bos),
    "lower-casing": set_value("sentence_bert_config.json", do_lower_case=True),
    "max_seq_length 95 for 96": set_value("sentence_bert_config.json", max_seq_length=MAX_LENGTH - 1),
    "max_seq_length 97 for 96": set_value("sentence_bert_config.json", max_seq_length=MAX_LENGTH + 1),
    "chat template applied": set_value("sentence_bert_config.json", **CHAT),
    "mean pooling": set_value("1_Pooling/config.json", pooling_mode_lasttoken=False, pooling_mode_mean_tokens=True),
    "no Normalize module": ("modules.json", lambda modules: modules.pop()),
    "another query prompt": set_prompt("query", lambda text: text.replace("Instruct: ", "Instruct: Please: ")),
    "no query prompt": set_prompt("query", lambda text: ""),
    "query prompt with another space": set_prompt("query", lambda text: text + " "),
    "sts_query prompt garbage": set_prompt("sts_query", lambda text: "garbage"),
    "default_prompt_name set": set_value("config_sentence_transformers.json", default_prompt_name="query"),
    "similarity by dot product": set_value("config_sentence_transformers.json", similarity_fn_name="dot"),
}


def edit_json(path: Path, change: Callable) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def make_checkpoint(model: str, dtype: torch.dtype, work: Path, std: float) -> Path:
    """A LoRA checkpoint on a copy of `model` in `dtype`; the copy and another, noisy base lie beside it in `work`."""
    bare = E5Model.from_pretrained(model, dtype=torch.float32)
    bare.to(dtype).save_pretrained(work / "base")
    other = load_file(work / "base" / "model.safetensors")
    shutil.copytree(work / "base", work / "other")
    add_noise(other, 0.01)
    other = {name: value.to(dtype) for name, value in other.items()}
    save_file(other, work / "other" / "model.safetensors", metadata={"format": "pt"})
    adapted = load_model(str(work / "base"), dtype)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    adapted.save_pretrained(work / "checkpoint")
    return work / "checkpoint"


def export(checkpoint: Path, folder: Path, merge: bool) -> Path:
    dtype = torch.bfloat16 if merge else None
    export_sentence_transformer(checkpoint, folder, merge=merge, dtype=dtype, max_seq_length=MAX_LENGTH)
    return folder


def corrupt(name: str, checkpoint: Path, right: Path, folder: Path, merge: bool) -> Path:
    """Make `folder` the corruption `name` of the export `right` of `checkpoint`."""
    if name in FILES:
        shutil.copytree(right, folder)
        file, change = FILES[name]
        edit_json(folder / file, change)
        return folder
    changed = folder.with_name(f"{folder.name}-checkpoint")
    shutil.copytree(checkpoint, changed)
    if name == OTHER_BASE:
        base = str(checkpoint.with_name("other"))
        edit_json(changed / "adapter_config.json", lambda config: config.update(base_model_name_or_path=base))
    else:
        weights = load_file(changed / "adapter_model.safetensors")
        WEIGHTS[name](weights)
        weights = {name: value.clone() for name, value in weights.items()}
        save_file(weights, changed / "adapter_model.safetensors", metadata={"format": "pt"})
    return export(changed, folder, merge)
