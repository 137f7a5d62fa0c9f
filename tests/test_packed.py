import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel

from hf_e5.modeling.packed import layout as packing
from hf_e5.modeling.packed.attention import _flash_attention, packed_attention
from hf_e5.modeling.packed.decoder import FUSABLE, PACKABLE, _fused_layers, pack_forward, supports_packing
from hf_e5.modeling.packed.fused_lora import Projection
from hf_e5.modeling.packed.layout import make_packs


@pytest.fixture
def texts(monkeypatch):
    """(input_ids, lengths, prefix_lengths) of texts of 1 to 300 tokens; three share a prefix of five tokens."""
    monkeypatch.setattr(packing, "MIN_SHARED_TOKENS", 10)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9, 40, 14, 6, 300, 1, 37, 290])
    texts = [torch.randint(0, 90, (int(length),), generator=generator) for length in lengths]
    for text in (2, 3):
        texts[text][:5] = texts[0][:5]
    return torch.cat(texts), lengths, torch.tensor([5, 0, 5, 5, 0, 0, 0, 0])


@pytest.mark.parametrize("max_tokens", [50, 310, 10_000])
@pytest.mark.parametrize("share", [True, False])
def test_packs_hold_every_text_once(texts, max_tokens, share):
    input_ids, lengths, prefix_lengths = texts
    packs = make_packs(input_ids, lengths, max_tokens=max_tokens, prefix_lengths=prefix_lengths if share else None)
    assert sorted(torch.cat([pack.texts for pack in packs]).tolist()) == list(range(8))
    assert all(pack.num_tokens <= max_tokens or len(pack.texts) == 1 for pack in packs)
    if max_tokens == 10_000:
        num_tokens = int(lengths.sum()) - (10 if share else 0)  # the prefix stands there once, not thrice
        assert num_tokens < packs[0].num_tokens <= num_tokens * (1 + packing.FILLER_SHARE)
        assert packs[0].last_rows[-1] == num_tokens - 1
    originals = input_ids.split(lengths.tolist())
    for pack in packs:
        start = 0
        found = []
        for segment in pack.segments:
            rows = [*range(*segment.prefix), *range(start, start + segment.length)]
            assert pack.position_ids[rows].tolist() == list(range(len(rows)))
            found.append((start + segment.length - 1, pack.input_ids[rows].tolist()))
            start += segment.length
        assert start == pack.num_tokens == sum(group.stop - group.start for group in pack.groups)
        by_last_row = dict(found)
        for text, last_row in zip(pack.texts.tolist(), pack.last_rows.tolist(), strict=True):
            assert by_last_row[last_row] == originals[text].tolist()


def test_chosen_texts_only(texts):
    packs = make_packs(*texts[:2], max_tokens=1000, texts=[1, 5])
    assert sorted(packs[0].texts.tolist()) == [1, 5]
    assert make_packs(*texts[:2], max_tokens=1000, texts=[]) == []


def test_little_is_padded_on_real_lengths():
    torch.manual_seed(0)
    lengths = torch.distributions.LogNormal(4.5, 0.8).sample((1000,)).long().clamp(1, 512)
    packs = make_packs(torch.zeros(int(lengths.sum()), dtype=torch.int64), lengths, max_tokens=16_384)
    assert sum(pack.num_tokens for pack in packs) < 1.03 * lengths.sum()  # what linear layers compute
    groups = [group for pack in packs for group in pack.groups]
    places = sum(group.num_texts * group.length for group in groups)
    assert places < sum(group.stop - group.start for group in groups) / 0.85  # what attention computes


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
def test_attention_equals_attention_per_text(texts, heads, kv_heads):
    for pack in make_packs(texts[0], texts[1], max_tokens=400, prefix_lengths=texts[2]):
        shapes = [(pack.num_tokens, count, 8) for count in (heads, kv_heads, kv_heads)]
        states = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        output = packed_attention(*states, pack, 0.3)
        expected = torch.cat(list(attention_per_segment(*states, pack, 0.3)))
        torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
        seed = torch.randn_like(expected)
        grads, expected_grads = (torch.autograd.grad(value, states, seed) for value in (output, expected))
        torch.testing.assert_close(grads, expected_grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("torch_version", ["2.11", "2.12"])
def test_the_flash_kernel_is_called_as_torch_declares_it(texts, monkeypatch, torch_version):
    """A stand-in for the CUDA kernel with the signature of each version, computed text by text."""

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size == (-1, 0)
        attended = []
        for start, stop, key_start, key_stop in zip(
            *(offsets[part].tolist() for offsets in (cu_seq_q, cu_seq_k) for part in (slice(-1), slice(1, None))),
            strict=True,
        ):
            q, k, v = query[start:stop], key[key_start:key_stop], value[key_start:key_stop]
            assert len(q) <= max_q and len(k) <= max_k
            k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
            mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
            q, k, v = (states.transpose(0, 1) for states in (q, k, v))
            attended.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(0, 1))
        return torch.cat(attended)

    def with_flag(query, key, *args, enable_gqa=False, **options):
        assert enable_gqa == (query.shape[1] != key.shape[1])
        return varlen_attn(query, key, *args, **options)

    kernel = varlen_attn if torch_version == "2.11" else with_flag
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    for pack in make_packs(texts[0], texts[1], max_tokens=400, prefix_lengths=texts[2]):
        for kv_heads in (2, 6):
            states = [torch.randn(pack.num_tokens, count, 8, dtype=torch.float64) for count in (6, kv_heads, kv_heads)]
            expected = packed_attention(*states, pack, 0.3)
            torch.testing.assert_close(_flash_attention(*states, pack, 0.3), expected, rtol=1e-12, atol=1e-12)


def attention_per_segment(query, key, value, pack, scale):
    repeats, start = query.shape[1] // key.shape[1], 0
    for segment in pack.segments:
        own = slice(start, start + segment.length)
        rows = [*range(*segment.prefix), *range(own.start, own.stop)]
        keys, values = (states[rows].repeat_interleave(repeats, 1).transpose(0, 1) for states in (key, value))
        mask = torch.ones(segment.length, len(rows), dtype=torch.bool).tril(len(rows) - segment.length)
        queries = query[own].transpose(0, 1)
        yield F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale).transpose(0, 1)
        start += segment.length


def test_flash_layout_lists_the_keys_of_every_segment(texts):
    (pack,) = make_packs(texts[0], texts[1], max_tokens=10_000, prefix_lengths=texts[2])
    layout, start = pack.flash_layout, 0
    assert layout.key_rows is not None
    for number, segment in enumerate(pack.segments):
        assert layout.query_offsets[number : number + 2].tolist() == [start, start + segment.length]
        keys = layout.key_rows[layout.key_offsets[number] : layout.key_offsets[number + 1]].tolist()
        assert keys == [*range(*segment.prefix), *range(start, start + segment.length)]
        start += segment.length
    assert layout.longest_query == layout.longest_key == 300


def tiny_backbone(model_type):
    config = AutoConfig.for_model(
        model_type,
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model.eval()


@pytest.mark.parametrize("model_type", sorted(PACKABLE))
def test_pack_forward_equals_one_forward_per_text(texts, model_type):
    """Every architecture that is listed, through its own modules, and fused where it is listed for that."""
    backbone = tiny_backbone(model_type)
    assert supports_packing(backbone, 300)
    if model_type in FUSABLE:
        backbone = get_peft_model(backbone, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        assert _fused_layers(backbone.get_base_model()) is not None
    with torch.no_grad():
        for pack in make_packs(texts[0], texts[1], max_tokens=400, prefix_lengths=texts[2]):
            vectors = pack_forward(backbone, pack, "last")
            for text, vector in zip(pack.texts.tolist(), vectors, strict=True):
                ids = texts[0].split(texts[1].tolist())[text]
                expected = backbone(input_ids=ids[None], use_cache=False).last_hidden_state[0, -1]
                torch.testing.assert_close(vector, expected, rtol=1e-4, atol=1e-4)


def test_windows_shorter_than_the_texts_are_not_packed():
    backbone = tiny_backbone("mistral")
    backbone.config.sliding_window = 64
    assert supports_packing(backbone, 64) and not supports_packing(backbone, 65)


def test_layers_that_do_more_than_lora_are_left_to_peft():
    linear = torch.nn.Linear(4, 4)
    assert Projection.of(linear) is None  # trains
    assert Projection.of(linear.requires_grad_(False)) is not None
    linear.register_forward_hook(lambda *_: None)
    assert Projection.of(linear) is None
    for options in ({"use_dora": True}, {"lora_bias": True}):
        model = get_peft_model(tiny_backbone("llama"), LoraConfig(r=2, target_modules=["q_proj"], **options))
        assert _fused_layers(model.get_base_model()) is None


def test_models_with_dropout_in_attention_are_not_packed():
    backbone = tiny_backbone("llama")
    assert supports_packing(backbone, 64)
    backbone.config.attention_dropout = 0.1
    assert not supports_packing(backbone, 64)
