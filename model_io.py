# SPDX-License-Identifier: MIT
# Copyright (c) 2026 the HodgeCover reference implementation's authors
"""Sparse Mixture-of-Experts checkpoints, and dense ones: run, read, check and write them, one layer at a time.

A checkpoint is a folder with `config.json`, safetensors weights (one file, or shards with an index) and
`tokenizer.json`. `Model` runs it and never holds more than one decoder layer, the embedding or the head, and the
activations. `write_checkpoint` copies the weights of the surviving experts byte for byte.

Symbols
    n  experts of a layer       k  experts per token (top-k)      K  survivors of a layer
    B  sequences of L tokens    T  tokens, B L                    V  vocabulary
    d  hidden size              f  width of an expert             e  one expert
    H  heads of width D         C  tokens of a chunk              t  token indices
    h  (B, L, d) residual stream before a layer                   y  (T, d) residual stream after it
    x  (T, d) input of the experts, normed                        w  other weights of a layer, by name
"""
from __future__ import annotations

import ast
import codecs
import contextlib
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional

__version__ = "0.4.0"

RECORD, SCHEMA_VERSION = "hodgecover.json", 3
READABLE_SCHEMAS = 2, 3  # of records that are continued; 2 is version 0.3's
TOKENS = 2048  # default calibration sample (A.11)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
FP8 = "F8_E4M3"  # dtype name of quantised weights
SCALE = "_scale_inv"  # the tensor NAME_scale_inv multiplies the quantised NAME
STORED = DTYPES | {FP8: torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu}  # the last: scales
FP8_VALUES = torch.arange(256, dtype=torch.uint8).view(STORED[FP8]).float()  # by their bytes
PASS_TOKENS = 4096  # tokens that go through a layer at a time
BLOCK_BYTES = 1 << 24  # bytes of a file that are read at a time
LEAST_TEXT = 1 << 22  # bytes; a larger file is read in part, so much of it at least
TEXT_BYTES = 64  # that are read of it for each token that is wanted
WINDOW = 1 << 14  # bytes of such a part
PIECE = 1 << 14  # characters that are encoded at a time
CHATML = "<|im_start|>", "<|im_end|>"
MODELING = "modeling_per_layer"  # transformers' code for a checkpoint with `per_layer_config`
NOTICE = ("> **This is a compressed model.** `hodgecover.json` says how it was made of the model "
          "described below; the scores below are that model's.\n\n")


class InputError(ValueError):
    """Something that the user gave is wrong. The message says what, and what would be right."""


def require(ok: object, says: str) -> None:
    """Raise InputError(says) unless ok."""
    if not ok:
        raise InputError(says)


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise InputError if a parameter is not a finite number from low to high."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{name} {value!r}: must be a number")
    if not low <= value <= high or value == math.inf:
        allowed = f"from {low} to {high}" if high < math.inf else f"a finite number, at least {low}"
        raise InputError(f"{name} {value}: must be {allowed}")


@dataclass(frozen=True)
class Config:
    """What the forward pass needs of a `config.json`, under one set of names for all model families."""
    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    rms_norm_eps: float
    num_experts: int  # 0 in a dense family
    expert_width: int
    shared_width: int | None  # of the shared expert
    dense_width: int | None  # of a layer without experts
    top_k: int
    norm_topk_prob: bool
    tie_word_embeddings: bool
    eos_token_id: int | None
    max_positions: int | None = None  # tokens of a sequence that it is made for
    clip_qkv: float | None = None  # OLMoE
    linear_key_heads: int = 0  # Qwen3-Next and Qwen3.5, Gated DeltaNet
    linear_key_head_dim: int = 0
    linear_value_heads: int = 0
    linear_value_head_dim: int = 0
    linear_conv_width: int = 0
    biased: str = ""  # projections of the attention that have a bias, of "qkvo"
    sparse: bool = True  # of one layer: whether it has experts
    recurrent: bool = False  # and whether its token mixer is linear attention


# ------------------------------------------------------------------------------------------------ forward pass

class Experts(NamedTuple):
    """Weights of a layer's experts: gate (n, f, d), up (n, f, d), down (n, d, f). Their dtype may be narrower than that
    of the activations; an expert is widened when it is used."""
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def hidden(self, e: int, x: torch.Tensor) -> torch.Tensor:
        """Return the input of expert e's down projection on x (T, d): silu(gate_e x) * up_e x, (T, f)."""
        return gated_units(x, self.gate[e], self.up[e])

    def __call__(self, e: int, x: torch.Tensor) -> torch.Tensor:
        """Return the output of expert e on x (T, d): down_e (silu(gate_e x) * up_e x), (T, d)."""
        return self.hidden(e, x) @ self.down[e].to(x).T


def gated_units(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate x) * up x of one expert, (T, f): x (T, d), gate and up (f, d) of x's dtype or a narrower one."""
    return functional.silu(x @ gate.to(x).T) * (x @ up.to(x).T)


@dataclass(eq=False)
class Layer:
    """Weights of a decoder layer: experts and router (n, d), None if it is dense; all others by their name in it."""
    experts: Experts | None
    router: torch.Tensor | None
    weights: dict[str, torch.Tensor]

    def unload(self) -> None:
        """Drop all weights, whoever still holds the layer."""
        self.experts, self.router, self.weights = None, None, {}


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or dtype itself if it is wider: the dtype of norms, softmaxes and recurrences."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / rms(x) * weight over the last dimension, in x's dtype. The mean square is in float32 or better."""
    wide = x.to(widened(x.dtype))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    normed = wide * torch.rsqrt(norm.square() / wide.shape[-1] + eps)
    # A wide weight multiplies before the result is rounded to x's dtype
    return normed.to(torch.promote_types(x.dtype, weight.dtype)).mul_(weight).to(x.dtype)


class RMSNorm(NamedTuple):
    """A norm of the stream: its weight (d,) and eps."""
    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


def rope(x: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Rotate x (B, H, L, D) by its positions 0..L-1, on the first `rotary_dim` dimensions in rotate-half layout.
    Multimodal sections have equal positions on text, and reduce to this."""
    # The angle of each position in each plane, (L, rotary_dim / 2)
    half = cfg.rotary_dim // 2
    frequency = cfg.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), frequency)
    cos = angle.cos().to(x)
    sin = angle.sin().to(x)
    # Dimensions i and half + i are a plane; those from rotary_dim on stay as they are
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    turned = first * cos - second * sin
    second = second * cos + first * sin
    return torch.cat((turned, second, rest), dim=-1)


def linear(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Multiply x by the layer's weight `name`, and add its bias if it has one."""
    return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Causal attention with rotary positions: query (B, L, H, D), key, value (B, L, H of keys, D) -> (B, L, H D)."""
    # (B, L, heads, D) -> (B, heads, L, D)
    query = rope(query.transpose(1, 2), cfg)
    key = rope(key.transpose(1, 2), cfg)
    value = value.transpose(1, 2)
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def olmoe_attention(x: torch.Tensor, w: dict[str, torch.Tensor], cfg: Config) -> torch.Tensor:
    """OLMoE: q/k norms over the full width, then an optional clip. x (B, L, d), normed -> (B, L, d)."""
    # All heads side by side, (B, L, heads D), normed together
    query = linear(x, w, "self_attn.q_proj")
    query = rms_norm(query, w["self_attn.q_norm.weight"], cfg.rms_norm_eps)
    key = linear(x, w, "self_attn.k_proj")
    key = rms_norm(key, w["self_attn.k_norm.weight"], cfg.rms_norm_eps)
    qkv = [query, key, linear(x, w, "self_attn.v_proj")]
    if cfg.clip_qkv is not None:
        qkv = [projected.clamp(-cfg.clip_qkv, cfg.clip_qkv) for projected in qkv]
    # Cut into heads, (B, L, heads, D)
    query, key, value = [projected.unflatten(-1, (-1, cfg.head_dim)) for projected in qkv]
    return linear(attend(query, key, value, cfg), w, "self_attn.o_proj")


def qwen_attention(x: torch.Tensor, w: dict[str, torch.Tensor], cfg: Config) -> torch.Tensor:
    """Qwen: q/k norms per head since Qwen3; since Qwen3-Next Gated DeltaNet in most layers. In the others a gate is
    beside each head's query; its sigmoid multiplies the head's output. x (B, L, d), normed -> (B, L, d)."""
    if "linear_attn.A_log" in w:
        return gated_delta_net(x, w, cfg)
    # Cut into heads at once, (B, L, heads, D); a query with its gate has 2 D
    query = linear(x, w, "self_attn.q_proj").unflatten(-1, (cfg.num_heads, -1))
    key = linear(x, w, "self_attn.k_proj").unflatten(-1, (cfg.num_kv_heads, -1))
    value = linear(x, w, "self_attn.v_proj").unflatten(-1, (cfg.num_kv_heads, -1))
    query, *gate = query.split(cfg.head_dim, dim=-1)
    if "self_attn.q_norm.weight" in w:
        query = rms_norm(query, w["self_attn.q_norm.weight"], cfg.rms_norm_eps)
        key = rms_norm(key, w["self_attn.k_norm.weight"], cfg.rms_norm_eps)
    out = attend(query, key, value, cfg)
    if gate:
        out = out * gate[0].flatten(2).sigmoid()
    return linear(out, w, "self_attn.o_proj")


def gated_delta_net(x: torch.Tensor, w: dict[str, torch.Tensor], cfg: Config) -> torch.Tensor:
    """Gated DeltaNet (arXiv 2412.06464), with a short causal convolution over q, k and v. x (B, L, d) -> (B, L, d)."""
    wide = widened(x.dtype)
    qkv, z, b, a = delta_net_inputs(x, w, cfg)
    # Each channel by itself; padded on the left, a token sees no later one
    kernel = w["linear_attn.conv1d.weight"]  # (channels, 1, width)
    mixed = functional.pad(qkv.transpose(1, 2), (kernel.shape[-1] - 1, 0))
    mixed = functional.silu(functional.conv1d(mixed, kernel, groups=len(kernel))).transpose(1, 2)
    # Cut into heads, (B, L, H, D of keys or of values)
    key_width = cfg.linear_key_heads * cfg.linear_key_head_dim
    query, key, value = mixed.split((key_width, key_width, mixed.shape[-1] - 2 * key_width), dim=-1)
    query = delta_net_heads(query, cfg) * cfg.linear_key_head_dim ** -0.5
    key = delta_net_heads(key, cfg)
    value = value.unflatten(-1, (-1, cfg.linear_value_head_dim)).to(wide)
    # Per token and head, (B, L, H): how fast the state decays, how much of the token it takes
    time_step = functional.softplus(a.to(wide) + w["linear_attn.dt_bias"])
    log_decay = -w["linear_attn.A_log"].exp() * time_step
    beta = b.sigmoid().to(wide)
    out = chunked_gated_delta_rule(query, key, value, log_decay, beta).to(x.dtype)
    # Each head's output is normed and gated by z
    gate = z.unflatten(-1, (-1, cfg.linear_value_head_dim)).to(wide)
    out = rms_norm(out, w["linear_attn.norm.weight"], cfg.rms_norm_eps) * functional.silu(gate)
    return linear(out.to(x.dtype).flatten(2), w, "linear_attn.out_proj")


def delta_net_heads(flat: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Cut q or k (B, L, heads D) into unit vectors (B, L, H, D), repeated for the value heads that share a key head."""
    heads = flat.unflatten(-1, (-1, cfg.linear_key_head_dim)).to(widened(flat.dtype))
    heads = heads * torch.rsqrt(heads.square().sum(-1, keepdim=True) + 1e-6)
    return heads.repeat_interleave(cfg.linear_value_heads // cfg.linear_key_heads, dim=2)


def delta_net_inputs(x: torch.Tensor, w: dict[str, torch.Tensor], cfg: Config) -> list[torch.Tensor]:
    """Return q, k and v side by side, z, b and a of x (B, L, d), each (B, L, its width). Qwen3.5 has a matrix for each;
    Qwen3-Next has two in all, whose rows are sorted by key head."""
    if not FAMILIES[cfg.model_type].by_key_head:
        return [linear(x, w, f"linear_attn.in_proj_{name}") for name in ("qkv", "z", "b", "a")]
    # (B, L, key heads, all that belongs to a key head)
    qkvz = linear(x, w, "linear_attn.in_proj_qkvz").unflatten(-1, (cfg.linear_key_heads, -1))
    ba = linear(x, w, "linear_attn.in_proj_ba").unflatten(-1, (cfg.linear_key_heads, -1))
    key_dim = cfg.linear_key_head_dim
    value_dim = qkvz.shape[-1] // 2 - key_dim  # of the value heads that share the key head
    query, key, value, z = qkvz.split((key_dim, key_dim, value_dim, value_dim), dim=-1)
    b, a = ba.chunk(2, dim=-1)
    # All queries side by side, then all keys, then all values
    qkv = torch.cat((query.flatten(2), key.flatten(2), value.flatten(2)), dim=-1)
    return [qkv, z.flatten(2), b.flatten(2), a.flatten(2)]


def chunked_gated_delta_rule(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                             log_decay: torch.Tensor, beta: torch.Tensor, size: int = 64) -> torch.Tensor:
    """Run the gated delta rule on chunks of `size` tokens by matrix products: query, key (B, L, H, D of keys), value
    (B, L, H, D of values), log_decay, beta (B, L, H) -> the shape of value. Token by token it is

        state_t = decay_t state_{t-1} + key_t (beta_t (value_t - (decay_t state_{t-1})' key_t))'
        out_t = state_t' query_t

    With the log decay cumulated since the start of the chunk, the corrections beta_i (value_i - exp(decay_i) state'
    key_i - sum_{j<i} exp(decay_i - decay_j) (key_i . key_j) correction_j) solve a triangular system."""
    inputs = query, key, value, log_decay[..., None], beta[..., None]
    chunks = zip(*(tensor.transpose(1, 2).split(size, dim=2) for tensor in inputs))
    state = value.new_zeros(len(key), *key.shape[2:], value.shape[-1])  # (B, H, D of keys, of values)
    out = []
    for query, key, value, log_decay, beta in chunks:  # (B, H, C, ...)
        decay = log_decay.cumsum(2)  # a logarithm, (B, H, C, 1)
        between = (decay - decay.mT).tril().exp().tril()  # exp(decay_i - decay_j), j <= i
        # The corrections of all tokens of the chunk, (B, H, C, D of values)
        system = beta * between * (key @ key.mT)
        wanted = beta * (value - decay.exp() * (key @ state))
        correction = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        # A token reads the state from before the chunk, then the chunk's corrections up to its own
        of_state = decay.exp() * (query @ state)
        of_chunk = between * (query @ key.mT) @ correction
        out.append(of_state + of_chunk)
        # What is left at the end of the chunk of the state and of each correction
        state_left = decay[:, :, -1:].exp()
        correction_left = (decay[:, :, -1:] - decay).exp()
        state = state_left * state + (key * correction_left).mT @ correction
    return torch.cat(out, dim=2).transpose(1, 2)


def gated(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return the input of the down projection of the layer's dense SwiGLU block `name` on x (T, d): (T, f)."""
    gate = linear(x, w, f"{name}.gate_proj")
    return functional.silu(gate) * linear(x, w, f"{name}.up_proj")


def mlp(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Apply the layer's dense SwiGLU block `name` to x (T, d): (T, d)."""
    return linear(gated(x, w, name), w, f"{name}.down_proj")


def route(x: torch.Tensor, layer: Layer, cfg: Config) -> torch.Tensor:
    """Return the gate weights (T, n) of tokens x (T, d) exactly as the model applies them: zero off the top-k,
    renormalised if `norm_topk_prob`. The softmax is taken in float32 or better."""
    p = (x @ layer.router.T).softmax(-1, dtype=widened(x.dtype))  # (T, n)
    top_p, top_experts = p.topk(cfg.top_k)  # (T, k)
    if cfg.norm_topk_prob:
        top_p = top_p / top_p.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter(1, top_experts, top_p).to(x.dtype)


def mix_experts(experts: Experts, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Return sum_e gates[:, e] experts(e, x), (T, d). Each expert is computed only on the tokens routed to it. The
    experts and the columns of the gates are unbound once, so that a gradient of each is as large as it is once."""
    out = torch.zeros_like(x)
    trained = any(tensor.requires_grad for tensor in (x, *experts))
    widen = experts.gate.dtype != x.dtype and not trained
    # Each expert is widened into the same memory: new memory costs more than widening
    buffers = [x.new_empty(weight.shape[1:]) for weight in experts] if widen else None
    for gate_column, gate, up, down in zip(gates.T, *experts):
        t = gate_column.nonzero().squeeze(1)
        if len(t) == 0:
            continue
        if widen:
            gate, up, down = map(torch.Tensor.copy_, buffers, (gate, up, down))
        out.index_add_(0, t, gate_column[t, None] * (gated_units(x[t], gate, up) @ down.to(x).T))
    return out


def run_mixer(h: torch.Tensor, w: dict[str, torch.Tensor], cfg: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the first half of a pre-norm decoder layer on the residual stream h (B, L, d): return the stream after the
    token mixer and the feed-forward input x, both (T, d)."""
    mixer = FAMILIES[cfg.model_type].attention
    h = h + mixer(rms_norm(h, w["input_layernorm.weight"], cfg.rms_norm_eps), w, cfg)
    h = h.flatten(0, 1)  # from here on, no token sees another
    return h, rms_norm(h, w["post_attention_layernorm.weight"], cfg.rms_norm_eps)


def run_layer(h: torch.Tensor, layer: Layer, cfg: Config) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Run one pre-norm decoder layer on the residual stream h (B, L, d). Return the feed-forward input x (T, d), the
    gates (T, n), None if it is dense, and the stream after it y (T, d), with a shared expert's gated output in y."""
    w = layer.weights
    h, x = run_mixer(h, w, cfg)
    if layer.router is None:
        return x, None, h + mlp(x, w, "mlp")
    gates = route(x, layer, cfg)
    out = mix_experts(layer.experts, x, gates)
    if "mlp.shared_expert_gate.weight" in w:
        shared_gate = linear(x, w, "mlp.shared_expert_gate").sigmoid()  # (T, 1)
        out = out + shared_gate * mlp(x, w, "mlp.shared_expert")
    return x, gates, h + out


class Family(NamedTuple):
    """What differs between model families. `attention` is the token mixer of x (B, L, d)."""
    attention: Callable[[torch.Tensor, dict[str, torch.Tensor], Config], torch.Tensor]
    width_key: str = "moe_intermediate_size"  # of config.json: the width of an expert
    rms_norm_eps: float = 1e-6  # unless config.json has it
    rope_theta: float = 10000.0  # likewise
    norm_topk_prob: bool = False  # likewise
    partial_rotary_factor: float | None = None  # likewise; None: the whole head rotates
    always_renormalised: bool = False  # the gates, whatever norm_topk_prob says
    norms_less_1: bool = False  # norm weights are stored less 1
    head_norms: bool = True  # of Qwen's queries and keys
    gated_query: bool = False  # in full attention
    by_key_head: bool = False  # the recurrence has two projections, sorted so, not four
    may_be_transposed: bool = False  # fused experts: (n, d, 2 f) and (n, f, d)
    shared_expert: bool = False  # in every sparse layer
    dense: bool = False  # no layer has experts
    dense_layers: bool = False  # some layers have none, by mlp_only_layers and decoder_sparse_step
    recurrent_layers: bool = False  # most layers have linear attention


QWEN3_5 = Family(qwen_attention, partial_rotary_factor=0.25, always_renormalised=True, norms_less_1=True,
                 gated_query=True, shared_expert=True, recurrent_layers=True)
FAMILIES = {"olmoe": Family(olmoe_attention, "intermediate_size", rms_norm_eps=1e-5),
            "qwen2_moe": Family(qwen_attention, head_norms=False, shared_expert=True, dense_layers=True),
            "qwen3": Family(qwen_attention, dense=True), "qwen3_moe": Family(qwen_attention, dense_layers=True),
            "qwen3_vl_moe": Family(qwen_attention, rope_theta=500000.0, always_renormalised=True,
                                   may_be_transposed=True, dense_layers=True),
            "qwen3_next": QWEN3_5._replace(always_renormalised=False, norm_topk_prob=True, by_key_head=True,
                                           dense_layers=True),
            "qwen3_5_moe": QWEN3_5, "qwen3_5_moe_text": QWEN3_5}
REFUSED = {"qwen3_omni_moe": " (two models with experts in one checkpoint, a thinker and a talker)",
           "flex_olmo": " (a norm after the experts: their outputs do not add up in the stream)"}


# -------------------------------------------------------------------------------------- the model that streams

class LayerPass(NamedTuple):
    """One layer, its input and its output."""
    index: int
    name: str  # prefix of its tensors' names
    layer: Layer
    h: torch.Tensor  # residual stream before the layer (B, L, d)
    x: torch.Tensor  # feed-forward input (T, d)
    gates: torch.Tensor | None  # (T, n), None in a dense layer
    y: torch.Tensor  # residual stream after the layer (T, d)
    norm: Callable[[torch.Tensor], torch.Tensor]  # between that stream and the head


class Model:
    """A language model, sparse MoE or dense, that streams its weights from a checkpoint folder. `dtype` is that of
    activations and products (norms and the router's softmax stay in float32 or better); `device` holds weights and
    activations while they are in use.

    >>> model = Model("examples/tiny-olmoe")
    >>> model.logits(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 2048])

    Attributes: `checkpoint`, `config`, `dtype`, `device`. By layer, first those of the decoder, then those of a
    multi-token prediction head: `layer_names`, the prefix of its tensors, and `layer_configs`. `transposed`: the names
    of the fused experts that are stored so. Raises InputError for a missing, malformed or unsupported checkpoint."""

    def __init__(self, path: str | os.PathLike, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"):
        self.checkpoint = Checkpoint(path)
        self.dtype, self.device = dtype, torch.device(device)
        tensors, raw = self.checkpoint.weights, self.checkpoint.raw_config
        multimodal = "model.language_model.norm.weight" in tensors
        self.prefix = "model.language_model." if multimodal else "model."
        try:
            self.config = read_config(raw)
            self.layer_names = find_layers(tensors, self.prefix, self.config.num_layers)
            self.layer_configs = layer_configs(raw, self.config, self.layer_names)
        except InputError as err:
            raise InputError(f"{self.checkpoint.path}/{err}") from None
        by_name = dict(zip(self.layer_names, self.layer_configs))
        self.transposed = check_tensors(self.checkpoint.path, tensors, self.prefix, by_name)
        check_scales(self.checkpoint)
        self._embedding = f"{self.prefix}embed_tokens.weight"
        tied = self.config.tie_word_embeddings and "lm_head.weight" not in tensors
        self._head = self._embedding if tied else "lm_head.weight"

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor in the model's dtype. Norms stored less 1 and the recurrence's parameters stay wide."""
        tensor = self.checkpoint.load(name).to(self.device)
        if self._less_1(name):
            return tensor.to(widened(self.dtype)) + 1
        stays_wide = name.endswith(("norm.weight", "A_log", "dt_bias"))
        if stays_wide and FAMILIES[self.config.model_type].norms_less_1:
            return tensor.to(widened(self.dtype))
        return tensor.to(self.dtype)

    def _less_1(self, name: str) -> bool:
        """Return whether a tensor is a norm weight stored less 1, as some families store all but the recurrence's."""
        norm = re.search(r"norm(_\w+)?\.weight$", name) and "linear_attn." not in name
        return bool(norm) and FAMILIES[self.config.model_type].norms_less_1

    def layer(self, index: int) -> Layer:
        """Read the weights of decoder layer `index` (those of the multi-token head come last)."""
        prefix = f"{self.layer_names[index]}."
        experts = self._experts(index) if self.layer_configs[index].sparse else None
        weights = {name.removeprefix(prefix): self.tensor(name) for name in self.checkpoint.weights
                   if name.startswith(prefix) and not name.startswith(f"{prefix}mlp.experts.")}
        return Layer(experts, weights.pop("mlp.gate.weight", None), weights)

    def _experts(self, index: int) -> Experts:
        """Read a layer's experts, fused or one by one: bfloat16 if stored so, or FP8, half a float32 run's memory."""
        layer_name, config = self.layer_names[index], self.layer_configs[index]
        n, d, f = config.num_experts, config.hidden_size, config.expert_width
        prefix = f"{layer_name}.mlp.experts."
        tensors = self.checkpoint.weights
        stored = {tensors[name].dtype for name in tensors if name.startswith(prefix)}
        dtype = torch.bfloat16 if stored <= {"BF16", FP8} else self.dtype
        empty = partial(torch.empty, dtype=dtype, device=self.device)
        experts = Experts(gate=empty(n, f, d), up=empty(n, f, d), down=empty(n, d, f))
        for e in range(n):  # all are checked, even those that no token reaches
            for projection, weight in zip(experts, self._projections(prefix, e)):
                projection[e].copy_(self._finite(weight, f"expert {e} of {layer_name}"))
        return experts

    def _projections(self, prefix: str, e: int) -> Iterator[torch.Tensor]:
        """Yield gate (f, d), up (f, d) and down (d, f) of expert e, each as it is read."""
        load = self.checkpoint.load
        gate_up = f"{prefix}gate_up_proj"
        down = f"{prefix}down_proj"
        if gate_up in self.checkpoint.weights:  # fused: gate above up in a stack (n, 2 f, d)
            yield from self.turned(gate_up, load(gate_up, e)).chunk(2)
            yield self.turned(down, load(down, e))
        else:
            yield from (load(f"{prefix}{e}.{name}_proj.weight") for name in Experts._fields)

    def turned(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """Return a matrix or stack of the tensor `name`, transposed if stored so: to `Experts` layout, or back."""
        return matrix.mT if name in self.transposed else matrix

    def embed(self, ids: torch.Tensor, empty: Callable[..., torch.Tensor] = torch.empty) -> torch.Tensor:
        """Return the embeddings (B, L, d) of ids (B, L), the stream before the first layer; `empty` makes it."""
        distinct_ids, row_of = ids.cpu().unique(return_inverse=True)
        rows = self.checkpoint.load(self._embedding, distinct_ids.tolist())
        h = empty(ids.numel(), self.config.hidden_size, dtype=self.dtype, device=self.device)
        for h_chunk, chunk_rows in zip(h.split(PASS_TOKENS), row_of.flatten().split(PASS_TOKENS)):
            h_chunk.copy_(rows[chunk_rows])
        return h.view(*ids.shape, -1)

    def norm(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the norm with the weight `name`, a function of the stream. Raises InputError if it is not finite."""
        return RMSNorm(self._finite(self.tensor(name), name), self.config.rms_norm_eps)

    def unembedding(self) -> torch.Tensor:
        """Return the head W_U, (V, d). Raises InputError if it is not finite."""
        return self._finite(self.tensor(self._head), self._head)

    def _finite(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        finite = all(map(math.isfinite, tensor.aminmax()))  # NaN, if it has NaN
        require(finite, f"{self.checkpoint.path}: {what} has NaN or infinity in it")
        return tensor

    def stream(self, ids: torch.Tensor, empty: Callable[..., torch.Tensor] = torch.empty) -> Iterator[LayerPass]:
        """Run ids (B, L) through the decoder layers, then through those of a multi-token prediction head if there is
        one, and yield each one's LayerPass. A layer is unloaded before the next is read: one at most is in memory. A
        change of y in place goes on into the next layer. `empty` makes h, x and y."""
        h = self.embed(ids, empty)
        norm = self.norm(f"{self.prefix}norm.weight")
        step = None
        for index, name in enumerate(self.layer_names):
            if step is not None:
                step.layer.unload()
            if name.startswith("mtp."):
                h = self._mtp_input(h, norm, ids)
                norm = self.norm("mtp.norm.weight")
                ids = ids[:, 1:]
            step = self.run(index, self.layer(index), h, norm, empty)
            h = step.y.view_as(h)
            yield step

    def run(self, index: int, layer: Layer, h: torch.Tensor, norm: Callable,
            empty: Callable[..., torch.Tensor] = torch.empty) -> LayerPass:
        """Run a layer on h (B, L, d), about PASS_TOKENS tokens at a time, so that the memory of what lies between h
        and y is bounded. Raises InputError if y is not finite."""
        name = self.layer_names[index]
        batch, length, d = h.shape
        x = empty(batch * length, d, dtype=h.dtype, device=h.device)
        y = empty(batch * length, d, dtype=h.dtype, device=h.device)
        gates = []
        sequences = max(1, PASS_TOKENS // length)  # of a chunk
        tokens = sequences * length
        for h_chunk, x_chunk, y_chunk in zip(h.split(sequences), x.split(tokens), y.split(tokens)):
            x_new, gates_new, y_new = run_layer(h_chunk, layer, self.layer_configs[index])
            require(all(map(math.isfinite, y_new.aminmax())),
                    f"{self.checkpoint.path}: {name} gives values that are not finite: NaN or infinity "
                    f"in its weights, or an overflow of {self.dtype}")
            x_chunk.copy_(x_new)
            y_chunk.copy_(y_new)
            gates.append(gates_new)
        all_gates = None if layer.router is None else torch.cat(gates)
        return LayerPass(index, name, layer, h, x, all_gates, y, norm)

    def _mtp_input(self, h: torch.Tensor, norm: Callable, ids: torch.Tensor) -> torch.Tensor:
        """Return what a layer of the multi-token prediction head reads at position t, (B, L - 1, d): the embedding of
        token t + 1 beside the last hidden state at t, each normed, projected to the width of the stream."""
        embedded = self.norm("mtp.pre_fc_norm_embedding.weight")(self.embed(ids[:, 1:]))
        hidden = self.norm("mtp.pre_fc_norm_hidden.weight")(norm(h[:, :-1]))
        return torch.cat((embedded, hidden), dim=-1) @ self.tensor("mtp.fc.weight").T

    def hidden(self, ids: torch.Tensor, tick: Callable[[float], None] = lambda share: None) -> torch.Tensor:
        """Return the normed stream (B, L, d) that the head reads, for ids (B, L). `tick` is told the share done."""
        for step in islice(self.stream(ids), self.config.num_layers):
            tick((step.index + 1) / self.config.num_layers)
        return step.norm(step.y).view(*ids.shape, -1)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Return next-token logits (B, L, V) for ids (B, L) int64: float32, or float64 if that is the model's dtype."""
        logits = self.hidden(ids) @ self.unembedding().T
        return logits.to(widened(logits.dtype))

    def predictions(self, hidden: torch.Tensor, ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (log-probabilities of the next token (C, V), sum of the losses of those in ids (B, L), nats), float64,
        for what the head reads, hidden (B, L, d), so many positions at a time that they stay in a processor's cache."""
        head = self.unembedding()
        at_once = PASS_TOKENS // 4  # positions of a product, of which these stay in the cache:
        in_cache = max(1, (1 << 18 if head.is_cpu else 1 << 24) // len(head))
        targets = functional.pad(ids[:, 1:], (0, 1), value=-100).flatten().to(self.device)
        logits = None
        for h, h_targets in zip(hidden.flatten(0, 1).split(at_once), targets.split(at_once)):
            logits = torch.mm(h, head.T, out=logits if len(h) == at_once else None)  # one buffer
            for chunk, chunk_targets in zip(logits.split(in_cache), h_targets.split(in_cache)):
                log_p = chunk.double().log_softmax(-1)
                yield log_p, functional.nll_loss(log_p, chunk_targets, reduction="sum")

    def perplexity(self, ids: torch.Tensor) -> float:
        """Return exp of the mean next-token loss in nats over ids (B, L); infinity if that is beyond a float."""
        total = sum(loss for _, loss in self.predictions(self.hidden(ids), ids))
        return (total / ids[:, 1:].numel()).exp().item()  # math.exp would overflow

    def encode(self, documents: Iterable[str]) -> torch.Tensor:
        """Return the token ids (T,) of the documents, one after the other, each ended by the end-of-text token if any.
        Raises InputError if the tokenizer is missing, unreadable or has ids beyond the vocabulary."""
        end = [] if self.config.eos_token_id is None else [self.config.eos_token_id]
        text_pieces = (piece for document in documents for piece in pieces(document))

        def encode_batches(tokenizer) -> Iterator[torch.Tensor]:
            yield torch.zeros(0, dtype=torch.int64)
            while batch := [*islice(text_pieces, 32)]:
                texts, are_last = zip(*batch)
                encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
                batch_ids = []
                for encoding, is_last in zip(encodings, are_last):
                    batch_ids += encoding.ids + (end if is_last else [])
                yield torch.tensor(batch_ids, dtype=torch.int64)
        ids = torch.cat(self.use_tokenizer(lambda tokenizer: [*encode_batches(tokenizer)]))
        if len(ids) and ids.max() >= self.config.vocab_size:
            raise InputError(f"{self.checkpoint.path / 'tokenizer.json'}: token id {ids.max()} is beyond "
                             f"the vocabulary of {self.config.vocab_size}")
        return ids

    def encode_file(self, path: str | os.PathLike, tokens: int | None = None) -> torch.Tensor:
        """Return the token ids (T,) of a file's documents; of a large file, if some `tokens` do, of windows spread over
        it. Raises InputError as `read_documents`, `encode` do, and for chats if the tokenizer lacks their markers."""
        documents = read_documents(path, tokens)
        if any(document.startswith(CHATML[0]) for document in documents):
            markers = self.use_tokenizer(lambda tokenizer: [*map(tokenizer.token_to_id, CHATML)])
            require(None not in markers, f"{path}: has chats; {self.checkpoint.path / 'tokenizer.json'} "
                                         f"lacks {CHATML}; give text")
        return self.encode(documents)

    def use_tokenizer(self, use: Callable):
        """Return use(tokenizer) of the checkpoint's tokenizer, without padding or truncation."""
        from tokenizers import Tokenizer
        path = self.checkpoint.path / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            return use(tokenizer)
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as err:  # the library raises plain Exception, and panics that are none
            raise InputError(f"{path}: not a tokenizer that works ({cause(path, err)})") from None


# ----------------------------------------------------------------------------------------------------- loading

def cause(path: Path, err: BaseException) -> object:
    """Return why a file cannot be read: the error, or that Git LFS has not fetched the file."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read(30).startswith(b"version https://git-lfs"):
            return "a Git LFS pointer; `git lfs pull` fetches the file"
    return err


def beside(path: str | os.PathLike, suffix: str) -> Path:
    """Return the default place of what is made of a checkpoint: its path with a suffix; of a repository in the cache of
    the Hugging Face hub, whose folders are not ours to write in, its name with the suffix in the current folder."""
    place = os.path.abspath(path)
    repository = re.search(r"models--(?:[^/]+--)?([^/]+)/snapshots(?:/|$)", Path(place).as_posix())
    if repository:
        place = repository[1]
    return Path(os.path.abspath(place + suffix))


def read_json(path: Path) -> dict:
    """Return the JSON object in `path`. Raises InputError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as err:
        raise InputError(f"{path}: cannot be read ({err.strerror})") from None
    except (ValueError, RecursionError) as err:
        raise InputError(f"{path}: cannot be read as JSON ({err})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


class TensorInfo(NamedTuple):
    """Where a tensor lies: shard file name, dtype name, shape, and its byte range in the file."""
    file: str
    dtype: str
    shape: list[int]
    start: int
    end: int

    def range(self, row: int | None = None) -> tuple[int, int]:
        """Return the byte range of one row of the first dimension (None: of the whole tensor)."""
        if row is None:
            return self.start, self.end
        size = (self.end - self.start) // self.shape[0]
        return self.start + size * row, self.start + size * (row + 1)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the tensors of a safetensors file in file order, and its metadata. Raises InputError if malformed."""
    try:
        with safe_open(path, framework="pt") as opened:  # checks the header against the file
            metadata = opened.metadata() or {}
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, ValueError, RecursionError, SafetensorError) as err:
        raise InputError(f"{path}: not a readable safetensors file ({cause(path, err)})") from None
    header.pop("__metadata__", None)
    infos = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]  # after the 8 bytes of the length, and the header
        start, end = 8 + length + start, 8 + length + end
        infos[name] = TensorInfo(path.name, entry["dtype"], entry["shape"], start, end)
    return infos, metadata


class Checkpoint:
    """The tensors of a checkpoint folder by name, read lazily.

    Attributes: `path`, `raw_config` (config.json as it stands), `tensors` (name -> TensorInfo, in file order),
    `weights` (the same without scales), `metadata` (shard file -> its metadata), `sharded` (whether an index lists the
    shards). Raises InputError if the folder, config.json or a weight file is missing or malformed."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        require(self.path.is_dir(),
                f"{self.path}: not a folder; expected one with config.json and safetensors weights")
        self.raw_config = read_json(self.path / "config.json")
        self.sharded = not (self.path / WEIGHTS).is_file()
        self.tensors, self.metadata, self._fingerprint = {}, {}, None
        files = self._shards() if self.sharded else [WEIGHTS]
        for file in files:
            infos, self.metadata[file] = read_header(self.path / file)
            twice = infos.keys() & self.tensors.keys()
            if twice:
                name = min(twice)
                raise InputError(f"{self.path}: {name} is in {self.tensors[name].file} and in {file}")
            self.tensors |= infos
        self.weights = {name: info for name, info in self.tensors.items() if not name.endswith(SCALE)}

    def _shards(self) -> list[str]:
        """Return the names of the shards that the index lists."""
        path = self.path / INDEX
        require(path.is_file(), f"{self.path}: no weights; expected {WEIGHTS} or {INDEX}")
        index = read_json(path)
        weight_map = index.get("weight_map")
        metadata = index.get("metadata") or {}
        require(isinstance(weight_map, dict) and weight_map and isinstance(metadata, dict),
                f"{path}: no weight_map, or metadata that is no object")
        files = sorted({str(file) for file in weight_map.values()})
        for file in files:
            require(re.fullmatch(r"[\w-][\w.-]*\.safetensors", file),
                    f"{path}: {file!r} is not the name of a safetensors file in the folder")
        return files

    def load(self, name: str, row: int | list[int] | None = None, as_stored: bool = False) -> torch.Tensor:
        """Return the named tensor, or one row of its first dimension, or a list of them, as it is stored; an FP8 matrix
        times its scales, bfloat16, unless `as_stored` (no activation is quantised, as FP8 kernels do). Read rather than
        mapped, so that no page of a file stays in this process's memory. Raises InputError for a tensor that is
        missing, of no floating-point type, or cut off, for a row of FP8, and for a scale that is not finite."""
        require(name in self.tensors, f"{self.path}: the weights have no tensor {name!r}")
        info = self.tensors[name]
        path = self.path / info.file
        shape = info.shape
        rows = row if isinstance(row, list) else [row]
        first = shape[0] if shape else 0
        readable = row is None or (info.dtype != FP8 and all(at in range(first) for at in rows))
        require(info.dtype in STORED and readable,
                f"{path}: {name} is stored as {info.dtype} of shape {shape}; supported: "
                f"{', '.join(STORED)}, and a row from 0 unless {FP8}")

        # The whole tensor, one row without its first dimension, or a stack of rows.
        if row is rows:
            shape = [len(rows), *shape[1:]]
        elif row is not None:
            shape = shape[1:]
        tensor = torch.empty(shape, dtype=STORED[info.dtype])
        as_bytes = tensor.view(len(rows), -1).view(torch.uint8).numpy()
        with open(path, "rb") as file:
            for buffer, at in zip(as_bytes, rows):
                start, end = info.range(at)
                file.seek(start)
                require(file.readinto(buffer) == end - start, f"{path}: ends within {name}")
        if info.dtype != FP8 or as_stored:
            return tensor
        scale = self.load(name + SCALE).float()
        require(scale.isfinite().all(), f"{path}: {name}{SCALE} has NaN or infinity in it")
        block = quantisation(self.raw_config)["weight_block_size"] or shape
        return dequantised(tensor, scale, block)

    def nbytes(self) -> int:
        """Return the size of the weight files."""
        return sum((self.path / file).stat().st_size for file in self.metadata)

    def fingerprint(self) -> str:
        """Return the SHA-256 over the name and all bytes of each weight file, and config.json. It is computed once."""
        def digest(file: str) -> str:
            with open(self.path / file, "rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
        if self._fingerprint is None:
            with ThreadPoolExecutor() as threads:  # hashlib releases the interpreter's lock
                digests = list(threads.map(digest, self.metadata))
            listed = json.dumps(list(zip(self.metadata, digests))).encode()
            config = (self.path / "config.json").read_bytes()
            self._fingerprint = hashlib.sha256(listed + config).hexdigest()
        return self._fingerprint


def dequantised(tensor: torch.Tensor, scale: torch.Tensor, block: list[int]) -> torch.Tensor:
    """Return an FP8 matrix times its scales, one a block, (height, width) each, in bfloat16."""
    rows, columns = tensor.shape
    height = min(block[0], rows)
    width = min(block[1], columns)
    numbers = tensor.flatten().view(torch.uint8).int()
    values = FP8_VALUES.index_select(0, numbers).view(rows, columns)
    scale = scale.view(-1, -(-columns // width))  # a row for each row of blocks
    for rows_of_block, scales in zip(values.split(height), scale):
        rows_of_block.mul_(scales.repeat_interleave(width)[:columns])
    return values.bfloat16()


# ---------------------------------------------------------------------------------------------------- checking

def value_of(text: dict, key: str, kind: type, default: float | None = None):
    """Return text[key], or default if absent or null. Raises InputError if there is neither, if the value is not of the
    `kind`, and for a number that is not above 0, below 2^31 if it is whole, else below 3e38."""
    value = text.get(key)
    if value is None:
        value = default
    require(value is not None, f"config.json: the key {key!r} is missing")
    if kind is bool:
        fits, what = isinstance(value, bool), "true or false"
    elif kind is int:
        fits, what = isinstance(value, int) and 0 < value < 2**31, "a positive whole number"
    else:
        fits, what = isinstance(value, (int, float)) and 0 < value < 3e38, "a positive number"
    fits = fits and isinstance(value, bool) == (kind is bool)  # True is an int to Python
    require(fits, f"config.json: {key} is {value!r}; it must be {what}")
    return value


FLAT_CONFIG = "text_config and rope_parameters must be JSON objects, the latter a flat one"


def require_config(ok: object, says: str) -> None:
    """Raise InputError(says), of config.json, unless ok."""
    require(ok, f"config.json: {says}")


def read_config(raw: dict) -> Config:
    """Return the Config of the object in `config.json` (the key names of transformers 4 and 5; a nested `text_config`).
    Raises InputError for an unsupported model type or option, and for a key that is missing or of a wrong kind."""
    kind = str(raw.get("model_type"))
    require_config(kind in FAMILIES, f"model_type {kind!r} is not supported{REFUSED.get(kind, '')}; supported: "
            f"{', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    text = raw.get("text_config") or raw
    require_config(isinstance(text, dict), FLAT_CONFIG)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    require_config(isinstance(rope, dict), FLAT_CONFIG)
    require_config(not any(isinstance(value, dict) for value in rope.values()), FLAT_CONFIG)
    refuse_unsupported(raw, text, rope)
    whole = partial(value_of, text, kind=int)
    number = partial(value_of, text | rope, kind=float)

    def optional(key: str, kind: type):
        return None if text.get(key) is None else value_of(text, key, kind)

    def of_experts(key: str) -> int:
        return 0 if family.dense else whole(key)

    # The heads of the attention, and how much of each rotates.
    num_heads = whole("num_attention_heads")
    head_dim = whole("head_dim", default=whole("hidden_size") // num_heads)
    rotary_dim = head_dim  # whatever the configuration says
    if family.partial_rotary_factor:
        rotary_dim = int(head_dim * number("partial_rotary_factor", default=family.partial_rotary_factor))
    biased = ""
    if kind == "qwen2_moe":
        if value_of(text, "qkv_bias", bool, True):
            biased = "qkv"
    elif value_of(text, "attention_bias", bool, False):
        biased = "qkvo"

    eos = text.get("eos_token_id", raw.get("eos_token_id"))
    if isinstance(eos, list):
        eos = eos[0] if eos else None
    tied = [value_of(config, "tie_word_embeddings", bool, False) for config in (raw, text)]
    renormalised = family.always_renormalised or value_of(text, "norm_topk_prob", bool, family.norm_topk_prob)
    config = Config(
        model_type=kind, vocab_size=whole("vocab_size"), hidden_size=whole("hidden_size"),
        num_layers=whole("num_hidden_layers"), num_heads=num_heads,
        num_kv_heads=whole("num_key_value_heads", default=num_heads),
        head_dim=head_dim, rotary_dim=rotary_dim,
        rope_theta=number("rope_theta", default=family.rope_theta),
        rms_norm_eps=number("rms_norm_eps", default=family.rms_norm_eps),
        num_experts=of_experts(expert_count_keys(text)[0]),
        expert_width=of_experts(family.width_key),
        shared_width=optional("shared_expert_intermediate_size", int),
        dense_width=optional("intermediate_size", int),
        top_k=of_experts("num_experts_per_tok"), norm_topk_prob=renormalised,
        tie_word_embeddings=any(tied), eos_token_id=eos,
        max_positions=optional("max_position_embeddings", int),
        clip_qkv=optional("clip_qkv", float),
        linear_key_heads=whole("linear_num_key_heads", default=16),
        linear_key_head_dim=whole("linear_key_head_dim", default=128),
        linear_value_heads=whole("linear_num_value_heads", default=32),
        linear_value_head_dim=whole("linear_value_head_dim", default=128),
        linear_conv_width=whole("linear_conv_kernel_dim", default=4), biased=biased)
    check_config(config)
    return config


def layer_configs(raw: dict, config: Config, names: list[str]) -> list[Config]:
    """Return the Config of each layer by the object in `config.json`: of the decoder's whether they have experts, and
    linear attention, and how many experts and how wide (`per_layer_config`). Raises InputError for another form."""
    text = raw.get("text_config") or raw
    family = FAMILIES[config.model_type]
    count = config.num_layers
    dense = text.get("mlp_only_layers") or []
    mixers = text.get("layer_types")
    per_layer = text.get("per_layer_config") or {}
    sparse_step = value_of(text, "decoder_sparse_step", int, 1)
    full_step = value_of(text, "full_attention_interval", int, 4)
    require_config(isinstance(dense, list), f"mlp_only_layers is {dense!r}; it must be a list")
    require_config(not mixers or (isinstance(mixers, list) and len(mixers) == count),
            "layer_types must be a list of all")
    check_per_layer(per_layer, count, {"num_experts", "num_local_experts", family.width_key})

    per_layer = {int(index): layer for index, layer in per_layer.items()}  # "07" is a stranger's 7
    configs = []
    for i in range(count):
        sparse = not family.dense
        if family.dense_layers:
            sparse = i not in dense and (i + 1) % sparse_step == 0
        recurrent = (i + 1) % full_step > 0
        if mixers:
            recurrent = mixers[i] != "full_attention"
        of_layer = replace(config, sparse=sparse, recurrent=recurrent and family.recurrent_layers)
        if layer := per_layer.get(i):
            n = value_of(layer, expert_count_keys(layer)[0], int, config.num_experts)
            width = value_of(layer, family.width_key, int, config.expert_width)
            of_layer = replace(of_layer, num_experts=n, expert_width=width)
            check_config(of_layer)
        configs.append(of_layer)
    return configs + [config] * (len(names) - count)


def check_per_layer(per_layer: object, count: int, keys: set[str]) -> None:
    """Raise InputError unless `per_layer_config` has objects of these keys for some of `count` layers."""
    says = f"per_layer_config must have an object for each of some layers, of {', '.join(sorted(keys))}"
    require_config(isinstance(per_layer, dict), says)
    for index, layer in per_layer.items():
        require_config(re.fullmatch(r"\d{1,9}", index) and int(index) < count, says)
        require_config(isinstance(layer, dict) and layer.keys() <= keys, says)


def check_config(config: Config) -> None:
    """Raise InputError if two values of the configuration do not fit together."""
    eos = config.eos_token_id
    rotary = config.rotary_dim
    heads = config.num_heads
    require_config(eos is None or eos in range(config.vocab_size),
            f"eos_token_id is {eos!r}; it must be a token id below {config.vocab_size}")
    require_config(rotary % 2 == 0 and rotary <= config.head_dim, f"{rotary} of the {config.head_dim} "
            "dimensions of a head rotate; it must be an even number of them")
    require_config(config.top_k <= config.num_experts, f"num_experts_per_tok {config.top_k} is above "
            f"{config.num_experts} experts")
    require_config(heads % config.num_kv_heads == 0,
            f"num_key_value_heads is {config.num_kv_heads}; it must divide {heads}")
    require_config(config.linear_value_heads % config.linear_key_heads == 0, "linear_num_key_heads is "
            f"{config.linear_key_heads}; it must divide {config.linear_value_heads}")


def expert_count_keys(text: dict) -> list[str]:
    """Return the key of the expert count, transformers 5's for Qwen3-MoE, or both. Raises InputError if they differ."""
    keys = [key for key in ("num_experts", "num_local_experts") if key in text] or ["num_experts"]
    require_config(text.get(keys[0]) == text.get(keys[-1]),
            "num_experts and num_local_experts differ")
    return keys


def quantisation(raw: dict) -> dict:
    """Return the quantization_config of a config.json, at the top or in `text_config`, with its default block size."""
    text = raw.get("text_config") or {}
    quantised = raw.get("quantization_config") or text.get("quantization_config") or {}
    if not isinstance(quantised, dict):
        quantised = {"quant_method": quantised}
    return {"weight_block_size": [128, 128]} | quantised


def refuse_unsupported(raw: dict, text: dict, rope: dict) -> None:
    """Raise InputError for what would give a wrong number: quantised but to FP8, other rope, window or activation."""
    quantised = quantisation(raw)
    said = [str(quantised[key]) for key in ("quant_method", "quant_algo", "format") if key in quantised]
    method = ", ".join(said)
    require_config(method == "fp8" or len(quantised) == 1,
            f"quantised weights ({method}); fp8 and plain ones are supported")
    block = repr(quantised["weight_block_size"])
    require_config(re.fullmatch(r"None|\[[1-9]\d*, [1-9]\d*\]", block),
            f"weight_block_size {block}: must be 2 above 0")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    require_config(rope_type == "default", f"rope type {rope_type!r} is not supported; only 'default' is")
    window = text.get("use_sliding_window") and text.get("sliding_window", "by default") is not None
    require_config(not window and "sliding_attention" not in str(text.get("layer_types")),
            "a sliding window is in use; only full attention is supported")
    act = text.get("hidden_act", "silu")
    require_config(act in ("silu", "swish"), f"hidden_act {act!r} is not supported; only 'silu' is")


def find_layers(tensors: Iterable[str], prefix: str, count: int) -> list[str]:
    """Return the names of `count` decoder layers, then of those of a multi-token prediction head. Raises InputError if
    the tensors are of another number of decoder layers."""
    stored = set()
    for tensor in tensors:
        match = re.match(r"(.*?layers\.\d+)\.", tensor)
        if match:
            stored.add(match[1])
    decoder = [name for name in stored if name.startswith(f"{prefix}layers.")]
    names = [f"{prefix}layers.{i}" for i in range(min(count, len(decoder) + 1))]
    require_config(len(decoder) == count and stored.issuperset(names),
            f"num_hidden_layers is {count}; the weights have {len(decoder)} layers")
    return names + sorted(name for name in stored if name.startswith("mtp."))


def mixer_shapes(cfg: Config) -> dict[str, list[int]]:
    """Return the shapes of the weights of a layer's token mixer, by name in the layer without `.weight`."""
    d, family = cfg.hidden_size, FAMILIES[cfg.model_type]
    shapes = {}
    if cfg.recurrent:
        heads = cfg.linear_value_heads
        key = cfg.linear_key_heads * cfg.linear_key_head_dim
        value = heads * cfg.linear_value_head_dim
        projections = {"qkv": 2 * key + value, "z": value, "a": heads, "b": heads}
        if family.by_key_head:
            projections = {"qkvz": 2 * key + 2 * value, "ba": 2 * heads}
        for projection, rows in projections.items():
            shapes[f"linear_attn.in_proj_{projection}"] = [rows, d]
        shapes["linear_attn.conv1d"] = [2 * key + value, 1, cfg.linear_conv_width]
        shapes["linear_attn.norm"] = [cfg.linear_value_head_dim]
        shapes["linear_attn.out_proj"] = [d, value]
        return shapes

    query = cfg.num_heads * cfg.head_dim
    key = cfg.num_kv_heads * cfg.head_dim
    shapes["self_attn.q_proj"] = [2 * query if family.gated_query else query, d]
    shapes["self_attn.k_proj"] = shapes["self_attn.v_proj"] = [key, d]
    shapes["self_attn.o_proj"] = [d, query]
    if family.head_norms and family.attention is qwen_attention:  # per head
        shapes["self_attn.q_norm"] = shapes["self_attn.k_norm"] = [cfg.head_dim]
    elif family.head_norms:
        shapes["self_attn.q_norm"], shapes["self_attn.k_norm"] = [query], [key]
    return shapes


def layer_shapes(cfg: Config, fused: bool) -> dict[str, list[int | None]]:
    """Return the shapes of the tensors that a layer must have, by name in the layer; `fused` experts or single ones."""
    n, d, f = cfg.num_experts, cfg.hidden_size, cfg.expert_width
    shapes = {"input_layernorm": [d], "post_attention_layernorm": [d]} | mixer_shapes(cfg)
    widths = {}  # of each SwiGLU block
    if cfg.sparse:
        shapes["mlp.gate"] = [n, d]
        if FAMILIES[cfg.model_type].shared_expert:
            shapes["mlp.shared_expert_gate"] = [1, d]
            widths["mlp.shared_expert"] = cfg.shared_width
        if not fused:
            widths |= {f"mlp.experts.{e}": f for e in range(n)}
    else:
        widths["mlp"] = cfg.dense_width
    for block, width in widths.items():
        shapes[f"{block}.gate_proj"] = shapes[f"{block}.up_proj"] = [width, d]
        shapes[f"{block}.down_proj"] = [d, width]
    shapes = {f"{name}.weight": shape for name, shape in shapes.items()}

    # What is no weight.
    if cfg.recurrent:
        shapes["linear_attn.A_log"] = shapes["linear_attn.dt_bias"] = [cfg.linear_value_heads]
    else:
        for projection in cfg.biased:
            rows = shapes[f"self_attn.{projection}_proj.weight"][:1]
            shapes[f"self_attn.{projection}_proj.bias"] = rows
    if cfg.sparse and fused:
        shapes |= {"mlp.experts.gate_up_proj": [n, 2 * f, d], "mlp.experts.down_proj": [n, d, f]}
    return shapes


def check_tensors(path: Path, tensors: dict[str, TensorInfo], prefix: str, layers: dict[str, Config]) -> set[str]:
    """Raise InputError if a tensor that the model reads is missing, of no floating-point type, or of a shape that
    does not follow from config.json, and if a layer has one that it does not ask for. `layers` : name -> its Config.
    Return the names of fused experts that are stored transposed. Reads no weight."""
    def check(name: str, shape: list[int | None]) -> None:
        require(name in tensors, f"{path}: the weights have no tensor {name!r}, which config.json asks for")
        info = tensors[name]
        require(None not in shape, f"{path}: config.json does not say how wide {name} is")
        require(info.shape == shape, f"{path}: {name} has shape {info.shape}; by config.json it must be {shape}")
        require(info.dtype in (*DTYPES, FP8),
                f"{path}: {name} is stored as {info.dtype}; supported: {', '.join(DTYPES)}, {FP8}")
    cfg = next(iter(layers.values()))
    d = cfg.hidden_size

    # The shapes of the tensors of each layer, as they are stored, by their name in it.
    stored = {layer: {} for layer in layers}
    for name, info in tensors.items():
        match = re.match(r"(.*?layers\.\d+)\.(.*)", name)
        if match and match[1] in stored:
            stored[match[1]][match[2]] = info.shape

    # Those that config.json asks for.
    expected = {f"{prefix}embed_tokens.weight": [cfg.vocab_size, d], f"{prefix}norm.weight": [d]}
    if not cfg.tie_word_embeddings or "lm_head.weight" in tensors:  # a stored head counts
        expected["lm_head.weight"] = [cfg.vocab_size, d]
    if any(layer.startswith("mtp.") for layer in layers):
        expected |= {"mtp.fc.weight": [d, 2 * d], "mtp.norm.weight": [d],
                     "mtp.pre_fc_norm_embedding.weight": [d], "mtp.pre_fc_norm_hidden.weight": [d]}
    transposed = set()
    for layer, names in stored.items():
        if layers[layer].sparse:  # before a stranger's number of experts is counted up to
            check(f"{layer}.mlp.gate.weight", [layers[layer].num_experts, d])
        shapes = layer_shapes(layers[layer], "mlp.experts.gate_up_proj" in names)
        turned = turned_shapes(cfg, names, shapes)
        transposed |= {f"{layer}.{name}" for name in turned}
        for name, shape in (shapes | turned).items():
            expected[f"{layer}.{name}"] = shape
    for name, shape in expected.items():
        check(name, shape)

    # And no other in a mixer or a block.
    for layer, names in stored.items():
        for name in sorted(names):
            if re.match(r"(mlp|self_attn|linear_attn)\.(?!rotary_emb)", name):
                require(f"{layer}.{name}" in expected,
                        f"{path}: {layer}.{name} is none of the tensors that config.json asks for")
    return transposed


def turned_shapes(cfg: Config, stored: dict, shapes: dict) -> dict[str, list[int]]:
    """Return the shapes of a layer's fused experts if they are stored transposed, by name in it; else none."""
    if not FAMILIES[cfg.model_type].may_be_transposed:
        return {}
    turned = {name: [shape[0], *shape[:0:-1]] for name, shape in shapes.items() if ".experts." in name}
    if any(stored.get(name) == shape != shapes[name] for name, shape in turned.items()):
        return turned
    return {}


def check_scales(checkpoint: Checkpoint) -> None:
    """Raise InputError for an FP8 tensor that is no matrix, or one of which rows are read, and for a scale that is
    missing, of another shape than follows from config.json, or of no FP8 tensor. Reads no weight."""
    tensors = checkpoint.tensors
    block = quantisation(checkpoint.raw_config)["weight_block_size"]
    missing = TensorInfo("", "missing", [], 0, 0)
    for stored in tensors:
        if not stored.endswith(SCALE) and tensors[stored].dtype != FP8:
            continue
        name = stored.removesuffix(SCALE)
        info = tensors.get(name, missing)
        scale = tensors.get(name + SCALE, missing)
        wanted = [1] * min(len(scale.shape), 2)  # one scale of the whole matrix
        if block:
            wanted = [-(-size // side) for size, side in zip(info.shape, block)]
        matrix = len(info.shape) == 2 and not name.endswith(("embed_tokens.weight", "mlp.gate.weight"))
        require(matrix and info.dtype == FP8 and scale.dtype in STORED and scale.shape == wanted,
                f"{checkpoint.path}: {name} is {info.dtype} {info.shape}, {name}{SCALE} {scale.dtype} "
                f"{scale.shape}; only a matrix read whole can be {FP8}: blocks {block}, scales {wanted}")


# -------------------------------------------------------------------------------------------------------- text

def read_documents(path: str | os.PathLike, tokens: int | None = None) -> list[str]:
    """Return one document a UTF-8 text file, or one a line of a `.jsonl` or `.json` file. If no more than some `tokens`
    are wanted, windows of a large file are read, and of a document in it that is longer than a window a part. Raises
    InputError if the file cannot be read as that, or has no text."""
    path, documents = Path(path), []
    lines = path.suffix.lower() in (".jsonl", ".json")
    most = max(LEAST_TEXT, TEXT_BYTES * tokens) if tokens else sys.maxsize
    for start, whole, text in windows(path, most, lines):
        for document in json_documents(path, start, text) if lines else [text]:
            if not whole:  # a part of it, not always the first
                at = start % max(1, len(document) - WINDOW)
                document = document[at:at + WINDOW]
            documents.append(document)
    require(any(map(str.strip, documents)), f"{path}: no text in it")
    return documents


def windows(path: Path, most: int, lines: bool) -> Iterator[tuple[int, bool, str]]:
    """Yield the text of a file: where it starts, whether it is whole, and the text. If the file has more than `most`
    bytes, these are windows, evenly spaced, `most` bytes in all; they have whole `lines` or may end within a word."""
    try:
        with open(path, "rb") as file:
            size, end = file.seek(0, os.SEEK_END), 0
            count, width = (1, size) if size <= most else (most // WINDOW, WINDOW)
            for window in range(count):
                start = window * (size - width) // max(1, count - 1)
                if start < end:  # within the last line that was read
                    continue
                file.seek(start)
                if lines and start:
                    file.readline()
                data = file.read(width) + (file.readline() if lines else b"")
                cut = count > 1 and not lines
                if cut:
                    data = data.lstrip(bytes(range(0x80, 0xc0)))  # of a character that starts before
                end = file.tell()
                decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), True)
                yield start, count == 1, decoder.decode(data, final=not cut)
    except (OSError, ValueError) as err:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({getattr(err, 'strerror', err)})") from None


def json_documents(path: Path, start: int, text: str) -> Iterator[str]:
    """Yield the `text` of each line, or its `messages` in ChatML. Raises InputError for a line that has neither."""
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                row = json.loads(line)
                document = row["text"] if "text" in row else chat_text(row["messages"])
                document.encode()  # neither a number nor a lone surrogate is text
                yield document
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            place = f"{path}, line {number} after byte {start}" if start else f"{path}, line {number}"
            raise InputError(f'{place}: expected a JSON object with "text", or "messages", each with a "role" '
                             'and a "content", all strings') from None


def chat_text(messages: list[dict]) -> str:
    """Return a chat's messages in ChatML."""
    return "".join(f"{CHATML[0]}{turn['role']}\n{turn['content'] + CHATML[1]}\n" for turn in messages)


def pieces(document: str) -> Iterator[tuple[str, bool]]:
    """Yield a document in pieces that are encoded as in the whole, and whether each is the last: a long one is cut
    between the end of a line and a letter, where no tokenizer of these families has a token across."""
    start, line_start = 0, re.compile(r"(?<=\S\n)(?=[^\W\d_])")
    while cut := line_start.search(document, start + PIECE):
        yield document[start:cut.start()], False
        start = cut.start()
    yield document[start:], True


@cache
def python_documentation(part: str) -> tuple[str, ...]:
    """Return English that every Python carries, of a part as in `python_sources`: the language reference in pydoc and
    the standard library's docstrings, a topic or a module a document."""
    texts = []
    for source in python_sources(part).values():
        texts.append(docstrings(source) if isinstance(source, Path) else source)
    return tuple(filter(None, texts))


def python_sources(part: str) -> dict[str, str | Path]:
    """Return by name the texts of pydoc's topics and the files of the standard library, without its tests, that belong
    to a part ("train" 80%, "calibration" 10%, "held-out" 10%). A hash of its name puts each into its part and in its
    place there, so that neither moves when others come and go."""
    from pydoc_data.topics import topics
    sources = {f"topic {name}": text for name, text in topics.items()}
    library = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "_vendor", "__pycache__"}
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if not skip & set(name.parts):
            sources[f"module {name.as_posix()}"] = path
    parts = ("calibration", "held-out", *["train"] * 8)
    places = {hashlib.sha256(name.encode()).hexdigest(): name for name in sources}
    here = [places[at] for at in sorted(places) if parts[int(at, 16) % 10] == part]
    return {name: sources[name] for name in here}


def docstrings(path: Path) -> str:
    """Return all docstrings of a Python source file; nothing if it does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return "\n\n".join(filter(None, texts))


def sequences(ids: torch.Tensor, seq_len: int, count: int | None = None, seed: int = 0) -> torch.Tensor:
    """Cut ids (T,) into sequences (B, seq_len), leaving out an incomplete last one: all of them in order, or `count`
    sampled without replacement. Raises InputError if there is not one."""
    check_range("seq_len", seq_len, 2)
    require(len(ids) >= seq_len,
            f"the text has {len(ids)} tokens, too few for one sequence of seq_len {seq_len}; give more text")
    whole = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    if count is None:
        return whole
    pick = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:count]
    return whole[pick.sort().values]


def calibration_ids(model: Model, files: Sequence[Path] = (), tokens: int = TOKENS,
                    seq_len: int | None = None, seed: int = 42,
                    parts: Sequence[str] = ("calibration",)) -> torch.Tensor:
    """Sequences (tokens // seq_len, seq_len) of text files, of each as many, or of parts of Python's documentation,
    whose documents stand one after the other (A.11, D.3); if the one text is short, fewer with a warning. seq_len None
    is the model's max_position_embeddings (512 if it has none), at most the tokens of a file. Raises InputError for a
    bad number, and if one of several is short."""
    check_range("tokens", tokens, 2, 10**9)
    of_file = tokens // max(1, len(files))
    if seq_len is None:
        seq_len = min(model.config.max_positions or 512, of_file)
    require(len(files) < 2 or seq_len <= of_file,
            f"tokens {tokens}: too few for a sequence of {seq_len} from each of {len(files)} files")
    check_range("seq_len", seq_len, 2, tokens)
    check_range("seed", seed, 0, 2**63 - 1)
    warn_of_length(model, seq_len)
    count = tokens // seq_len
    samples = []
    if not files:
        documents = [text for part in parts for text in python_documentation(part)]
        samples.append(sequences(model.encode(documents), seq_len, count, seed))
    for file, share in zip(files, shares_of(count, len(files))):
        wanted = share * seq_len
        text = model.encode_file(file, wanted)
        require(len(files) == 1 or len(text) >= wanted,
                f"{file}: has {len(text)} tokens, its share of tokens {wanted}; give more")
        samples.append(sequences(text, seq_len, share, seed))
    ids = torch.cat(samples)
    if len(ids) < count:
        warn(f"the text has only {ids.numel()} tokens in whole sequences, all used; {tokens} were asked")
    return ids


def shares_of(count: int, files: int) -> list[int]:
    """Sequences that each of some files gives of a sample of `count`: as equal as can be."""
    return [len(range(i, count, files)) for i in range(files)]


def warn_of_length(model: Model, seq_len: int) -> None:
    """Warn if a sequence is longer than those that the model was trained on."""
    most = model.config.max_positions
    if most and seq_len > most:
        warn(f"seq_len {seq_len}: the model is made for at most {most} tokens (max_position_embeddings)")


def warn(message: str, kind: str = "warning") -> None:
    """Print a single line on stderr, whatever a stranger's file names have in it."""
    says = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in message)
    print(f"{kind}: {says}", file=sys.stderr, flush=True)


def progress_bar() -> Callable[[float | None], None]:
    """A function that shows the share of the work done and the time left on stderr; None clears the line. On a terminal
    the line is redrawn twice a second; elsewhere a line is printed twice a minute."""
    start, end, every = "", "\n", 30.0
    if sys.stderr.isatty():
        start, end, every = "\r", "\x1b[K", 0.5
    shown = time.monotonic()
    first = None  # time and share at the first call: earlier work was in the cache

    def bar(done: float | None) -> None:
        nonlocal shown, first
        now = time.monotonic()
        if done is None:
            print(start and start + end, end="", file=sys.stderr, flush=True)
            return
        if first is None:
            first = now, done
        if done > first[1] and now - shown >= every:
            left = timedelta(seconds=round((now - first[0]) * (1 - done) / (done - first[1])))
            print(f"{start}{done:4.0%} done, {left} left", end=end, file=sys.stderr, flush=True)
            shown = now
    return bar


# ----------------------------------------------------------------------------------------------------- writing

class Piece(NamedTuple):
    """A tensor of the output: its name in the source, and the rows of its first dimension that stay, in their new order
    (None: the whole tensor); its shard, dtype name and shape in the output, and what gives its bytes."""
    source: str
    rows: list[int] | None
    file: str
    dtype: str
    shape: list[int]
    read: Callable[[], Iterable[bytes | memoryview]]

    def nbytes(self) -> int:
        """Return its size in the output."""
        bits = re.search(r"\d+", self.dtype)  # of BF16, I64, ...; BOOL has none
        return math.prod(self.shape) * int(bits[0] if bits else 8) // 8


def copied(checkpoint: Checkpoint, name: str, rows: list[int] | None = None) -> Piece:
    """Return a stored tensor, or some of its rows, to be copied byte for byte."""
    info = checkpoint.tensors[name]

    def read() -> Iterator[bytes]:
        with open(checkpoint.path / info.file, "rb") as file:
            for row in [None] if rows is None else rows:
                start, end = info.range(row)
                file.seek(start)
                for at in range(start, end, BLOCK_BYTES):
                    yield file.read(min(BLOCK_BYTES, end - at))
    shape = info.shape if rows is None else [len(rows), *info.shape[1:]]
    return Piece(name, rows, info.file, info.dtype, shape, read)


def surviving_tensors(checkpoint: Checkpoint, survivors: dict[str, list[int]]) -> dict[str, Piece]:
    """Return the tensors of the compressed checkpoint by name: expert survivors[layer][i] becomes expert i of that
    layer. Router rows and fused experts keep the survivors' rows; experts stored one by one are renumbered; all else,
    layers that are not in `survivors` among it, stays as it is."""
    kept = {}
    for name in checkpoint.tensors:
        match = re.fullmatch(r"(.+)\.mlp\.(?:gate\.weight|experts\.(?:gate_up_proj|down_proj|(\d+)\.(.+)))", name)
        rows = match and survivors.get(match[1])
        if not rows or match[2] is None:
            kept[name] = copied(checkpoint, name, rows or None)
        elif int(match[2]) in rows:
            number = rows.index(int(match[2]))
            kept[f"{match[1]}.mlp.experts.{number}.{match[3]}"] = copied(checkpoint, name)
    return kept


def with_keys(config: dict, changes: dict[str, int], per_layer: dict[int, dict[str, int]] = {}) -> dict:
    """Return the object of config.json with other values of some keys, at the top or in `text_config`: one for all
    layers, or a layer's own, which transformers reads by the code that `auto_map` names."""
    text = config.get("text_config") or config
    layers = {}
    for index, layer in (text.get("per_layer_config") or {}).items():
        layers[int(index)] = {key: value for key, value in layer.items() if key not in changes}
    for index, layer in per_layer.items():
        layers[index] = layers.get(index, {}) | layer
    layers = {str(index): layers[index] for index in sorted(layers) if layers[index]}

    text = text | changes
    text.pop("per_layer_config", None)
    if layers:
        text["per_layer_config"] = layers
    config = config | {"text_config": text} if config.get("text_config") else text
    if not layers and MODELING in str(config.get("auto_map")):  # of a layer's own no longer
        config = {key: value for key, value in config.items() if key != "auto_map"}
    return config


def write_safetensors(path: Path, tensors: dict[str, Piece], metadata: dict[str, str]) -> None:
    """Write a safetensors file, a piece at a time."""
    header = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, piece in tensors.items():
        end = offset + piece.nbytes()
        header[name] = {"dtype": piece.dtype, "shape": piece.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for piece in tensors.values():
            out.writelines(piece.read())


def write_checkpoint(checkpoint: Checkpoint, out: Path, survivors: dict[str, list[int]],
                     files: dict[str, bytes]) -> None:
    """Write the checkpoint that keeps `survivors`, layer name -> K expert indices, and files by their names, to the
    folder `out`, which appears whole or not at all. Names, dtypes and shards are the source's; unsorted indices permute
    the experts. Empty: a plain copy. Raises InputError if the layers keep different numbers, and as `new_folder` does.
    """
    config = checkpoint.raw_config
    counts = sorted({len(kept) for kept in survivors.values()})
    require(len(counts) < 2, f"survivors: the layers keep {counts} experts; all must keep the same number")
    if counts:
        keys = expert_count_keys(config.get("text_config") or config)
        config = with_keys(config, dict.fromkeys(keys, counts[0]))
    write_tensors(checkpoint, out, surviving_tensors(checkpoint, survivors), config, files)


def write_tensors(checkpoint: Checkpoint, out: Path, kept: dict[str, Piece], config: dict,
                  files: dict[str, bytes]) -> None:
    """Write pieces and files by their names, the object of config.json, and the checkpoint's tokenizer and other small
    files, to the folder `out`, which appears whole or not at all. The configuration ties no head that is stored. Raises
    InputError as `new_folder` does."""
    flag = "tie_word_embeddings"
    text = config.get("text_config") or {}
    if "lm_head.weight" in kept and (config.get(flag) or text.get(flag)):
        config = with_keys(config, {flag: False}) | {flag: False}
    written = {} if config == checkpoint.raw_config else {"config.json": config}
    with new_folder(out) as staging:
        for file, metadata in checkpoint.metadata.items():
            shard = {name: piece for name, piece in kept.items() if piece.file == file}
            write_safetensors(staging / file, shard, metadata)
        if checkpoint.sharded:
            index = read_json(checkpoint.path / INDEX)
            parameters = sum(math.prod(piece.shape) for piece in kept.values())
            sizes = {"total_size": sum(map(Piece.nbytes, kept.values())), "total_parameters": parameters}
            index["metadata"] = (index.get("metadata") or {}) | sizes
            index["weight_map"] = {name: piece.file for name, piece in sorted(kept.items())}
            written[INDEX] = index
        for name, value in written.items():
            (staging / name).write_text(json.dumps(value, indent=2) + "\n")
        for name, content in files.items():
            (staging / name).write_bytes(content)
        copy_small_files(checkpoint.path, staging)
        if "per_layer_config" not in (config.get("text_config") or config):
            (staging / f"{MODELING}.py").unlink(missing_ok=True)


def copy_small_files(source: Path, out: Path) -> None:
    """Copy tokenizer, generation config, licence, ...: all but weights, hidden files and what `out` has. NOTICE goes to
    the head of the model card (README.md), after its front matter."""
    weights = {".safetensors", ".st", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        hidden = any(folder.startswith(".") for folder in name.parts)
        weight = file.suffix in weights or file.name.endswith((".bin.index.json", INDEX))
        if not file.is_file() or hidden or weight or (out / name).exists():
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out / name)
        if str(name) == "README.md":
            front, card = re.fullmatch(rb"(---\n.*?\n---\n|)(.*)", file.read_bytes(), re.DOTALL).groups()
            if not card.startswith(NOTICE.encode()):
                (out / name).write_bytes(front + NOTICE.encode() + card)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Context manager: the name of a hidden file beside `path` that becomes it on success and vanishes on failure, so
    that `path` is whole or as it was however the process ends."""
    beside = path.with_name(f".{path.name}.{os.urandom(8).hex()}")
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all."""
    with new_file(path) as beside:
        beside.write_bytes(data)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Context manager: a new folder, made as `new_file` makes a file. Raises InputError as `check_new` does."""
    check_new(out)
    out = Path(os.path.abspath(out))
    above = [folder for folder in out.parents if not folder.exists()]
    staging = out.with_name(f".{out.name}.{os.urandom(8).hex()}")
    try:
        staging.mkdir(parents=True)
        yield staging
        check_new(out)  # another run may have been first
        staging.replace(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in above:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def check_new(path: Path) -> None:
    """Raise InputError if `path` cannot become a new folder: it exists and is not an empty one, or cannot be made."""
    try:
        if not str(path).isprintable() or len(os.fsencode(path.name)) > 220:
            raise InputError(f"{path}: a name that is too long or not printable; name another")
        if path.is_symlink() or path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise InputError(f"{path}: exists and is not an empty folder; remove it or name another")
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise InputError(f"{path}: cannot be made; {above} is not a folder that can be written to")
    except OSError as err:
        raise InputError(f"{path}: cannot be made ({err.strerror})") from None


# ------------------------------------------------------------------------------------------------------- the record

def text_hash(ids: torch.Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(ids.cpu().long().numpy().tobytes()).hexdigest()


def record_entry(command: str, settings: dict, ids: torch.Tensor | None, files: Sequence[Path],
                 **read: Model) -> dict:
    """An entry of a record's history: a command, its settings, its text ids (B, L), if it read any, of these files
    (none: Python's documentation), and the checkpoints that it read, by their role."""
    settings = dict(settings)
    if ids is not None:
        settings |= {"tokens": ids.numel(), "seq_len": ids.shape[1], "text_sha256": text_hash(ids),
                     "text": [Path(file).name for file in files] or "python documentation"}
        if len(files) > 1:
            settings["tokens_of_each"] = [share * ids.shape[1] for share in shares_of(len(ids), len(files))]
    entry = {"version": __version__, "command": command, "settings": settings}
    for role, model in read.items():
        name = beside(model.checkpoint.path, "").name
        entry[role] = {"name": name, "model_type": model.config.model_type,
                       "num_experts": model.config.num_experts, "top_k": model.config.top_k,
                       "fingerprint": model.checkpoint.fingerprint()}
    return entry


def read_history(path: Path) -> list[dict]:
    """The history in a record, oldest entry first. Raises InputError if the file is no such record."""
    record = read_json(path)
    history = record.get("history")
    require(record.get("schema_version") in READABLE_SCHEMAS and isinstance(history, list),
            f"{path}: not a record of schema_version {SCHEMA_VERSION} with a history")
    return history


def record_bytes(checkpoint: Checkpoint, entry: dict) -> bytes:
    """The content of hodgecover.json: the checkpoint's record, if it has one, with one more entry in its history. A
    list of numbers takes one line. Raises InputError if the checkpoint's file of that name is no record."""
    path = checkpoint.path / RECORD
    history = []
    if path.exists():
        history = read_history(path)
    record = {"schema_version": SCHEMA_VERSION, "history": [*history, entry]}
    text = json.dumps(record, indent=1, allow_nan=False, default=torch.Tensor.tolist)
    return (re.sub(r'\[\n[^{}"]*\]', lambda numbers: json.dumps(json.loads(numbers[0])), text) + "\n").encode()


def refuse_inside(model: Model, path: Path, parameter: str) -> None:
    """Raise InputError for a path in the checkpoint's folder."""
    require(model.checkpoint.path.resolve() not in (path.resolve(), *path.resolve().parents),
            f"{parameter} {path}: lies in the checkpoint, which is never written to; name another")


def check_out(model: Model, out: Path, cache: Path | None = None, plan: bool = False) -> None:
    """Raise InputError if an output folder, or a plan's file, lies in the checkpoint or around the cache, or cannot be
    made, and if the checkpoint has a record that cannot be continued."""
    record_bytes(model.checkpoint, {})
    refuse_inside(model, out, "out")
    if cache:
        require(out.resolve() not in (cache.resolve(), *cache.resolve().parents),
                f"out {out}: would hold the cache {cache}; name another")
    check_new(out)
    if plan:
        require(not out.is_dir() and out.absolute().parent.is_dir(),
                f"out {out}: a plan is a file in a folder that is there; name another")


def choose_dtype(name: str, device: str) -> torch.dtype:
    """The dtype of that name; `auto` is bfloat16 if the device has instructions for its products, and float32
    otherwise. Raises InputError for a device that torch cannot use."""
    try:
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, ValueError) as err:
        raise InputError(f"device {device}: this torch cannot use it ({str(err).splitlines()[0]}); use cpu") from None
    if name != "auto":
        return getattr(torch, name)
    native = device.startswith("cuda")
    if device.startswith("cpu"):
        able = torch.cpu.get_capabilities()
        native = able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16")
    return torch.bfloat16 if native else torch.float32


# --------------------------------------------------------------------------------------------- tensors in a cache

def make_cache(folder: Path) -> None:
    """Make the folder of a cache. Raises InputError if it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"cache {folder}: cannot be made ({err.strerror}); name another folder") from None
    if (folder / "config.json").exists() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cache {folder}: is a checkpoint, or cannot be written to; name another folder")


def warn_of_old_cache(folder: Path, form: str) -> None:
    """Warn of a cache that has entries of another format: an older version's, which are never used."""
    for file in folder.glob("*.safetensors"):
        with contextlib.suppress(OSError, SafetensorError), safe_open(file, framework="pt") as opened:
            if (opened.metadata() or {}).get("format", form) != form:
                warn(f"cache {folder}: has barriers of an older version, which are not used; remove it")
                return


def cache_file(folder: Path, name: str, key: dict[str, str]) -> Path:
    """Return the file of an entry: another key has another file, so that a quick run never overwrites a long one's."""
    content = json.dumps(key, sort_keys=True).encode()
    return folder / f"{name}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"


def read_cached(folder: Path, name: str, key: dict[str, str]) -> dict[str, torch.Tensor] | None:
    """Return the tensors of a cache entry; None if it is missing, damaged or of another key."""
    try:
        with safe_open(cache_file(folder, name, key), framework="pt") as opened:
            tensors = {field: opened.get_tensor(field).clone() for field in opened.keys()}
            metadata = key | {"tensors": " ".join(sorted(tensors))}
            return tensors if opened.metadata() == metadata else None
    except (OSError, SafetensorError):
        return None


def write_cached(folder: Path, name: str, key: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    """Write a cache entry, whole or not at all."""
    with new_file(cache_file(folder, name, key)) as beside:
        save_file({field: tensor.cpu().contiguous() for field, tensor in tensors.items()}, beside,
                  key | {"tensors": " ".join(sorted(tensors))})
        beside.chmod(folder.stat().st_mode & 0o666)  # it is private
