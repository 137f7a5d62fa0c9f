"""Forward of a pack through a decoder: the fused layers where they apply, else transformers' own modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..pooling import pool
from .attention import NAME, packed_attention, register
from .fused_lora import Projection, has_hooks, linear_residual, norm_linear, swiglu_linear_residual
from .fused_ops import rotate
from .layout import Pack


# Decoders with plain causal attention whose forward hands keyword arguments down to the attention function.
PACKABLE = {"gemma", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"}
# Of these, the ones whose layer is exactly the one in `_layer`.
FUSABLE = {"llama", "mistral", "qwen2"}


def supports_packing(backbone: PreTrainedModel | PeftModel, max_length: int) -> bool:
    """Whether `pack_forward` computes what the model defines, for texts of up to `max_length` tokens."""
    config: Any = backbone.config
    window = getattr(config, "sliding_window", None)
    if len(set((getattr(backbone, "hf_device_map", None) or {}).values())) > 1:
        return False  # a pack lies on one device
    if getattr(config, "attention_dropout", 0.0):
        return False  # the packs' attention has none
    return config.model_type in PACKABLE and (window is None or max_length <= window)


@contextmanager
def packed_attention_of(backbone: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Use the packs' attention inside the block; backward passes that recompute activations must lie inside, too."""
    register()
    config: Any = backbone.config
    previous = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = previous


def pack_forward(backbone: PreTrainedModel | PeftModel, pack: Pack, pooling: str) -> Tensor:
    """Embed the n texts of a pack: [n, dim], in the pack's order, not normalised.

    A shared prefix is only allowed with `last` pooling, which never reads its rows.
    """
    decoder: Any = backbone.get_base_model() if isinstance(backbone, PeftModel) else backbone
    layers = _fused_layers(decoder)
    if layers is not None:
        hidden = _fused_forward(decoder, layers, pack)
    else:
        with packed_attention_of(decoder):
            hidden = backbone(
                input_ids=pack.input_ids[None],
                position_ids=pack.position_ids[None],
                attention_mask=None,
                use_cache=False,
                pack=pack,
            ).last_hidden_state[0]
    if pooling == "last":
        return hidden[pack.last_rows]
    sizes = [segment.length for segment in pack.segments]
    num_texts = len(pack.last_rows)  # the last segment may be filler
    texts = pad_sequence(list(hidden.split(sizes)[:num_texts]), batch_first=True)
    lengths = torch.tensor(sizes[:num_texts], device=hidden.device)
    return pool(texts, torch.arange(texts.shape[1], device=hidden.device) < lengths[:, None], pooling)


def _fused_layers(decoder: Any) -> list[dict[str, Projection]] | None:
    """The projections of every layer, or None if one of them is more than a frozen weight with a LoRA adapter."""
    config = decoder.config
    if config.model_type not in FUSABLE or config.hidden_act != "silu":
        return None
    dtype = decoder.dtype
    if torch.is_autocast_enabled(decoder.device.type) and torch.get_autocast_dtype(decoder.device.type) != dtype:
        return None
    layers = []
    for layer in decoder.layers:
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        modules = {**layer.self_attn._modules, **layer.mlp._modules}
        projections = {}
        for name, module in modules.items():
            if name.endswith("_proj"):
                projection = Projection.of(module)
                if projection is None or projection.weight.dtype != dtype:
                    return None
                projections[name] = projection
        trains = any(norm.weight.requires_grad for norm in norms) and not torch.is_inference_mode_enabled()
        if trains or any(map(has_hooks, (layer, layer.self_attn, layer.mlp, *norms))):
            return None
        layers.append(projections)
    return layers


def _fused_forward(decoder: Any, layers: list[dict[str, Projection]], pack: Pack) -> Tensor:
    hidden = decoder.embed_tokens(pack.input_ids)
    cos, sin = (table[0] for table in decoder.rotary_emb(hidden[None], pack.position_ids[None]))
    keeps_graph = torch.is_grad_enabled() and decoder.training
    for layer, projections in zip(decoder.layers, layers, strict=True):
        arguments = (layer, projections, hidden, cos, sin, pack)
        checkpointing = keeps_graph and layer.gradient_checkpointing
        hidden = checkpoint(_layer, *arguments, use_reentrant=False) if checkpointing else _layer(*arguments)
    return decoder.norm(hidden)


def _layer(
    layer: Any, projections: dict[str, Projection], hidden: Tensor, cos: Tensor, sin: Tensor, pack: Pack
) -> Tensor:
    """One decoder layer of the Llama family over flat tokens, [T, dim] -> [T, dim]."""
    attention = layer.self_attn
    named = projections.__getitem__
    states = norm_linear(hidden, layer.input_layernorm, [named("q_proj"), named("k_proj"), named("v_proj")])
    query, key, value = (state.unflatten(-1, (-1, attention.head_dim)) for state in states)
    query, key = _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)
    attended = packed_attention(query, key, value, pack, attention.scaling)
    hidden = linear_residual(attended.flatten(1), hidden, named("o_proj"))
    gate, up = norm_linear(hidden, layer.post_attention_layernorm, [named("gate_proj"), named("up_proj")])
    return swiglu_linear_residual(gate, up, hidden, named("down_proj"))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(states, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return rotate(grad, cos, -sin), None, None
