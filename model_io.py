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
import os
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

__version__ = "0.1.0"

WEIGHTS, INDEX, PLAN = "model.safetensors", "model.safetensors.index.json", "hodgecover.json"
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
    rms_norm_eps: float
    rope_theta: float
    num_experts: int
    top_k: int
    norm_topk_prob: bool
    tie_word_embeddings: bool
    clip_qkv: float | None
    eos_token_id: int | None


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises InputError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise InputError(f"{path}: cannot be read as JSON ({err})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def read_config(raw: dict) -> Config:
    """Config from the object in `config.json` (the key names of transformers 4 and 5).

    Raises InputError for an unsupported model type or option, or a missing key.
    """
    if raw.get("model_type") not in FAMILIES:
        raise InputError(f"config.json: model_type {raw.get('model_type')!r} is not supported; "
                         f"supported: {', '.join(FAMILIES)}")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise InputError(f"config.json: rope type {rope_type!r} is not supported; only 'default' is")
    if raw.get("hidden_act", "silu") != "silu":
        raise InputError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported; only 'silu' is")
    eos = raw.get("eos_token_id")
    try:
        return Config(
            model_type=raw["model_type"],
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            num_layers=raw["num_hidden_layers"],
            num_heads=raw["num_attention_heads"],
            num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            rms_norm_eps=raw.get("rms_norm_eps", 1e-5),
            rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
            num_experts=raw["num_experts"],
            top_k=raw["num_experts_per_tok"],
            norm_topk_prob=raw.get("norm_topk_prob", False),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            clip_qkv=raw.get("clip_qkv"),
            eos_token_id=eos[0] if isinstance(eos, list) else eos,
        )
    except KeyError as err:
        raise InputError(f"config.json: the key {err} is missing") from None


# ------------------------------------------------------------------------------------------------ safetensors


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
    except (OSError, ValueError, SafetensorError) as err:
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
            self.tensors |= infos

    def _shards(self) -> list[str]:
        if not (self.path / INDEX).is_file():
            raise InputError(f"{self.path}: no weights; expected {WEIGHTS} or {INDEX}")
        weight_map = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{self.path / INDEX}: no weight_map")
        files = sorted({str(file) for file in weight_map.values()})
        for file in files:
            if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
                raise InputError(f"{self.path / INDEX}: {file!r} is not the name of a safetensors file in the folder")
        return files

    def load(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """The named tensors as they are stored, mapped from their files. Raises InputError for a missing one."""
        names = list(names)
        for name in names:
            if name not in self.tensors:
                raise InputError(f"{self.path}: the weights have no tensor {name!r}")
        found = {}
        for file in {self.tensors[name].file for name in names}:
            with safe_open(self.path / file, framework="pt") as f:
                found |= {name: f.get_tensor(name) for name in names if self.tensors[name].file == file}
        return found

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
    """Weights of a layer's experts: gate (n, f, d), up (n, f, d), down (n, d, f)."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    def __call__(self, e: int, x: torch.Tensor) -> torch.Tensor:
        """Output of expert e on x (T, d): down_e (silu(gate_e x) * up_e x), (T, d)."""
        return (F.silu(x @ self.gate[e].T) * (x @ self.up[e].T)) @ self.down[e].T


@dataclass(eq=False)
class Layer:
    """One decoder layer: its experts, its router (n, d), and all other weights by their name in the layer.

    `fold` is None, or for `--router fold` the dropped experts' router rows (n - K, d) and the slot among the
    survivors (n - K,) that each one's gate mass goes to.
    """

    experts: Experts
    router: torch.Tensor
    weights: dict[str, torch.Tensor]
    fold: tuple[torch.Tensor, torch.Tensor] | None = None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * weight over the last dimension; the mean square is taken in float32 or better."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rope(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary position embedding of x (B, heads, L, head_dim) at positions 0..L-1, in rotate-half layout."""
    length, half = x.shape[-2], x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64, device="cpu") / half)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (B, H, L, h), k and v (B, H_kv, L, h), H a multiple of H_kv -> (B, L, H h)."""
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def linear(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """x times the layer's weight `name`, plus its bias if it has one."""
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def olmoe_attention(x: torch.Tensor, w: dict[str, torch.Tensor], cfg: Config) -> torch.Tensor:
    """OLMoE self-attention on normed x (B, L, d): q/k norms over the full width, then an optional clip."""
    q = rms_norm(linear(x, w, "self_attn.q_proj"), w["self_attn.q_norm.weight"], cfg.rms_norm_eps)
    k = rms_norm(linear(x, w, "self_attn.k_proj"), w["self_attn.k_norm.weight"], cfg.rms_norm_eps)
    v = linear(x, w, "self_attn.v_proj")
    if cfg.clip_qkv is not None:
        q, k, v = (t.clamp(-cfg.clip_qkv, cfg.clip_qkv) for t in (q, k, v))
    q, k, v = (t.unflatten(-1, (-1, cfg.head_dim)).transpose(1, 2) for t in (q, k, v))
    return linear(causal_attention(rope(q, cfg.rope_theta), rope(k, cfg.rope_theta), v), w, "self_attn.o_proj")


def route(x: torch.Tensor, layer: Layer, cfg: Config) -> torch.Tensor:
    """Gate weights (T, n) of tokens x (T, d) exactly as the model applies them: zero off the top-k,
    renormalised iff `norm_topk_prob`. Softmax in float32 or better."""
    router = layer.router if layer.fold is None else torch.cat((layer.router, layer.fold[0]))
    logits = x @ router.T
    p = logits.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
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


class LayerPass(NamedTuple):
    """What one layer saw and made: MoE input x (T, d), gates (T, n), residual stream after the layer y (T, d)."""

    index: int
    layer: Layer
    x: torch.Tensor
    gates: torch.Tensor
    y: torch.Tensor


def run_layer(h: torch.Tensor, layer: Layer, cfg: Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One pre-norm decoder layer on the residual stream h (B, L, d).

    Returns (x, gates, y) as in LayerPass, the token dimension flattened.
    """
    w = layer.weights
    h = h + FAMILIES[cfg.model_type].attention(rms_norm(h, w["input_layernorm.weight"], cfg.rms_norm_eps), w, cfg)
    h = h.flatten(0, 1)
    x = rms_norm(h, w["post_attention_layernorm.weight"], cfg.rms_norm_eps)
    gates = route(x, layer, cfg)
    return x, gates, h + mix_experts(layer.experts, x, gates)


class Family(NamedTuple):
    """What differs between model families: the self-attention (x, weights, cfg) -> (B, L, d)."""

    attention: Callable[[torch.Tensor, dict[str, torch.Tensor], Config], torch.Tensor]


FAMILIES = {"olmoe": Family(olmoe_attention)}


class Model:
    """A sparse MoE language model that streams its weights from a checkpoint folder.

    >>> model = Model("examples/tiny-olmoe")
    >>> model.logits(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 2048])

    Parameters
    ----------
    path : the checkpoint folder
    dtype : weights and activations are cast to it (norms and the router's softmax stay in float32 or better)
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
        self.folds = self._read_folds() if router == "fold" else {}
        shape = self.checkpoint.tensors.get("model.layers.0.mlp.gate.weight")
        if shape and shape.shape != [self.config.num_experts, self.config.hidden_size]:
            raise InputError(f"{path}: config.json says {self.config.num_experts} experts of hidden size "
                             f"{self.config.hidden_size}, the router of layer 0 has shape {shape.shape}")

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, self.dtype)

    def _tensor(self, name: str) -> torch.Tensor:
        return self._cast(self.checkpoint.load([name])[name])

    def _read_folds(self) -> dict[str, torch.Tensor]:
        path = self.checkpoint.path / FOLD
        if not path.is_file():
            raise InputError(f"{path}: not there; write the checkpoint with --router fold")
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name).to(self.device) for name in f.keys()}

    def layer(self, index: int) -> Layer:
        """The weights of decoder layer `index`, read from disk now."""
        prefix = f"model.layers.{index}."
        weights = self.checkpoint.load(name for name in self.checkpoint.tensors if name.startswith(prefix))
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        experts = Experts(*(self._stack(weights, f"mlp.experts.{{}}.{part}_proj.weight", index)
                            for part in Experts._fields))
        fold = None
        if self.folds:
            fold = self._cast(self.folds[f"layers.{index}.dropped_rows"]), self.folds[f"layers.{index}.slots"]
        weights = {name: self._cast(tensor) for name, tensor in weights.items()}
        return Layer(experts, weights.pop("mlp.gate.weight"), weights, fold)

    def _stack(self, weights: dict[str, torch.Tensor], name: str, index: int) -> torch.Tensor:
        """Moves the tensors name.format(0..n-1) of `weights` into one stacked tensor."""
        try:
            tensors = [weights.pop(name.format(e)) for e in range(self.config.num_experts)]
        except KeyError as err:
            raise InputError(f"{self.checkpoint.path}: layer {index} has no tensor {err}") from None
        stacked = torch.empty(len(tensors), *tensors[0].shape, dtype=self.dtype, device=self.device)
        for slot, tensor in zip(stacked, tensors):
            slot.copy_(tensor)
        return stacked

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings of ids (B, L): the residual stream before the first layer, (B, L, d)."""
        table = self.checkpoint.load(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
        return self._cast(F.embedding(ids.cpu(), table))

    def final_norm(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The norm before the head, as a function of the residual stream."""
        weight = self._tensor("model.norm.weight")
        return lambda y: rms_norm(y, weight, self.config.rms_norm_eps)

    def unembedding(self) -> torch.Tensor:
        """The head W_U, (V, d)."""
        return self._tensor("model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight")

    def stream(self, ids: torch.Tensor) -> Iterator[LayerPass]:
        """Runs ids (B, L) through the decoder layers, yielding each one's LayerPass; one layer in memory."""
        h = self.embed(ids)
        for index in range(self.config.num_layers):
            layer = self.layer(index)
            x, gates, y = run_layer(h, layer, self.config)
            yield LayerPass(index, layer, x, gates, y)
            h = y.view_as(h)
            del layer, x, gates, y  # before the next layer is read; callers do the same with what they got

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The normed residual stream that the head reads, (B, L, d), for ids (B, L) int64."""
        y = self.embed(ids)
        for step in self.stream(ids):
            y = step.y.view_as(y)
            del step  # before the next layer is read
        return self.final_norm()(y)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Next-token logits (B, L, V) for ids (B, L) int64: float32, or float64 when that is the model's dtype."""
        logits = self.hidden(ids) @ self.unembedding().T
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def perplexity(self, ids_or_text: torch.Tensor | str, seq_len: int = 512) -> float:
        """exp of the mean next-token loss in nats over ids (B, L), or over a text cut into sequences."""
        if isinstance(ids_or_text, str):
            ids_or_text = sequences(self.encode([ids_or_text]), seq_len)
        head, total = self.unembedding(), 0.0
        for h, ids in zip(self.hidden(ids_or_text), ids_or_text.to(self.device)):
            logits = (h[:-1] @ head.T).to(torch.promote_types(h.dtype, torch.float32))
            total += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        return float(torch.tensor(total / ids_or_text[:, 1:].numel(), dtype=torch.float64).exp())

    def encode(self, documents: Iterable[str]) -> torch.Tensor:
        """Token ids (T,) of the documents, one after the other, each ended by the end-of-text token if any.

        Raises InputError where the tokenizer is missing, unreadable or has ids beyond the vocabulary.
        """
        path = self.checkpoint.path / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as err:  # the library raises plain Exception
            raise InputError(f"{path}: not a readable tokenizer ({err})") from None
        end = [] if self.config.eos_token_id is None else [self.config.eos_token_id]
        ids = [i for encoding in tokenizer.encode_batch(list(documents), add_special_tokens=False)
               for i in encoding.ids + end]
        if ids and max(ids) >= self.config.vocab_size:
            raise InputError(f"{path}: token id {max(ids)} is beyond the vocabulary of {self.config.vocab_size}")
        return torch.tensor(ids, dtype=torch.int64)


# -------------------------------------------------------------------------------------------------------- text


def read_documents(paths: Iterable[str | os.PathLike]) -> list[str]:
    """One document a UTF-8 text file, or one a line (its `text` field) of a `.jsonl` file."""
    documents = []
    for path in map(Path, paths):
        try:
            text = path.read_text(encoding="utf-8")
            documents += [json.loads(line)["text"] for line in text.splitlines() if line.strip()] \
                if path.suffix == ".jsonl" else [text]
        except OSError as err:
            raise InputError(f"{path}: cannot be read ({err.strerror})") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: expected UTF-8 text, or .jsonl with an object with a \"text\" field a line"
                             ) from None
    return documents


def python_documentation(part: str) -> list[str]:
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
    return [chosen[place] for place in sorted(chosen) if chosen[place]]


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
    whole = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    if not len(whole):
        raise InputError(f"the text has {len(ids)} tokens; one sequence takes {seq_len} (--seq-len)")
    if count is None:
        return whole
    pick = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:count]
    return whole[pick.sort().values]


# ----------------------------------------------------------------------------------------------------- writing


class Copy(NamedTuple):
    """A tensor of the output: its source, and the rows of the first dimension to keep (None: all)."""

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


def surviving_tensors(checkpoint: Checkpoint, survivors: dict[int, list[int]]) -> dict[str, Copy]:
    """Tensors of the compressed checkpoint by name: expert survivors[layer][i] becomes expert i of its layer."""
    kept = {}
    for name, info in checkpoint.tensors.items():
        match = re.fullmatch(r"(model\.layers\.(\d+)\.mlp\.)(?:experts\.(\d+)(\..+)|gate\.weight)", name)
        if not match:
            kept[name] = Copy(info)
            continue
        prefix, layer, expert, rest = match.groups()
        rows = survivors[int(layer)]
        if expert is None:
            kept[name] = Copy(info, rows)
        elif int(expert) in rows:
            kept[f"{prefix}experts.{rows.index(int(expert))}{rest}"] = Copy(info)
    return kept


def write_safetensors(path: Path, tensors: dict[str, Copy], metadata: dict[str, str], folder: Path) -> None:
    """Writes a safetensors file whose bytes are copied straight from the source files in `folder`."""
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
                for start, end in copy.ranges():
                    source.seek(start)
                    for at in range(start, end, 1 << 24):
                        out.write(source.read(min(1 << 24, end - at)))


def write_checkpoint(checkpoint: Checkpoint, out: Path, survivors: dict[int, list[int]], files: dict[str, bytes]
                     ) -> None:
    """Writes the checkpoint that keeps `survivors` (layer -> sorted expert indices, K of them each) to `out`.

    Names, dtypes and shards are the source's, experts renumbered 0..K-1 and `num_experts` set to K; tokenizer
    and other small files are copied, `files` (name -> content) added. `out` appears whole or not at all.
    """
    kept = surviving_tensors(checkpoint, survivors)
    config = checkpoint.raw_config | {"num_experts": len(next(iter(survivors.values())))}
    with new_folder(out) as partial:
        for file, metadata in checkpoint.metadata.items():
            shard = {name: copy for name, copy in kept.items() if copy.source.file == file}
            write_safetensors(partial / file, shard, metadata, checkpoint.path)
        if checkpoint.sharded:
            index = read_json(checkpoint.path / INDEX)
            index["metadata"] = index.get("metadata", {}) | {"total_size": sum(c.nbytes() for c in kept.values())}
            index["weight_map"] = {name: copy.source.file for name, copy in sorted(kept.items())}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        copy_small_files(checkpoint.path, partial)
        for name, content in files.items():
            (partial / name).write_bytes(content)


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
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as err:
        raise InputError(f"{out}: cannot be made ({err.strerror})") from None
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)  # mkdtemp's is private
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(out: Path) -> None:
    """Raises InputError where `out` exists and is not an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder; name another with --out, or remove it")
