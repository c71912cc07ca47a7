# SPDX-License-Identifier: MIT
"""Sparse Mixture-of-Experts checkpoints: read, run and rewrite them one layer at a time.

A checkpoint is a folder with `config.json`, safetensors weights (one file, or shards with an index) and
`tokenizer.json`. `Model` runs it without ever holding more than one decoder layer, the embedding or the head,
and the activations; `write_checkpoint` copies the weights of the surviving experts byte for byte.

Shapes: B sequences of L tokens, T = B L; hidden size d, n experts of width f, vocabulary V.
"""
from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

__version__ = "0.1.0"

WEIGHTS, INDEX, PLAN = "model.safetensors", "model.safetensors.index.json", "hodgecover.json"
PASS_TOKENS = 4096  # that go through a layer at a time
FOLD = "hodgecover-fold.st"  # not *.safetensors: loaders that read every such file must not find it


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, and what would be right."""


# ---------------------------------------------------------------------------------------------- configuration


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
    num_experts: int
    expert_width: int
    shared_width: int | None  # of the shared expert
    dense_width: int | None  # of a layer without experts
    top_k: int
    norm_topk_prob: bool
    tie_word_embeddings: bool
    eos_token_id: int | None
    clip_qkv: float | None = None  # OLMoE
    linear_key_heads: int = 0  # Qwen3.5, Gated DeltaNet
    linear_key_head_dim: int = 0
    linear_value_heads: int = 0
    linear_value_head_dim: int = 0
    linear_conv_width: int = 0


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises InputError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise InputError(f"{path}: cannot be read ({err.strerror})") from None
    except (ValueError, RecursionError) as err:
        raise InputError(f"{path}: cannot be read as JSON ({err})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def value_of(text: dict, key: str, kind: type, default: float | None = None):
    """text[key] (default where it is absent or null), checked to be a `kind`; numbers also to be positive."""
    value = text.get(key) if text.get(key) is not None else default
    if value is None:
        raise InputError(f"config.json: the key {key!r} is missing")
    if kind is bool and isinstance(value, bool):
        return value
    if kind is not bool and isinstance(value, (int, kind)) and not isinstance(value, bool) and 0 < value < 2**31:
        return value
    what = {bool: "true or false", int: "a positive whole number", float: "a positive number"}[kind]
    raise InputError(f"config.json: {key} is {value!r}; it must be {what}")


def read_config(raw: dict) -> Config:
    """Config from the object in `config.json` (the key names of transformers 4 and 5; a nested `text_config`).

    Raises InputError for an unsupported model type or option, and for a key that is missing or of a wrong kind.
    """
    family = FAMILIES.get(str(raw.get("model_type")))
    if not family:
        raise InputError(f"config.json: model_type {raw.get('model_type')!r} is not supported; "
                         f"supported: {', '.join(FAMILIES)}")
    text = raw.get("text_config") or raw
    rope = isinstance(text, dict) and (text.get("rope_parameters") or text.get("rope_scaling") or {})
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise InputError("config.json: text_config and rope_parameters must be JSON objects, the latter a flat one")
    refuse_unsupported(raw, text, rope)
    eos = text.get("eos_token_id", raw.get("eos_token_id"))
    eos = (eos or [None])[0] if isinstance(eos, list) else eos
    vocab_size, hidden_size = value_of(text, "vocab_size", int), value_of(text, "hidden_size", int)
    if eos is not None and eos not in range(vocab_size):
        raise InputError(f"config.json: eos_token_id is {eos!r}; it must be a token id below {vocab_size}")
    num_heads = value_of(text, "num_attention_heads", int)
    head_dim = value_of(text, "head_dim", int, hidden_size // num_heads)
    rotary_dim = head_dim
    if family.partial_rotary_factor:  # other families rotate the whole head, whatever the configuration says
        rotary_dim = int(head_dim * value_of(text | rope, "partial_rotary_factor", float, family.partial_rotary_factor))
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise InputError(f"config.json: {rotary_dim} of the {head_dim} dimensions of a head rotate; it must be an even "
                         "number of them")

    def width(key: str) -> int | None:
        return None if text.get(key) is None else value_of(text, key, int)
    config = Config(
        model_type=raw["model_type"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=value_of(text, "num_hidden_layers", int),
        num_heads=num_heads,
        num_kv_heads=value_of(text, "num_key_value_heads", int, num_heads),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=value_of(text | rope, "rope_theta", float, 10000.0),
        rms_norm_eps=value_of(text, "rms_norm_eps", float, family.rms_norm_eps),
        num_experts=value_of(text, expert_count_keys(text)[0], int),
        expert_width=value_of(text, "intermediate_size" if raw["model_type"] == "olmoe" else "moe_intermediate_size",
                              int),
        shared_width=width("shared_expert_intermediate_size"),
        dense_width=width("intermediate_size"),
        top_k=value_of(text, "num_experts_per_tok", int),
        norm_topk_prob=family.always_renormalised or value_of(text, "norm_topk_prob", bool, False),
        tie_word_embeddings=value_of(raw, "tie_word_embeddings", bool, False),
        eos_token_id=eos,
        clip_qkv=None if text.get("clip_qkv") is None else value_of(text, "clip_qkv", float),
        linear_key_heads=value_of(text, "linear_num_key_heads", int, 16),
        linear_key_head_dim=value_of(text, "linear_key_head_dim", int, 128),
        linear_value_heads=value_of(text, "linear_num_value_heads", int, 32),
        linear_value_head_dim=value_of(text, "linear_value_head_dim", int, 128),
        linear_conv_width=value_of(text, "linear_conv_kernel_dim", int, 4),
    )
    if config.top_k > config.num_experts:
        raise InputError(f"config.json: num_experts_per_tok {config.top_k} is above {config.num_experts} experts")
    for key, whole, part in (("num_key_value_heads", config.num_heads, config.num_kv_heads),
                             ("linear_num_key_heads", config.linear_value_heads, config.linear_key_heads)):
        if whole % part:
            raise InputError(f"config.json: {key} is {part}; it must divide {whole}")
    return config


def expert_count_keys(text: dict) -> list[str]:
    """The keys that hold the number of experts: `num_experts`, or what transformers 5 writes for Qwen3-MoE, or both."""
    keys = [key for key in ("num_experts", "num_local_experts") if key in text] or ["num_experts"]
    if text.get(keys[0]) != text.get(keys[-1]):
        raise InputError("config.json: num_experts and num_local_experts differ")
    return keys


def refuse_unsupported(raw: dict, text: dict, rope: dict) -> None:
    """Raises InputError for what would otherwise give a wrong number: quantised weights, another rope type,
    a sliding window in use, another activation."""
    quantised = raw.get("quantization_config") or text.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise InputError(f"config.json: quantised weights ({method}) are not supported; use the checkpoint in "
                         "bfloat16, float16 or float32")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise InputError(f"config.json: rope type {rope_type!r} is not supported; only 'default' is")
    window = text.get("use_sliding_window") and text.get("sliding_window", "by default") is not None
    if window or "sliding_attention" in str(text.get("layer_types")):
        raise InputError("config.json: a sliding window is in use; only full attention is supported")
    if text.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"config.json: hidden_act {text['hidden_act']!r} is not supported; only 'silu' is")


# ------------------------------------------------------------------------------------------------ safetensors


DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class TensorInfo(NamedTuple):
    """Where a tensor lies: shard file name, dtype name, shape, and its byte range in the file."""

    file: str
    dtype: str
    shape: list[int]
    start: int
    end: int


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors of one safetensors file in file order, and its metadata. Raises InputError if it is malformed."""
    try:
        with safe_open(path, framework="pt") as f:  # checks the header against the file
            metadata = f.metadata() or {}
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
    except (OSError, ValueError, RecursionError, SafetensorError) as err:
        raise InputError(f"{path}: not a readable safetensors file ({err})") from None
    header.pop("__metadata__", None)
    base = 8 + length
    infos = {name: TensorInfo(path.name, h["dtype"], h["shape"], *(base + o for o in h["data_offsets"]))
             for name, h in header.items()}
    return dict(sorted(infos.items(), key=lambda item: item[1].start)), metadata


class Checkpoint:
    """The tensors of a checkpoint folder by name, read lazily.

    Attributes: `path`, `raw_config` (config.json as it stands), `tensors` (name -> TensorInfo, in file order),
    `metadata` (shard file -> its metadata), `sharded` (whether an index lists the shards).
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"{self.path}: not a folder; expected one with config.json and safetensors weights")
        self.raw_config = read_json(self.path / "config.json")
        self.sharded = not (self.path / WEIGHTS).is_file()
        self.tensors, self.metadata = {}, {}
        for file in self._shards() if self.sharded else [WEIGHTS]:
            infos, self.metadata[file] = read_header(self.path / file)
            for name in infos.keys() & self.tensors.keys():
                raise InputError(f"{self.path}: {name} is in {self.tensors[name].file} and in {file}")
            self.tensors |= infos

    def _shards(self) -> list[str]:
        if not (self.path / INDEX).is_file():
            raise InputError(f"{self.path}: no weights; expected {WEIGHTS} or {INDEX}")
        index = read_json(self.path / INDEX)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not isinstance(index.get("metadata") or {}, dict):
            raise InputError(f"{self.path / INDEX}: no weight_map, or metadata that is no object")
        files = sorted({str(file) for file in weight_map.values()})
        for file in files:
            if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
                raise InputError(f"{self.path / INDEX}: {file!r} is not the name of a safetensors file in the folder")
        return files

    def load(self, name: str, row: int | None = None) -> torch.Tensor:
        """The named tensor as it is stored, or one row of its first dimension, read from its file.

        Read rather than mapped, so that no page of a file stays in this process's memory. Raises InputError for a
        tensor that is missing, of no floating-point type, or cut off.
        """
        if name not in self.tensors:
            raise InputError(f"{self.path}: the weights have no tensor {name!r}")
        file, stored, shape, start, end = self.tensors[name]
        if stored not in DTYPES:
            raise InputError(f"{self.path / file}: {name} is stored as {stored}; supported: {', '.join(DTYPES)}")
        if row is not None:
            if not shape or row not in range(shape[0]):
                raise InputError(f"{self.path / file}: {name} of shape {shape} has no row {row}")
            shape, size = shape[1:], (end - start) // shape[0]
            start, end = start + size * row, start + size * (row + 1)
        tensor = torch.empty(shape, dtype=DTYPES[stored])
        with open(self.path / file, "rb") as f:
            f.seek(start)
            if f.readinto(tensor.flatten().view(torch.uint8).numpy()) != end - start:
                raise InputError(f"{self.path / file}: ends within {name}")
        return tensor

    def overwrite(self, name: str, tensor: torch.Tensor, row: int | None = None) -> None:
        """Puts other values into a stored tensor, or one row of its first dimension, in its file."""
        file, stored, shape, start, end = self.tensors[name]
        if row is not None:
            start += (end - start) // shape[0] * row
        with open(self.path / file, "r+b") as f:
            f.seek(start)
            f.write(tensor.to("cpu", DTYPES[stored]).contiguous().flatten().view(torch.uint8).numpy().tobytes())

    def fingerprint(self, blocks: int = 64, block_size: int = 1 << 16) -> str:
        """SHA-256 over config.json and, per shard, its size, header and `blocks` evenly spaced blocks.

        Two checkpoints that differ only between the sampled blocks have the same fingerprint.
        """
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in self.metadata:
            with open(self.path / file, "rb") as f:
                size = f.seek(0, os.SEEK_END)
                f.seek(0)
                length = int.from_bytes(f.read(8), "little")
                digest.update(f"{file} {size} ".encode() + f.read(length))
                for i in range(blocks):
                    f.seek(8 + length + max(0, size - 8 - length - block_size) * i // (blocks - 1))
                    digest.update(f.read(block_size))
        return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ forward pass


class Experts(NamedTuple):
    """Weights of a layer's experts: gate (n, f, d), up (n, f, d), down (n, d, f). They may be narrower than what they
    multiply, and are widened one by one where they do."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def hidden(self, e: int, x: torch.Tensor) -> torch.Tensor:
        """What expert e's down projection reads on x (T, d): silu(gate_e x) * up_e x, (T, f)."""
        return F.silu(x @ self.gate[e].to(x).T) * (x @ self.up[e].to(x).T)

    def __call__(self, e: int, x: torch.Tensor) -> torch.Tensor:
        """Output of expert e on x (T, d): down_e (silu(gate_e x) * up_e x), (T, d)."""
        return self.hidden(e, x) @ self.down[e].to(x).T


@dataclass(eq=False)
class Layer:
    """One decoder layer: its experts and its router (n, d), both None where the layer is dense, and all other
    weights by their name in the layer.

    `fold` is None, or for `--router fold` the dropped experts' router rows (n - K, d) and the slot among the
    survivors (n - K,) that each one's gate mass goes to.
    """

    experts: Experts | None
    router: torch.Tensor | None
    weights: dict[str, torch.Tensor]
    fold: tuple[torch.Tensor, torch.Tensor] | None = None


def widened(dtype: torch.dtype) -> torch.dtype:
    """float32, or dtype itself where that is wider: what norms, softmaxes and recurrences are computed in."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension, in x's dtype; the mean square is taken in float32 or better."""
    h = x.to(widened(x.dtype))
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (weight * h.to(torch.promote_types(x.dtype, weight.dtype))).to(x.dtype)


def rope(x: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Rotary position embedding of x (B, heads, L, head_dim) at positions 0..L-1, on the first `rotary_dim`
    dimensions in rotate-half layout. (Multimodal sections have equal positions on text, and reduce to this.)"""
    length, half = x.shape[-2], cfg.rotary_dim // 2
    frequency = cfg.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def linear(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """x times the layer's weight `name`, plus its bias if it has one."""
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Causal attention with rotary positions: q (B, L, H, h), k and v (B, L, H_kv, h) -> (B, L, H h)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(rope(q, cfg), rope(k, cfg), v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def heads(x: torch.Tensor, w: dict[str, torch.Tensor], name: str, width: int) -> torch.Tensor:
    """Projection `name` (q, k or v) of x (B, L, d), split into heads (B, L, heads, width)."""
    return linear(x, w, f"self_attn.{name}_proj").unflatten(-1, (-1, width))


def olmoe_attention(x: torch.Tensor, w: dict[str, torch.Tensor], cfg: Config) -> torch.Tensor:
    """OLMoE: q/k norms over the full width, then an optional clip. x (B, L, d), normed -> (B, L, d)."""
    q = rms_norm(linear(x, w, "self_attn.q_proj"), w["self_attn.q_norm.weight"], cfg.rms_norm_eps)
    k = rms_norm(linear(x, w, "self_attn.k_proj"), w["self_attn.k_norm.weight"], cfg.rms_norm_eps)
    v = linear(x, w, "self_attn.v_proj")
    if cfg.clip_qkv is not None:
        q, k, v = (t.clamp(-cfg.clip_qkv, cfg.clip_qkv) for t in (q, k, v))
    q, k, v = (t.unflatten(-1, (-1, cfg.head_dim)) for t in (q, k, v))
    return linear(attend(q, k, v, cfg), w, "self_attn.o_proj")


def qwen2_attention(x: torch.Tensor, w: dict[str, torch.Tensor], cfg: Config) -> torch.Tensor:
    """Qwen2-MoE: biases on q, k, v. x (B, L, d), normed -> (B, L, d)."""
    q, k, v = (heads(x, w, name, cfg.head_dim) for name in "qkv")
    return linear(attend(q, k, v, cfg), w, "self_attn.o_proj")


def qwen3_attention(x: torch.Tensor, w: dict[str, torch.Tensor], cfg: Config) -> torch.Tensor:
    """Qwen3-MoE: q/k norms per head. x (B, L, d), normed -> (B, L, d)."""
    q = rms_norm(heads(x, w, "q", cfg.head_dim), w["self_attn.q_norm.weight"], cfg.rms_norm_eps)
    k = rms_norm(heads(x, w, "k", cfg.head_dim), w["self_attn.k_norm.weight"], cfg.rms_norm_eps)
    return linear(attend(q, k, heads(x, w, "v", cfg.head_dim), cfg), w, "self_attn.o_proj")


def qwen3_5_attention(x: torch.Tensor, w: dict[str, torch.Tensor], cfg: Config) -> torch.Tensor:
    """Qwen3.5-MoE: Gated DeltaNet in most layers, gated full attention in the others.

    In the latter each head's query comes with a gate of its size, whose sigmoid multiplies the head's output.
    """
    if "linear_attn.A_log" in w:
        return gated_delta_net(x, w, cfg)
    q, gate = heads(x, w, "q", 2 * cfg.head_dim).chunk(2, dim=-1)
    q = rms_norm(q, w["self_attn.q_norm.weight"], cfg.rms_norm_eps)
    k = rms_norm(heads(x, w, "k", cfg.head_dim), w["self_attn.k_norm.weight"], cfg.rms_norm_eps)
    return linear(attend(q, k, heads(x, w, "v", cfg.head_dim), cfg) * gate.flatten(2).sigmoid(), w, "self_attn.o_proj")


def gated_delta_net(x: torch.Tensor, w: dict[str, torch.Tensor], cfg: Config) -> torch.Tensor:
    """Gated DeltaNet (arXiv 2412.06464) with a short causal convolution over q, k and v. x (B, L, d) -> (B, L, d)."""
    kernel = w["linear_attn.conv1d.weight"]  # (channels, 1, width)
    mixed = F.pad(linear(x, w, "linear_attn.in_proj_qkv").transpose(1, 2), (kernel.shape[-1] - 1, 0))
    mixed = F.silu(F.conv1d(mixed, kernel, groups=len(kernel))).transpose(1, 2)
    key_dim = cfg.linear_key_heads * cfg.linear_key_head_dim
    value_dim = cfg.linear_value_heads * cfg.linear_value_head_dim
    q, k, v = mixed.split((key_dim, key_dim, value_dim), dim=-1)
    wide = widened(x.dtype)
    q, k = (t.unflatten(-1, (-1, cfg.linear_key_head_dim)).to(wide) for t in (q, k))
    v = v.unflatten(-1, (-1, cfg.linear_value_head_dim))
    q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    groups = cfg.linear_value_heads // cfg.linear_key_heads  # value heads that share a query and key head
    q, k = (t.repeat_interleave(groups, dim=2) for t in (q, k))
    log_decay = -w["linear_attn.A_log"].exp() * F.softplus(
        linear(x, w, "linear_attn.in_proj_a").to(wide) + w["linear_attn.dt_bias"])
    beta = linear(x, w, "linear_attn.in_proj_b").sigmoid().to(wide)
    out = chunked_gated_delta_rule(q * q.shape[-1] ** -0.5, k, v.to(wide), log_decay, beta).to(x.dtype)
    z = linear(x, w, "linear_attn.in_proj_z").unflatten(-1, (-1, cfg.linear_value_head_dim)).to(wide)
    out = (rms_norm(out, w["linear_attn.norm.weight"], cfg.rms_norm_eps) * F.silu(z)).to(x.dtype)
    return linear(out.flatten(2), w, "linear_attn.out_proj")


def gated_delta_rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor
                     ) -> torch.Tensor:
    """The recurrence S_t = a_t S_{t-1} + k_t (beta_t (v_t - (a_t S_{t-1})' k_t))', o_t = S_t' q_t, a = exp(log_decay):
    the plain form, to read and to test `chunked_gated_delta_rule` against.

    q, k (B, L, H, h_k); v (B, L, H, h_v); log_decay, beta (B, L, H) -> (B, L, H, h_v).
    """
    state = v.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1])  # (B, H, h_k, h_v)
    out = torch.empty_like(v)
    for t in range(v.shape[1]):
        state = state * log_decay[:, t, :, None, None].exp()
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None, :]
        out[:, t] = torch.einsum("bhk,bhkv->bhv", q[:, t], state)
    return out


def chunked_gated_delta_rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor,
                             beta: torch.Tensor, size: int = 64) -> torch.Tensor:
    """`gated_delta_rule`, `size` tokens at a time: the same result by matrix products, ten times as fast on a CPU.

    With d the cumulated log decay within the chunk and S the state before it, the recurrence's corrections
    e_i = beta_i (v_i - exp(d_i) S' k_i - sum_{j<i} exp(d_i - d_j) (k_i . k_j) e_j) solve a triangular system.
    """
    q, k, v, log_decay, beta = (t.transpose(1, 2) for t in (q, k, v, log_decay[..., None], beta[..., None]))
    state = v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])  # (B, H, h_k, h_v)
    out = torch.empty_like(v)  # (B, H, L, h_v)
    for start in range(0, v.shape[2], size):
        at = slice(start, start + size)
        d = log_decay[:, :, at].cumsum(2)  # (B, H, C, 1)
        between = (d - d.mT).exp().tril()  # exp(d_i - d_j) for j <= i, (B, H, C, C)
        system = beta[:, :, at] * between * (k[:, :, at] @ k[:, :, at].mT)
        wanted = beta[:, :, at] * (v[:, :, at] - d.exp() * (k[:, :, at] @ state))
        e = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
        out[:, :, at] = d.exp() * (q[:, :, at] @ state) + between * (q[:, :, at] @ k[:, :, at].mT) @ e
        last = d[:, :, -1:]
        state = last.exp() * state + (k[:, :, at] * (last - d).exp()).mT @ e
    return out.transpose(1, 2)


def gated(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What the down projection of a dense SwiGLU block `name` of the layer reads on x (T, d), (T, f)."""
    return F.silu(linear(x, w, f"{name}.gate_proj")) * linear(x, w, f"{name}.up_proj")


def mlp(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A dense SwiGLU block `name` of the layer on x (T, d)."""
    return linear(gated(x, w, name), w, f"{name}.down_proj")


def route(x: torch.Tensor, layer: Layer, cfg: Config) -> torch.Tensor:
    """Gate weights (T, n) of tokens x (T, d) exactly as the model applies them: zero off the top-k,
    renormalised iff `norm_topk_prob`. Softmax in float32 or better."""
    router = layer.router if layer.fold is None else torch.cat((layer.router, layer.fold[0]))
    p = (x @ router.T).softmax(-1, dtype=widened(x.dtype))
    if layer.fold is not None:
        kept = len(layer.router)
        p = p[:, :kept].index_add(1, layer.fold[1], p[:, kept:])
    top_p, top_i = p.topk(cfg.top_k)
    if cfg.norm_topk_prob:
        top_p = top_p / top_p.sum(-1, keepdim=True)
    return torch.zeros_like(p).scatter(1, top_i, top_p).to(x.dtype)


def mix_experts(experts: Experts, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """sum_e gates[:, e] E_e(x), (T, d), computing each expert only on the tokens routed to it."""
    out = torch.zeros_like(x)
    for e in range(gates.shape[1]):
        t = gates[:, e].nonzero().squeeze(1)
        if len(t):
            out.index_add_(0, t, gates[t, e, None] * experts(e, x[t]))
    return out


def run_layer(h: torch.Tensor, layer: Layer, cfg: Config
              ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """One pre-norm decoder layer on the residual stream h (B, L, d).

    Returns the feed-forward input x (T, d), the gates (T, n) or None for a dense layer, and the stream after the
    layer y (T, d); a shared expert's output, times its sigmoid gate, is in y.
    """
    w = layer.weights
    h = h + FAMILIES[cfg.model_type].attention(rms_norm(h, w["input_layernorm.weight"], cfg.rms_norm_eps), w, cfg)
    h = h.flatten(0, 1)
    x = rms_norm(h, w["post_attention_layernorm.weight"], cfg.rms_norm_eps)
    if layer.router is None:
        return x, None, h + mlp(x, w, "mlp")
    gates = route(x, layer, cfg)
    out = mix_experts(layer.experts, x, gates)
    if "mlp.shared_expert_gate.weight" in w:
        out = out + linear(x, w, "mlp.shared_expert_gate").sigmoid() * mlp(x, w, "mlp.shared_expert")
    return x, gates, h + out


class Family(NamedTuple):
    """What differs between model families: the token mixer (x (B, L, d), weights, cfg) -> (B, L, d), defaults of
    the configuration (partial_rotary_factor None: the whole head rotates), whether norm weights are stored less 1,
    and whether a sparse layer has a shared expert."""

    attention: Callable[[torch.Tensor, dict[str, torch.Tensor], Config], torch.Tensor]
    rms_norm_eps: float = 1e-6
    partial_rotary_factor: float | None = None
    always_renormalised: bool = False
    norms_less_1: bool = False
    shared_expert: bool = False


QWEN3_5 = Family(qwen3_5_attention, partial_rotary_factor=0.25, always_renormalised=True, norms_less_1=True,
                 shared_expert=True)
FAMILIES = {"olmoe": Family(olmoe_attention, rms_norm_eps=1e-5),
            "qwen2_moe": Family(qwen2_attention, shared_expert=True),
            "qwen3_moe": Family(qwen3_attention), "qwen3_5_moe": QWEN3_5, "qwen3_5_moe_text": QWEN3_5}


# -------------------------------------------------------------------------------------------------- the model


def layer_shapes(cfg: Config, stored: set[str]) -> dict[str, list[int | None]]:
    """Shapes of the tensors that a decoder layer must have, by name in the layer. What is stored tells a recurrent
    layer from one with full attention, a sparse from a dense one, and fused experts from single ones."""
    d, n, f, head = cfg.hidden_size, cfg.num_experts, cfg.expert_width, cfg.head_dim
    family = FAMILIES[cfg.model_type]
    shapes = {"input_layernorm": [d], "post_attention_layernorm": [d]}
    if "linear_attn.A_log" in stored:
        key, values = cfg.linear_key_heads * cfg.linear_key_head_dim, cfg.linear_value_heads
        value = values * cfg.linear_value_head_dim
        shapes |= {"linear_attn.in_proj_qkv": [2 * key + value, d], "linear_attn.in_proj_z": [value, d],
                   "linear_attn.in_proj_a": [values, d], "linear_attn.in_proj_b": [values, d],
                   "linear_attn.conv1d": [2 * key + value, 1, cfg.linear_conv_width],
                   "linear_attn.norm": [cfg.linear_value_head_dim], "linear_attn.out_proj": [d, value]}
    else:
        query, key = cfg.num_heads * head, cfg.num_kv_heads * head
        gated_query = query * (2 if family.attention is qwen3_5_attention else 1)
        shapes |= {"self_attn.q_proj": [gated_query, d], "self_attn.k_proj": [key, d], "self_attn.v_proj": [key, d],
                   "self_attn.o_proj": [d, query]}
        if family.attention is olmoe_attention:
            shapes |= {"self_attn.q_norm": [query], "self_attn.k_norm": [key]}
        elif family.attention is not qwen2_attention:
            shapes |= {"self_attn.q_norm": [head], "self_attn.k_norm": [head]}
    blocks = {}
    if "mlp.gate.weight" not in stored:
        blocks["mlp"] = cfg.dense_width
    else:
        shapes["mlp.gate"] = [n, d]
        if family.shared_expert:
            shapes["mlp.shared_expert_gate"], blocks["mlp.shared_expert"] = [1, d], cfg.shared_width
        if "mlp.experts.gate_up_proj" not in stored:
            blocks |= {f"mlp.experts.{e}": f for e in range(n)}
    for block, width in blocks.items():
        shapes |= {f"{block}.gate_proj": [width, d], f"{block}.up_proj": [width, d], f"{block}.down_proj": [d, width]}
    shapes = {f"{name}.weight": shape for name, shape in shapes.items()}
    if "linear_attn.A_log" in stored:
        shapes |= {"linear_attn.A_log": [values], "linear_attn.dt_bias": [values]}
    if "mlp.experts.gate_up_proj" in stored:
        shapes |= {"mlp.experts.gate_up_proj": [n, 2 * f, d], "mlp.experts.down_proj": [n, d, f]}
    return shapes


def check_tensors(path: Path, tensors: dict[str, TensorInfo], prefix: str, cfg: Config, layers: list[str]) -> None:
    """Raises InputError where a tensor that the model reads is missing, of no floating-point type, or of a shape that
    does not follow from config.json, and where there are more experts than it says. Reads no weight."""
    d, vocab = cfg.hidden_size, cfg.vocab_size
    expected = {f"{prefix}embed_tokens.weight": [vocab, d], f"{prefix}norm.weight": [d]}
    if not cfg.tie_word_embeddings:
        expected["lm_head.weight"] = [vocab, d]
    if any(layer.startswith("mtp.") for layer in layers):
        expected |= {"mtp.fc.weight": [d, 2 * d], "mtp.norm.weight": [d], "mtp.pre_fc_norm_embedding.weight": [d],
                     "mtp.pre_fc_norm_hidden.weight": [d]}
    stored = {layer: set() for layer in layers}
    for name in tensors:
        layer = re.match(r"(.*?layers\.\d+)\.(.*)", name)
        if layer and layer[1] in stored:
            stored[layer[1]].add(layer[2])
    for layer, names in stored.items():
        router = tensors.get(f"{layer}.mlp.gate.weight")
        if router and router.shape != [cfg.num_experts, d]:  # before a stranger's number of experts is counted up to
            raise InputError(f"{path}: {layer}.mlp.gate.weight has shape {router.shape}; by config.json it must be "
                             f"{[cfg.num_experts, d]}")
        shapes = layer_shapes(cfg, names)
        biases = {f"{name.removesuffix('weight')}bias": shape[:1] for name, shape in shapes.items()
                  if not name.startswith("mlp.")}
        shapes |= {name: shape for name, shape in biases.items() if name in names}
        expected |= {f"{layer}.{name}": shape for name, shape in shapes.items()}
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{path}: the weights have no tensor {name!r}")
        if None in shape:
            raise InputError(f"{path}: config.json does not say how wide {name} is")
        if tensors[name].shape != shape:
            raise InputError(f"{path}: {name} has shape {tensors[name].shape}; by config.json it must be {shape}")
        if tensors[name].dtype not in DTYPES:
            raise InputError(f"{path}: {name} is stored as {tensors[name].dtype}; supported: {', '.join(DTYPES)}")
    more = [f"{layer}.{name}" for layer, names in stored.items() for name in names if name.startswith("mlp.")]
    for name in sorted({*more} - expected.keys()):
        raise InputError(f"{path}: {name} is none of the tensors that config.json asks for")


def scratch(folder: Path) -> Callable[..., torch.Tensor]:
    """A `torch.empty` whose tensors are files in `folder`, mapped: they take memory as far as there is some to spare.
    The files have no name, and go with the tensors."""
    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = math.prod(shape)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            for start in range(0, size * dtype.itemsize, 1 << 24):  # a full disk is an error now, a crash later
                file.write(bytes(min(1 << 24, size * dtype.itemsize - start)))
            file.flush()
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)
    return empty


class LayerPass(NamedTuple):
    """What one layer saw and made.

    `name` is its prefix among the tensors; x (T, d) the feed-forward input; gates (T, n), None in a dense layer;
    y (T, d) the residual stream after the layer; norm the norm between that stream and the head.
    """

    index: int
    name: str
    layer: Layer
    x: torch.Tensor
    gates: torch.Tensor | None
    y: torch.Tensor
    norm: Callable[[torch.Tensor], torch.Tensor]


class Model:
    """A sparse MoE language model that streams its weights from a checkpoint folder.

    >>> model = Model("examples/tiny-olmoe")
    >>> model.logits(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 2048])

    Parameters
    ----------
    path : the checkpoint folder
    dtype : of activations and products (norms and the router's softmax stay in float32 or better)
    device : where weights and activations live while in use
    router : "drop", or "fold" for a checkpoint written with `--router fold` (gate mass of dropped experts is
        added to their redirect targets before the top-k)

    Raises InputError if the checkpoint is missing, malformed or of an unsupported type.
    """

    def __init__(self, path: str | os.PathLike, dtype: torch.dtype = torch.float32, device: str = "cpu",
                 router: str = "drop"):
        self.checkpoint = Checkpoint(path)
        self.config = read_config(self.checkpoint.raw_config)
        self.dtype, self.device = dtype, torch.device(device)
        names = self.checkpoint.tensors
        self.prefix = "model.language_model." if "model.language_model.norm.weight" in names else "model."
        self._embedding = f"{self.prefix}embed_tokens.weight"
        self._head = self._embedding if self.config.tie_word_embeddings else "lm_head.weight"
        stored = len({match[0] for match in map(re.compile(rf"{self.prefix}layers\.\d+\.").match, names) if match})
        if stored != self.config.num_layers:
            raise InputError(f"{path}: config.json says {self.config.num_layers} layers; the weights have {stored}")
        self.layer_names = [f"{self.prefix}layers.{i}" for i in range(self.config.num_layers)]
        self.layer_names += sorted({match[0] for match in map(re.compile(r"mtp\.layers\.\d+").match, names) if match})
        check_tensors(self.checkpoint.path, names, self.prefix, self.config, self.layer_names)
        if router not in ("drop", "fold"):
            raise InputError(f"router {router!r}: must be 'drop' or 'fold'")
        self.folds = self._read_folds() if router == "fold" else {}

    def _cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """In the model's dtype; where norms are stored less 1, they and the recurrence's parameters stay wide."""
        norm = re.search(r"norm(_\w+)?\.weight$", name)
        if not FAMILIES[self.config.model_type].norms_less_1 or not (norm or name.endswith(("A_log", "dt_bias"))):
            return tensor.to(self.device, self.dtype)
        tensor = tensor.to(self.device, widened(self.dtype))
        return tensor + 1 if norm and "linear_attn." not in name else tensor

    def _tensor(self, name: str) -> torch.Tensor:
        return self._cast(name, self.checkpoint.load(name))

    def _read_folds(self) -> dict[str, torch.Tensor]:
        path = self.checkpoint.path / FOLD
        try:
            with safe_open(path, framework="pt") as f:
                return {name: f.get_tensor(name).to(self.device) for name in f.keys()}
        except (OSError, SafetensorError) as err:
            raise InputError(f"{path}: cannot be read ({err}); write the checkpoint with --router fold") from None

    def layer(self, index: int) -> Layer:
        """The weights of decoder layer `index` (those of the multi-token head come last), read from disk now."""
        layer = self.layer_names[index]
        names = [name for name in self.checkpoint.tensors if name.startswith(f"{layer}.")]
        experts = self._experts(layer) if f"{layer}.mlp.gate.weight" in names else None
        weights = {name.removeprefix(f"{layer}."): self._tensor(name) for name in names
                   if not name.startswith(f"{layer}.mlp.experts.")}
        fold = None
        if self.folds and experts:
            fold = self.folds[f"{layer}.dropped_rows"].to(self.dtype), self.folds[f"{layer}.slots"]
        return Layer(experts, weights.pop("mlp.gate.weight", None), weights, fold)

    def _experts(self, layer: str) -> Experts:
        """The experts of a layer, stored fused or one by one; bfloat16 ones stay so, which halves the memory of a
        float32 run."""
        prefix, n = f"{layer}.mlp.experts.", self.config.num_experts
        d, f = self.config.hidden_size, self.config.expert_width
        load, tensors = self.checkpoint.load, self.checkpoint.tensors
        stored = {info.dtype for name, info in tensors.items() if name.startswith(prefix)}
        dtype = torch.bfloat16 if stored == {"BF16"} else self.dtype
        experts = Experts(*(torch.empty(n, *shape, dtype=dtype, device=self.device)
                            for shape in ((f, d), (f, d), (d, f))))
        for e, slots in enumerate(zip(*experts)):
            if f"{prefix}gate_up_proj" in tensors:
                parts = *load(f"{prefix}gate_up_proj", e).chunk(2), load(f"{prefix}down_proj", e)
            else:
                parts = (load(f"{prefix}{e}.{part}_proj.weight") for part in Experts._fields)
            for slot, part in zip(slots, parts):
                slot.copy_(part)
        return experts

    def store_down(self, layer: str, down: torch.Tensor) -> torch.Tensor:
        """Writes the down projections (n, d, f) of a layer, by its name, over those in the checkpoint's files; returns
        them as stored. Raises InputError where they overflow that type."""
        tensors, fused = self.checkpoint.tensors, f"{layer}.mlp.experts.down_proj"
        names = [fused if fused in tensors else f"{layer}.mlp.experts.{e}.down_proj.weight" for e in range(len(down))]
        stored = down.to(DTYPES[tensors[names[0]].dtype])
        if not stored.isfinite().all():
            raise InputError(f"{names[0]}: its new weights overflow {stored.dtype}")
        for e, (name, weight) in enumerate(zip(names, stored)):
            self.checkpoint.overwrite(name, weight, e if name == fused else None)
        return stored

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings of ids (B, L): the residual stream before the first layer, (B, L, d)."""
        rows, at = ids.cpu().unique(return_inverse=True)
        table = torch.stack([self.checkpoint.load(self._embedding, row) for row in rows.tolist()])
        return table[at].to(self.device, self.dtype)

    def norm(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The norm with the weight `name`, as a function of the residual stream. Raises InputError where the weight
        is not finite."""
        weight = self._tensor(name)
        if not weight.isfinite().all():
            raise InputError(f"{self.checkpoint.path}: {name} has NaN or infinity in it")
        return partial(rms_norm, weight=weight, eps=self.config.rms_norm_eps)

    def unembedding(self) -> torch.Tensor:
        """The head W_U, (V, d). Raises InputError where it is not finite."""
        head = self._tensor(self._head)
        if not all(rows.isfinite().all() for rows in head.split(PASS_TOKENS)):
            raise InputError(f"{self.checkpoint.path}: {self._head} has NaN or infinity in it")
        return head

    def stream(self, ids: torch.Tensor, empty: Callable[..., torch.Tensor] = torch.empty) -> Iterator[LayerPass]:
        """Runs ids (B, L) through the decoder layers, then through those of a multi-token prediction head where
        there is one, yielding each one's LayerPass; one layer in memory. A change of y in place goes on into the next
        layer. `empty` makes the tensors x and y (`scratch`)."""
        h, norm = self.embed(ids), self.norm(f"{self.prefix}norm.weight")
        for index, name in enumerate(self.layer_names):
            if name.startswith("mtp."):
                h, norm = self._mtp_input(h, norm, ids), self.norm("mtp.norm.weight")
                ids = ids[:, 1:]
            steps = [self._run(index, h, norm, empty)]
            h = steps[0].y.view_as(h)
            yield steps.pop()  # its caller alone holds the layer, and drops it before asking for the next

    def _run(self, index: int, h: torch.Tensor, norm: Callable, empty: Callable[..., torch.Tensor]) -> LayerPass:
        """The pass of h (B, L, d) through layer `index`, some thousands of tokens at a time."""
        name, layer, gates, stop = self.layer_names[index], self.layer(index), [], 0
        x, y = (empty(h[:, :, 0].numel(), h.shape[2], dtype=h.dtype, device=h.device) for _ in range(2))
        for part in h.split(max(1, PASS_TOKENS // h.shape[1])):
            start, stop = stop, stop + part[:, :, 0].numel()
            x[start:stop], chosen, y[start:stop] = run_layer(part, layer, self.config)
            gates.append(chosen)
            if not y[start:stop].isfinite().all():
                raise InputError(f"{self.checkpoint.path}: {name} gives values that are not finite: NaN or infinity "
                                 f"in its weights, or an overflow of {self.dtype}")
        return LayerPass(index, name, layer, x, None if layer.router is None else torch.cat(gates), y, norm)

    def _mtp_input(self, h: torch.Tensor, norm: Callable, ids: torch.Tensor) -> torch.Tensor:
        """What a layer of the multi-token prediction head reads at position t, (B, L - 1, d): the embedding of
        token t + 1 beside the last hidden state at t, each normed, projected to the width of the stream."""
        pair = (self.norm("mtp.pre_fc_norm_embedding.weight")(self.embed(ids[:, 1:])),
                self.norm("mtp.pre_fc_norm_hidden.weight")(norm(h[:, :-1])))
        return torch.cat(pair, dim=-1) @ self._tensor("mtp.fc.weight").T

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The normed residual stream that the head reads, (B, L, d), for ids (B, L) int64."""
        for step in islice(self.stream(ids), self.config.num_layers):
            y, norm = step.y, step.norm
            del step  # before the next layer is read
        return norm(y).view(*ids.shape, -1)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Next-token logits (B, L, V) for ids (B, L) int64: float32, or float64 when that is the model's dtype."""
        logits = self.hidden(ids) @ self.unembedding().T
        return logits.to(widened(logits.dtype))

    def perplexity(self, ids_or_text: torch.Tensor | str, seq_len: int = 512) -> float:
        """exp of the mean next-token loss in nats over ids (B, L), or over a text cut into sequences."""
        if isinstance(ids_or_text, str):
            ids_or_text = sequences(self.encode([ids_or_text]), seq_len)
        head, total = self.unembedding(), 0.0
        for h, ids in zip(self.hidden(ids_or_text), ids_or_text.to(self.device)):
            logits = (h[:-1] @ head.T).to(widened(h.dtype))
            total += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        return math.exp(total / ids_or_text[:, 1:].numel())

    def encode(self, documents: Iterable[str]) -> torch.Tensor:
        """Token ids (T,) of the documents, one after the other, each ended by the end-of-text token if any.

        Raises InputError where the tokenizer is missing, unreadable or has ids beyond the vocabulary.
        """
        path = self.checkpoint.path / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            encodings = tokenizer.encode_batch(list(documents), add_special_tokens=False)
        except (KeyboardInterrupt, MemoryError):
            raise
        except BaseException as err:  # the library raises plain Exception, and panics that are none
            raise InputError(f"{path}: not a tokenizer that works ({err})") from None
        end = [] if self.config.eos_token_id is None else [self.config.eos_token_id]
        ids = [i for encoding in encodings for i in encoding.ids + end]
        if ids and max(ids) >= self.config.vocab_size:
            raise InputError(f"{path}: token id {max(ids)} is beyond the vocabulary of {self.config.vocab_size}")
        return torch.tensor(ids, dtype=torch.int64)


# -------------------------------------------------------------------------------------------------------- text


def read_documents(paths: Iterable[str | os.PathLike]) -> list[str]:
    """One document a UTF-8 text file, or one a line (its `text` field) of a `.jsonl` or `.json` file."""
    documents = []
    for path in map(Path, paths):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except OSError as err:
            raise InputError(f"{path}: cannot be read ({err.strerror})") from None
        except ValueError:
            raise InputError(f"{path}: not UTF-8 text") from None
        if not text.strip():
            raise InputError(f"{path}: no text in it")
        if path.suffix.lower() in (".jsonl", ".json"):
            lines = enumerate(text.split("\n"), 1)
            documents += [json_text(line, f"{path}, line {number}") for number, line in lines if line.strip()]
        else:
            documents.append(text)
    return documents


def json_text(line: str, where: str) -> str:
    """The `text` field of a JSON object."""
    try:
        text = json.loads(line)["text"]
        text.encode()  # a lone surrogate is no text
        return text
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f'{where}: expected a JSON object with a "text" field that is a string') from None


@cache
def python_documentation(part: str) -> tuple[str, ...]:
    """English that every Python carries: the language reference in pydoc and the standard library's docstrings.

    A document is one reference topic or one module. A hash of its name puts it into a `part` ("train" 80%,
    "calibration" 10%, "held-out" 10%) and in its place there, so that neither moves when others come and go.
    """
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "_vendor", "__pycache__"}
    sources: dict[str, str | Path] = {f"topic {name}": text for name, text in topics.items()}
    for path in library.rglob("*.py"):
        name = path.relative_to(library)
        if not skip & set(name.parts):
            sources[f"module {name.as_posix()}"] = path
    chosen = {}
    for name, source in sources.items():
        place = hashlib.sha256(name.encode()).hexdigest()
        if part == ("calibration", "held-out", *["train"] * 8)[int(place, 16) % 10]:
            chosen[place] = docstrings(source) if isinstance(source, Path) else source
    return tuple(chosen[place] for place in sorted(chosen) if chosen[place])


def docstrings(path: Path) -> str:
    """All docstrings of a Python source file; empty where it does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return "\n\n".join(filter(None, (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))))


def sequences(ids: torch.Tensor, seq_len: int, count: int | None = None, seed: int = 0) -> torch.Tensor:
    """Cuts ids (T,) into sequences (B, seq_len): all of them in order, or `count` sampled without replacement.

    The incomplete last one is left out. Raises InputError where there is not one.
    """
    if seq_len < 2:
        raise InputError(f"--seq-len {seq_len}: must be at least 2")
    if len(ids) < seq_len:
        raise InputError(f"the text has {len(ids)} tokens, too few for one sequence of --seq-len {seq_len}; give more")
    whole = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    if count is None:
        return whole
    pick = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[: min(count, len(whole))]
    return whole[pick.sort().values]


# ----------------------------------------------------------------------------------------------------- writing


class Copy(NamedTuple):
    """A tensor of the output: its name in the source, its source, and the rows of the first dimension to keep (None:
    all)."""

    name: str
    source: TensorInfo
    rows: list[int] | None = None

    def shape(self) -> list[int]:
        return self.source.shape if self.rows is None else [len(self.rows), *self.source.shape[1:]]

    def ranges(self) -> list[tuple[int, int]]:
        """Byte ranges of the source file, in output order."""
        start, end = self.source.start, self.source.end
        if self.rows is None:
            return [(start, end)]
        step = (end - start) // self.source.shape[0]
        return [(start + step * row, start + step * (row + 1)) for row in self.rows]

    def nbytes(self) -> int:
        return sum(end - start for start, end in self.ranges())


def surviving_tensors(checkpoint: Checkpoint, survivors: dict[str, list[int]]) -> dict[str, Copy]:
    """Tensors of the compressed checkpoint by name: expert survivors[layer][i] becomes expert i of that layer.

    Router rows and fused experts keep the survivors' rows; experts stored one by one are renumbered; all else,
    layers that are not in `survivors` among it, stays as it is.
    """
    kept = {}
    for name, info in checkpoint.tensors.items():
        match = re.fullmatch(r"(.+)\.mlp\.(?:gate\.weight|experts\.(?:gate_up_proj|down_proj|(\d+)\.(.+)))", name)
        rows = match and survivors.get(match[1])
        if not rows:
            kept[name] = Copy(name, info)
        elif match[2] is None:
            kept[name] = Copy(name, info, rows)
        elif int(match[2]) in rows:
            kept[f"{match[1]}.mlp.experts.{rows.index(int(match[2]))}.{match[3]}"] = Copy(name, info)
    return kept


def with_num_experts(config: dict, count: int) -> dict:
    """The object of config.json with another number of experts, where it stands: at the top or in `text_config`."""
    text = config.get("text_config") or config
    changed = text | dict.fromkeys(expert_count_keys(text), count)
    return changed if text is config else config | {"text_config": changed}


Edit = Callable[[torch.Tensor, int], torch.Tensor]  # (tensor or row of it as stored, the row's number) -> changed


def write_safetensors(path: Path, tensors: dict[str, Copy], metadata: dict[str, str], folder: Path,
                      edits: dict[str, Edit] = {}) -> None:
    """Writes a safetensors file whose bytes are copied straight from the source files in `folder`, but for tensors
    with an edit by their name in the source."""
    header, offset = {"__metadata__": metadata} if metadata else {}, 0
    for name, copy in tensors.items():
        size = copy.nbytes()
        header[name] = {"dtype": copy.source.dtype, "shape": copy.shape(), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for copy in tensors.values():
            with open(folder / copy.source.file, "rb") as source:
                for number, (start, end) in enumerate(copy.ranges()):
                    source.seek(start)
                    if copy.name in edits:
                        stored = torch.frombuffer(bytearray(source.read(end - start)), dtype=DTYPES[copy.source.dtype])
                        shape, row = (copy.shape(), 0) if copy.rows is None else (copy.shape()[1:], copy.rows[number])
                        changed = edits[copy.name](stored.view(shape), row)
                        out.write(changed.contiguous().view(torch.uint8).numpy())
                        continue
                    for at in range(start, end, 1 << 24):
                        out.write(source.read(min(1 << 24, end - at)))


def write_checkpoint(checkpoint: Checkpoint, out: Path, survivors: dict[str, list[int]], files: dict[str, bytes],
                     edits: dict[str, Edit] = {}) -> None:
    """Writes the checkpoint that keeps `survivors` (layer name -> sorted expert indices, K of them each) to `out`.

    Names, dtypes and shards are the source's, experts renumbered 0..K-1 and `num_experts` set to K; tokenizer
    and other small files are copied, `files` (name -> content) added. Tensors named
    in `edits` are changed on the way. `out` appears whole or not at all.
    """
    kept = surviving_tensors(checkpoint, survivors)
    config = with_num_experts(checkpoint.raw_config, len(next(iter(survivors.values()))))
    with new_folder(out) as staging:
        for file, metadata in checkpoint.metadata.items():
            shard = {name: copy for name, copy in kept.items() if copy.source.file == file}
            write_safetensors(staging / file, shard, metadata, checkpoint.path, edits)
        if checkpoint.sharded:
            index = read_json(checkpoint.path / INDEX)
            index["metadata"] = (index.get("metadata") or {}) | {"total_size": sum(c.nbytes() for c in kept.values())}
            index["weight_map"] = {name: copy.source.file for name, copy in sorted(kept.items())}
            (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_small_files(checkpoint.path, staging)
        for name, content in files.items():
            (staging / name).write_bytes(content)


def copy_small_files(source: Path, out: Path) -> None:
    """Copies tokenizer, generation config, chat template, licence, ...: all but weights and what `out` has.

    A model card gets a notice at its head that the model is compressed.
    """
    weights = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"}
    skip = {PLAN, FOLD, INDEX}
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name.startswith(".") or file.suffix in weights or file.name in skip \
                or file.name.endswith(".bin.index.json") or (out / file.name).exists():
            continue
        shutil.copyfile(file, out / file.name)
        if file.name == "README.md":
            card = file.read_text(encoding="utf-8", errors="surrogateescape")
            front = re.match(r"---\n.*?\n---\n", card, re.DOTALL)
            cut = front.end() if front else 0
            notice = ("> **This is a compressed model.** HodgeCover removed experts from the model described below; "
                      f"the scores below are the source model's. What was removed, and why, is in `{PLAN}`.\n\n")
            (out / file.name).write_text(card[:cut] + notice + card[cut:], encoding="utf-8", errors="surrogateescape")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Context manager: a hidden folder beside `out` that becomes `out` on success and vanishes on failure.

    Raises InputError where `out` exists and is not an empty folder, or cannot be made.
    """
    check_new(out)
    above = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as err:
        raise InputError(f"{out}: cannot be made ({err.strerror})") from None
    try:
        yield staging
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)  # mkdtemp's is private
        try:
            staging.replace(out)
        except OSError as err:  # another run was first
            raise InputError(f"{out}: cannot be made ({err.strerror}); name another with --out") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in above:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def check_new(out: Path) -> None:
    """Raises InputError where `out` cannot become a new folder: it exists and is not an empty one, or no folder
    can be made where it should lie."""
    try:
        if not str(out).isprintable() or len(os.fsencode(out.name)) > 220:  # of 255, for hidden folders beside
            raise InputError(f"{out}: a name that is too long or not printable; name another with --out")
        if out.is_symlink() or out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise InputError(f"{out}: exists and is not an empty folder; name another with --out, or remove it")
        above = next(parent for parent in out.absolute().parents if parent.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise InputError(f"{out}: cannot be made; {above} is not a folder that can be written to")
    except OSError as err:
        raise InputError(f"{out}: cannot be made ({err.strerror})") from None
