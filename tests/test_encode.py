"""`E5Model.encode` against the backbone's own forward, one text at a time: nothing padded, packed or shared."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import AutoConfig, AutoModel

from hf_e5 import E5Model
from hf_e5.instructions import format_query
from hf_e5.modeling import encoder
from hf_e5.modeling.packed import decoder
from hf_e5.modeling.packed.micro_batches import forward_batches
from hf_e5.modeling.tokenizer import tokenize


INSTRUCTION = "Given a question, retrieve passages that answer it"
MAX_LENGTH = 96
TEXTS = [
    "how tall is K2",
    "",  # the instruction and EOS only
    "x",
    "how tall is K2",
    "K2, at 8,611 metres above sea level, is the second-highest mountain on Earth. " * 12,  # cut
    "东京的人口是多少?",
    " leading space",
    "def add(a, b):\n    return a + b",
]
POOLINGS = {  # of one text's hidden states, [tokens, dim]
    "last": lambda hidden: hidden[-1],
    "first": lambda hidden: hidden[0],
    "mean": lambda hidden: hidden.mean(dim=0),
    "weighted_mean": lambda hidden: torch.arange(1.0, len(hidden) + 1).double() @ hidden / sum(range(len(hidden) + 1)),
}


def one_by_one(model, texts, instruction=None, max_length=MAX_LENGTH):
    """[n, dim] unit vectors."""
    vectors = []
    for text in texts:
        ids = model.tokenizer(format_query(text, instruction), truncation=True, max_length=max_length)["input_ids"]
        with torch.no_grad():
            hidden = model.backbone(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0].double()
        vectors.append(POOLINGS[model.pooling](hidden))
    return F.normalize(torch.stack(vectors), dim=-1)


def difference(model, texts, instruction=None, **options):
    expected = one_by_one(model, texts, instruction)
    return (model.encode(texts, instruction=instruction, max_length=MAX_LENGTH, **options) - expected).abs().max()


def load(checkpoint, *, has_adapter, **options):
    config = (
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False) if has_adapter else None
    )
    torch.manual_seed(1)
    options = {"dtype": torch.float32, **options}
    return E5Model.from_pretrained(checkpoint, peft_config=config, **options).eval()


def plan(model, texts, instruction=None, batch_size=None):
    """The keyword arguments of the forward passes."""
    ids = tokenize(model.tokenizer, [format_query(text, instruction) for text in texts], MAX_LENGTH)
    return ids, [
        batch.inputs for batch in forward_batches(model.backbone, ids, pooling=model.pooling, batch_size=batch_size)
    ]


@pytest.fixture(scope="module", params=[True, False], ids=["adapter", "bare"])
def model(request, tiny_checkpoint):
    return load(tiny_checkpoint, has_adapter=request.param)


@pytest.mark.parametrize("instruction", [None, INSTRUCTION], ids=["document", "query"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_pooling(model, monkeypatch, pooling, instruction):
    monkeypatch.setattr(model, "pooling", pooling)
    assert difference(model, TEXTS, instruction) < 1e-5
    assert difference(model, TEXTS, instruction, batch_size=3) < 1e-5


def test_an_instruction_is_computed_once_per_pack(model):
    ids, forwards = plan(model, TEXTS, INSTRUCTION)
    (pack,) = [inputs["pack"] for inputs in forwards]
    # All but the space at the prompt's end, which some texts merge into their first token.
    shared = len(model.tokenizer(format_query("", INSTRUCTION).rstrip())["input_ids"]) - 1
    assert shared > 10
    assert pack.last_rows[-1] + 1 == sum(map(len, ids)) - (len(TEXTS) - 1) * shared


def test_other_poolings_share_nothing(model, monkeypatch):
    monkeypatch.setattr(model, "pooling", "mean")
    ids, forwards = plan(model, TEXTS, INSTRUCTION)
    assert sum(int(inputs["pack"].last_rows[-1]) + 1 for inputs in forwards) == sum(map(len, ids))


def test_texts_that_are_all_equal(model):
    assert difference(model, ["how tall is K2"] * 9, INSTRUCTION) < 1e-5
    assert difference(model, [""] * 40) < 1e-5  # BOS and EOS


def test_an_instruction_longer_than_the_limit(model):
    assert difference(model, TEXTS, "retrieve passages " * 100) < 1e-5


def test_one_text(model):
    vector = model.encode("how tall is K2", instruction=INSTRUCTION)
    assert vector.shape == (64,)
    torch.testing.assert_close(
        vector, one_by_one(model, ["how tall is K2"], INSTRUCTION)[0].float(), atol=1e-5, rtol=0
    )


def test_kinds_of_input(model):
    expected = model.encode(TEXTS)
    for texts in (tuple(TEXTS), np.array(TEXTS)):
        torch.testing.assert_close(model.encode(texts), expected, atol=0, rtol=0)
    assert model.encode([]).shape == (0, 64)


def test_batch_size_is_texts_per_forward(model):
    _, forwards = plan(model, TEXTS, batch_size=3)
    assert [len(inputs["pack"].texts) for inputs in forwards] == [3, 3, 2]


def test_windows_of_texts_and_progress(model, monkeypatch, capsys):
    """More texts than are tokenised at a time, in several packs."""
    monkeypatch.setattr(encoder, "ENCODE_TEXTS", 3)
    assert difference(model, TEXTS, INSTRUCTION, show_progress=True) < 1e-5
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capsys.readouterr().err


def test_sliding_window(tiny_checkpoint, monkeypatch):
    """Texts that the window cuts into run padded, the others packed."""
    model = load(tiny_checkpoint, has_adapter=False)
    without = one_by_one(model, TEXTS)
    model.config.sliding_window = 24
    assert (one_by_one(model, TEXTS) - without).abs().max() > 1e-3
    assert "pack" not in plan(model, TEXTS)[1][0]
    monkeypatch.setattr(encoder, "ENCODE_TEXTS", 4)
    assert difference(model, TEXTS) < 1e-5
    assert "pack" in plan(model, ["x", "how tall is K2"])[1][0]


def test_unknown_decoders_run_padded(model, monkeypatch):
    monkeypatch.setattr(decoder, "PACKABLE", set())
    assert "pack" not in plan(model, TEXTS)[1][0]
    assert difference(model, TEXTS, INSTRUCTION) < 1e-5


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("architecture, pooling", [("bert", "mean"), ("bert", "first"), ("gpt2", "last")])
def test_absolute_positions(tiny_checkpoint, tmp_path, architecture, pooling, padding_side):
    """Padding in front of a text would shift its positions, so the tokenizer's side must not matter."""
    sizes = {"vocab_size": 700, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModel.from_config(AutoConfig.for_model(architecture, **sizes)).save_pretrained(tmp_path)
    load(tiny_checkpoint, has_adapter=False).tokenizer.save_pretrained(tmp_path)
    model = load(tmp_path, has_adapter=False, pooling=pooling)
    model.tokenizer.padding_side = padding_side
    for parameter in model.parameters():  # as initialised, positions hardly matter
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    assert difference(model, TEXTS, INSTRUCTION) < 1e-5


@pytest.mark.parametrize("has_adapter", [True, False])
def test_bf16(tiny_checkpoint, has_adapter):
    """In bf16 any two orders of summation differ: packs are as near to fp32 arithmetic as one text at a time."""
    model = load(tiny_checkpoint, has_adapter=has_adapter, dtype=torch.bfloat16)
    ours = model.encode(TEXTS, instruction=INSTRUCTION, max_length=MAX_LENGTH)
    single = one_by_one(model, TEXTS, INSTRUCTION)
    model.float()
    exact = one_by_one(model, TEXTS, INSTRUCTION)
    assert torch.cosine_similarity(ours, exact).min() > 0.997
    assert (ours - exact).norm() < 1.5 * (single - exact).norm()


def test_an_interrupted_call_leaves_the_model_as_it_was(model, monkeypatch):
    expected = model.encode(TEXTS)
    attention = model.config._attn_implementation
    model.train()
    with monkeypatch.context() as patch:
        patch.setattr(model.get_submodule(_last_norm(model)), "forward", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.encode(TEXTS)
    assert model.training and model.config._attn_implementation == attention
    model.eval()
    torch.testing.assert_close(model.encode(TEXTS), expected, atol=0, rtol=0)


def test_threads_wait_for_each_other(model, monkeypatch):
    """Each has a limit of its own. Without a lock both would be in the forward pass at once."""
    monkeypatch.setattr(decoder, "FUSABLE", set())  # the path that changes the attention function for a while
    attention, lengths = model.config._attn_implementation, (12, MAX_LENGTH)
    expected = [model.encode(TEXTS, max_length=length) for length in lengths]
    barrier, meetings = threading.Barrier(2), []

    def meet(*_):
        with contextlib.suppress(threading.BrokenBarrierError):  # nobody came
            meetings.append(barrier.wait(timeout=1))

    handle = model.register_forward_pre_hook(meet)
    model.train()
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda length: model.encode(TEXTS, max_length=length), lengths))
    handle.remove()
    assert not meetings and model.training and model.config._attn_implementation == attention
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_autograd_takes_the_vectors(model):
    head = torch.nn.Linear(64, 2)
    head(model.encode(TEXTS)).sum().backward()
    torch.testing.assert_close(head.weight.grad[0], model.encode(TEXTS).sum(dim=0))


def _last_norm(model):
    return [name for name, _ in model.named_modules() if name.endswith("norm")][-1]


def _interrupt(*_):
    raise KeyboardInterrupt
