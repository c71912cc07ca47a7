# SPDX-License-Identifier: MIT
"""What the commands in this folder share: the three files on the path, one parser, one way to change a checkpoint.

A command reads one or two checkpoint folders and writes one. It imports this first, and nothing of another command but
the functions whose docstrings say what they return.
"""
import argparse
import ast
import contextlib
import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import hodgecover  # noqa: E402
import model_io  # noqa: E402
from hodgecover import Parser, Settings  # noqa: E402
from model_io import (DTYPES, FP8, RECORD, SCALE, STORED, TOKENS, Checkpoint, Experts, InputError,  # noqa: E402
                      Layer, LayerPass, Model, Piece, surviving_tensors)

Size = tuple[int, int | None]  # experts of a layer, hidden units of each (None: all)


def parser_of(file: str, description: str) -> Parser:
    """The parser of the command in `file`, without options, described by its docstring."""
    return Parser(prog=Path(file).name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def command_line(file: str, description: str, out: bool = True, text: int = TOKENS, source: bool = False,
                 seed: bool = True, memory: bool = True, use: str = "calibration") -> Parser:
    """The parser of the command in `file`, described by its docstring: a checkpoint, after its source, if it compares
    the two; `--out`, if it writes one; text of so many tokens for calibration or another use, if it reads any; where
    and how to compute, with `--seed` and `--memory`, if it uses them."""
    parser = parser_of(file, description)
    if source:
        parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of the checkpoint it was made from")
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="checkpoint folder")
    if out:
        parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="output folder")
    hodgecover.add_common_options(parser, text, use, memory)
    if seed:
        hodgecover.add_settings(parser, "seed")
    return parser


def main_of(command_line: Callable[[], Parser], run: Callable[[argparse.Namespace], None]) -> Callable[..., int]:
    """The `main` of a command: its arguments, or the process's, -> its exit status."""
    return lambda argv=None: hodgecover.run_command(command_line(), run, argv)


def settings_of(args: argparse.Namespace, **more: object) -> Settings:
    """The Settings that the options say; the others as by default."""
    given = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    return Settings(**given, **more)


def refuse_given(parser: Parser, args: argparse.Namespace, names: Iterable[str], what: str) -> None:
    """Raise InputError if one of these options, which `what` does not use, has another value than its default."""
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            raise InputError(f"{name}: {what} does not use it; leave it out")


def open_model(path: Path, args: argparse.Namespace) -> Model:
    """The checkpoint at `path`, with the command line's dtype and device."""
    return Model(path, model_io.choose_dtype(args.dtype, args.device), args.device)


def dtype_name(model: Model) -> str:
    """The name of a model's dtype, such as float32."""
    return str(model.dtype).removeprefix("torch.")


def calibration_ids(model: Model, args: argparse.Namespace) -> torch.Tensor:
    """The command line's calibration text, (B, L)."""
    return hodgecover.calibration_ids(model, args.calib, args.tokens, args.seq_len, args.seed)


def code_alone(path: Path) -> str:
    """The code of a Python source file, without its docstrings and comments; nothing if it does not parse."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            documented = ast.get_docstring(node) is not None
            node.body = node.body[documented:] or [ast.Pass()]
    return ast.unparse(tree)


@cache
def python_code(part: str) -> tuple[str, ...]:
    """The code of the standard library, of a part as in `model_io.python_sources`, one module a document.

    Its tables of characters and the language reference are left out."""
    modules = [path for name, path in model_io.python_sources(part).items()
               if not name.startswith(("topic ", "module encodings/", "module pydoc_data/"))]
    return tuple(filter(None, map(code_alone, modules)))


TEXTS = {"documentation": model_io.python_documentation, "code": python_code}  # part -> documents


def barrier_cache(model: Model, args: argparse.Namespace) -> Path:
    """The folder of the barriers: --cache, or CKPT-barriers beside CKPT. Raises InputError if it lies in CKPT."""
    cache = args.cache or model_io.beside(model.checkpoint.path, "-barriers")
    model_io.refuse_inside(model, cache, "cache")
    return cache


def show_output(model: Model, out: Path) -> None:
    """Print the size of the weights before and after, and where the output lies."""
    before, after = model.checkpoint.nbytes(), Checkpoint(out).nbytes()
    print(f"weights: {before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB ({after / before:.0%})")
    print(f"output: {out}")


def read_eval(model: Model, args: argparse.Namespace, tokens: int) -> torch.Tensor:
    """The text of --eval, (B, L), or of a large file windows with so many tokens at least. Raises InputError for one
    that cannot be read or has not one whole sequence."""
    try:
        return model_io.sequences(model.encode_file(args.eval, max(tokens, args.seq_len)), args.seq_len)
    except InputError as err:
        raise InputError(f"eval: {err}") from None


def evenly_spaced(ids: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of the sequences ids (B, L), evenly spaced from the first on, in order; all of them if there are no more.

    >>> evenly_spaced(torch.arange(10)[:, None], 4).flatten().tolist()
    [0, 2, 5, 7]
    """
    count = min(count, len(ids))
    return ids[torch.arange(count) * len(ids) // count]


ALIGNED = 8  # numbers of 2 bytes that make 16 bytes


def warn_of_width(width: int) -> None:
    """Warn if the experts' width is none that transformers' grouped products take in 16 bits: say what runs it."""
    if width % ALIGNED:
        or_float32 = "" if width % (ALIGNED // 2) else ", or in float32"
        model_io.warn(f'width {width}: no multiple of {ALIGNED}; transformers runs it with experts_implementation='
                        f'"eager" or "batched_mm"{or_float32}; llama.cpp leaves the down projections in F16 (Q8_0 wants'
                        ' multiples of 32, K-quants of 256)')


SPLIT = {"qwen3": "qwen3_moe"}  # the family that dot_moe.py makes of a dense one


def outline(model: Model, count: int) -> dict[str, object]:
    """What a checkpoint shares with its source, by name, over its first `count` layers; of a dense family, what its
    sparse one does."""
    cfg = model.config
    if cfg.model_type in SPLIT:
        sparse = list(range(cfg.num_layers))
    else:
        sparse = [index for index in hodgecover.sparse_layers(model) if index < count]
    return {"family": SPLIT.get(cfg.model_type, cfg.model_type).removesuffix("_text"), "hidden size": cfg.hidden_size,
            "vocabulary": cfg.vocab_size, "number of decoder layers": cfg.num_layers,
            "list of layers with experts": sparse}


def check_source(model: Model, source: Model) -> None:
    """Raise InputError unless a checkpoint can have been made from `source`, by whichever tool: the same family, hidden
    size, vocabulary, and layers with experts, but perhaps without the multi-token head; no more and no wider experts,
    or of a dense source, no more neurons in all.
    """
    hodgecover.sparse_layers(model)
    count = len(model.layer_names)
    wanted = outline(source, count)
    for name, value in outline(model, count).items():
        if value != wanted[name]:
            raise InputError(f"{model.checkpoint.path}: its {name} is {value}; must be {wanted[name]}, as in "
                             f"{source.checkpoint.path}")
    if source.config.model_type in SPLIT:
        width = model.config.num_experts * model.config.expert_width
        if width > source.config.dense_width:
            raise InputError(f"{model.checkpoint.path}: has {width} neurons in the experts of a layer; "
                             f"{source.checkpoint.path} has {source.config.dense_width}")
        return
    pairs = zip(model.layer_configs, source.layer_configs)
    if any(own.num_experts > of.num_experts or own.expert_width > of.expert_width for own, of in pairs):
        raise InputError(f"{model.checkpoint.path}: has more or wider experts than {source.checkpoint.path}; the "
                         "source must be the larger one, and come first")


def size_of(text: str) -> Size:
    """What a prefix of a nested checkpoint has: K experts a layer, or K,F, F hidden units of each.

    >>> size_of("32"), size_of("32,512")
    ((32, None), (32, 512))
    """
    match = re.fullmatch(r"(\d{1,9})(?:,(\d{1,9}))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text}: must be K or K,F, such as 32 or 32,512")
    return int(match[1]), match[2] and int(match[2])


def check_size(model: Model, size: Size) -> tuple[int, int]:
    """Return the experts and the hidden units of a prefix. Raises InputError if a model has no such prefix."""
    keep, width = size
    most = min(config.expert_width for config in model.layer_configs)
    hodgecover.check_keep(model, keep)
    if width is not None and not 1 <= width <= most:
        raise InputError(f"width {width}: must be from 1 to {most}, the width of the experts")
    return keep, most if width is None else width


def cut(layer: Layer, kept: slice | list[int], width: int | None = None) -> Layer:
    """Return a layer with some of its experts and their router rows alone, of each the first `width` hidden units. A
    slice gives views of the weights. A dense layer stays as it is."""
    if layer.experts is None:
        return layer
    gate, up, down = layer.experts
    kept = kept if isinstance(kept, slice) else torch.tensor(kept)
    experts = Experts(gate[kept, :width], up[kept, :width], down[kept, :, :width])
    return Layer(experts, layer.router[kept], layer.weights)


def folder_beside(out: Path, command: str, *inputs: Model) -> Path:
    """Return OUT-command, the folder of what a command has done until its output is whole. Raises InputError if it
    cannot be one, or lies in one of the checkpoints that are read."""
    out = Path(os.path.abspath(out))
    folder = out.with_name(f"{out.name}-{command}") if out.name else out
    if folder == out or folder.exists() and not folder.is_dir():
        raise InputError(f"out {out}: {folder} is no folder that what is done can lie in; remove it or name another")
    for model in inputs:
        model_io.refuse_inside(model, folder, f"out {out}:")
    return folder


def open_pair(args: argparse.Namespace, command: str) -> tuple[Model, Model, Path]:
    """The command line's source and checkpoint, and the folder of what is done: --cache, or OUT-command. Raises
    InputError if the one cannot be made from the other, if OUT cannot be written, or if it or the folder lies in one of
    the two."""
    source, model = open_model(args.source, args), open_model(args.checkpoint, args)
    check_source(model, source)
    cache = getattr(args, "cache", None) or folder_beside(args.out, command, source, model)
    model_io.check_out(model, args.out, cache)
    model_io.refuse_inside(source, args.out, "out")
    for each in (source, model):
        model_io.refuse_inside(each, cache, "cache")
    return source, model, cache


@contextlib.contextmanager
def made(cache: Path, *patterns: str) -> Iterator[None]:
    """Context manager: a folder of what is done, made. On success the files of these names go; the folder goes if
    nothing else lies in it. Raises InputError if it cannot be made."""
    model_io.make_cache(cache)
    try:
        yield
        clear(cache, patterns)
    finally:
        clear(cache, [])


# -------------------------------------------------------------------------------- the tensors of a checkpoint, changed


TRANSFORMERS = {"olmoe": "OlmoeForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
                "qwen3_next": "Qwen3NextForCausalLM", "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
                "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM"}
EXPERT = re.compile(r"(?P<layer>.+)\.mlp\.(?:experts\.(?:(?P<expert>\d+)\.)?|(?P<shared>shared_expert)\.)"
                    r"(?P<part>gate|up|gate_up|down)_proj(?:\.weight)?")


def expert_matrices(checkpoint: Checkpoint) -> dict[str, re.Match]:
    """The tensors of routed and shared experts by name, matched: `layer`, `expert`, its number, None if it is fused or
    shared, `shared`, None if it is routed, and `part`, the projection."""
    return {name: match for name in checkpoint.tensors if (match := EXPERT.fullmatch(name))}


def has_fp8(checkpoint: Checkpoint) -> bool:
    """Whether some of a checkpoint's weights are stored in FP8."""
    return any(info.dtype == FP8 for info in checkpoint.tensors.values())


def in_bfloat16(checkpoint: Checkpoint, kept: dict[str, Piece], config: dict) -> tuple[dict[str, Piece], dict]:
    """The pieces of an output and its object of config.json without FP8: weights times their scales, the scales and
    quantization_config gone. Says so in a line if there is some; else both as they are."""
    if not has_fp8(checkpoint):
        return kept, config
    print("weights: FP8 in the source, bfloat16 in the output: two bytes a weight, not one", flush=True)
    kept = {name: edited(checkpoint, piece._replace(dtype="BF16"), lambda weight, _: weight)
            if piece.dtype == FP8 else piece for name, piece in kept.items() if not piece.source.endswith(SCALE)}

    def plain(config: dict) -> dict:
        return {key: plain(value) if key == "text_config" and value else value for key, value in config.items()
                if key != "quantization_config"}
    return kept, plain(config)


def layer_bytes(model: Model, layer: str) -> int:
    """The bytes of a layer's weights in memory: of experts in bfloat16 or FP8, bfloat16."""
    return sum(math.prod(info.shape) * (2 if ".experts." in name and info.dtype in ("BF16", FP8)
                                        else model.dtype.itemsize)
               for name, info in model.checkpoint.weights.items() if name.startswith(f"{layer}."))


Edit = Callable[[torch.Tensor, int], torch.Tensor]  # (tensor or row of it as loaded, the row's number) -> changed


def as_bytes(tensor: torch.Tensor, dtype: torch.dtype) -> memoryview:
    """The bytes of a tensor in a dtype, as a file stores them."""
    return tensor.to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy().data


def edited(checkpoint: Checkpoint, piece: Piece, edit: Edit, shape: list[int] | None = None) -> Piece:
    """A piece of an output, changed by an edit of the stored tensor, or of each row that stays; `shape` is that of the
    piece then, if it is another. A piece that stays FP8 is not multiplied by its scales."""
    def read() -> Iterator[memoryview]:
        for row in [None] if piece.rows is None else piece.rows:
            tensor = checkpoint.load(piece.source, row, as_stored=piece.dtype == FP8)
            yield as_bytes(edit(tensor, row or 0), STORED[piece.dtype])
    return piece._replace(shape=shape or piece.shape, read=read)


def write_edited(checkpoint: Checkpoint, out: Path, survivors: dict[str, list[int]], files: dict[str, bytes],
                 edits: dict[str, Edit] = {}, shapes: dict[str, list[int]] = {}, config: dict[str, int] = {},
                 stays_fp8: bool = False) -> None:
    """Write a checkpoint as `model_io.write_checkpoint` does, some of whose tensors are changed, and whose layers may
    keep different numbers of experts: its configuration then has a `per_layer_config`, and MODELING lies beside it.
    What is FP8 in the source is bfloat16 unless `stays_fp8`: then edits are of tensors and scales as they are stored.

    edits : name of a tensor in the source -> its edit
    shapes : name of a tensor in the source -> its shape in the output, if its edit changes that
    config : keys of config.json whose values change besides the number of experts
    """
    raw, kept = checkpoint.raw_config, surviving_tensors(checkpoint, survivors)
    keys = model_io.expert_count_keys(raw.get("text_config") or raw)
    counts = {name: len(experts) for name, experts in survivors.items()}
    of_mtp = [count for name, count in counts.items() if name.startswith("mtp.")]  # it has no key of its own
    per_layer = {int(name.rsplit(".", 1)[1]): dict.fromkeys(keys, count) for name, count in counts.items()
                 if len({*counts.values()}) > 1 and not name.startswith("mtp.")}
    changes = {key: (of_mtp or [max(counts.values())])[0] for key in keys if counts} | config
    raw = model_io.with_keys(raw, changes, per_layer)
    if per_layer:
        raw |= {"auto_map": auto_map(raw)}
        files = files | {f"{model_io.MODELING}.py": Path(__file__).with_name(f"{model_io.MODELING}.py").read_bytes()}
    if not stays_fp8:
        kept, raw = in_bfloat16(checkpoint, kept, raw)
    kept = {name: edited(checkpoint, piece, edits[piece.source], shapes.get(piece.source))
            if piece.source in edits else piece for name, piece in kept.items()}
    model_io.write_tensors(checkpoint, out, kept, raw, files)


def auto_map(raw: dict) -> dict[str, str]:
    """The class of MODELING by which transformers opens a checkpoint of the object of config.json."""
    autos = ["AutoModelForCausalLM"] + ["AutoModelForImageTextToText"] * ("text_config" in raw)
    return dict.fromkeys(autos, f"{model_io.MODELING}.{TRANSFORMERS[raw['model_type']]}")


def export(model: Model, plans: dict[str, hodgecover.Plan], out: Path, entry: dict) -> None:
    """Write the checkpoint of plans by layer name and its record, as `hodgecover.export` does; the layers may keep
    different numbers of experts."""
    survivors = {name: plan.survivors for name, plan in plans.items()}
    files = {model_io.RECORD: model_io.record_bytes(model.checkpoint, entry)}
    write_edited(model.checkpoint, out, survivors, files, stays_fp8=True)


def overwrite(checkpoint: Checkpoint, name: str, tensor: torch.Tensor, row: int | None = None) -> None:
    """Write other values over a stored tensor, or over one row of its first dimension, in its file."""
    info = checkpoint.tensors[name]
    checkpoint._fingerprint = None
    with open(checkpoint.path / info.file, "r+b") as file:
        file.seek(info.range(row)[0])
        file.write(as_bytes(tensor, DTYPES[info.dtype]))


def store(model: Model, layer: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write weights of a layer, by their name in `Layer.weights`, over those in the checkpoint's files: the router as
    `mlp.gate.weight`, the experts' as `mlp.experts.gate`, `.up` (these two together) and `.down`, stacked. Return what
    is stored, by the tensors' names, not transposed. Raises InputError if one overflows the type of its file."""
    weights, checkpoint = dict(weights), model.checkpoint
    stacks = {part: weights.pop(f"mlp.experts.{part}") for part in Experts._fields if f"mlp.experts.{part}" in weights}
    if f"{layer}.mlp.experts.gate_up_proj" in checkpoint.tensors:
        if "gate" in stacks:
            weights["mlp.experts.gate_up_proj"] = torch.cat((stacks["gate"], stacks["up"]), 1)
        if "down" in stacks:
            weights["mlp.experts.down_proj"] = stacks["down"]
    else:
        weights |= {f"mlp.experts.{e}.{part}_proj.weight": each for part, stack in stacks.items()
                    for e, each in enumerate(stack)}
    stored = {}
    for name, weight in weights.items():
        name = f"{layer}.{name}"
        stored[name] = (weight - int(model._less_1(name))).to(DTYPES[checkpoint.tensors[name].dtype])
        if not stored[name].isfinite().all():
            raise InputError(f"{name}: its new weights overflow {stored[name].dtype}")
        overwrite(checkpoint, name, model.turned(name, stored[name]))
    return stored


def store_down(model: Model, layer: str, down: torch.Tensor) -> torch.Tensor:
    """Write the down projections (n, d, f) of a layer over those in the checkpoint's files; return them as stored.
    Raises InputError if they overflow that type."""
    stored = [*store(model, layer, {"mlp.experts.down": down}).values()]
    return stored[0] if stored[0].dim() == 3 else torch.stack(stored)


def rerun(model: Model, step: LayerPass, empty: Callable[..., torch.Tensor] = torch.empty) -> LayerPass:
    """Read the layer of a pass again from the files and run it on step.h; `empty` makes x and y. `step.layer` holds the
    new weights, too: both passes share it, and the stream unloads it."""
    step.layer.unload()
    vars(step.layer).update(vars(model.layer(step.index)))
    return model.run(step.index, step.layer, step.h, step.norm, empty)


class Routing(NamedTuple):
    """How a model uses its experts on a text: means over its sparse layers (paper E.5; the formulas are ours)."""

    entropy: float  # of the experts' shares of the tokens' choices, over log n
    dead: float  # share of the experts that no token is routed to


class Comparison(NamedTuple):
    """How far a model is from its source: perplexities of both, the mean KL(source || output) in nats a position, the
    share of positions whose most likely next token is the same, and the routing of both, None of a dense one."""

    source_perplexity: float
    output_perplexity: float
    kl: float
    top_1: float
    source_routing: Routing | None
    output_routing: Routing | None


def compare(source: Model, output: Model, ids: torch.Tensor, tick: Callable[[float], None] = lambda share: None
            ) -> Comparison:
    """Compare next-token distributions over ids (B, L). `tick` is told the share of the layers that are done. Raises
    InputError if the vocabularies differ in size."""
    if output.config.vocab_size != source.config.vocab_size:
        raise InputError(f"output: its vocabulary has {output.config.vocab_size} tokens; it must have the source's "
                         f"{source.config.vocab_size}")
    hidden_p, routing_p = run_counted(source, ids, lambda share: tick(share / 2))
    hidden_q, routing_q = run_counted(output, ids, lambda share: tick((1 + share) / 2))
    loss_p = loss_q = kl = agreements = 0.0
    both = zip(source.predictions(hidden_p, ids), output.predictions(hidden_q, ids))
    for (log_p, loss_of_p), (log_q, loss_of_q) in both:
        loss_p += loss_of_p
        loss_q += loss_of_q
        kl += (log_p.exp() * (log_p - log_q)).sum()
        agreements += (log_p.argmax(-1) == log_q.argmax(-1)).sum()
    loss = torch.stack((loss_p, loss_q)) / ids[:, 1:].numel()
    positions = ids.numel()
    return Comparison(*loss.exp().tolist(), kl.item() / positions, agreements.item() / positions, routing_p, routing_q)


def run_counted(model: Model, ids: torch.Tensor, tick: Callable[[float], None]) -> tuple[torch.Tensor, Routing | None]:
    """What `Model.hidden` returns for ids (B, L), and the routing on the way."""
    count, counts = model.config.num_layers, []
    for step in islice(model.stream(ids), count):
        if step.gates is not None:
            counts.append((step.gates > 0).sum(0).cpu())
        tick((step.index + 1) / count)
    return step.norm(step.y).view(*ids.shape, -1), routing_of(counts)


def routing_of(counts: list[torch.Tensor]) -> Routing | None:
    """The routing by the tokens that each expert gets, (n,) of each sparse layer; None if there is no such layer.

    >>> routing_of([torch.tensor([5, 5, 0, 0])])
    Routing(entropy=0.5, dead=0.5)
    """
    if not counts:
        return None
    entropies, dead = [], []
    for tokens in counts:
        share = tokens.double() / tokens.sum()
        entropy = -torch.xlogy(share, share).sum().item()
        entropies.append(entropy / math.log(max(len(tokens), 2)))
        dead.append((tokens == 0).double().mean().item())
    return Routing(sum(entropies) / len(counts), sum(dead) / len(counts))


def log_probabilities(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """log softmax(head hidden) of one sequence (L, d), in float64, (L, V)."""
    return (hidden @ head.T).double().log_softmax(-1)


@contextlib.contextmanager
def copied(model: Model, out: Path, entry: dict) -> Iterator[Model]:
    """Context manager: a copy of a checkpoint, without FP8, to be changed in place, that becomes the folder `out` on
    success and vanishes on failure. Its record is the checkpoint's with `entry`, as it is in the end.

    Raises InputError as `model_io.check_out` does.
    """
    model_io.check_out(model, out)
    with model_io.new_folder(out) as folder:
        write_edited(model.checkpoint, folder, {}, {}, {})
        try:
            yield Model(folder, model.dtype, str(model.device))
        except InputError as err:  # the fault is the checkpoint's
            raise InputError(str(err).replace(str(folder), str(model.checkpoint.path))) from None
        (folder / RECORD).write_bytes(model_io.record_bytes(model.checkpoint, entry))


def scratch(folder: Path) -> Callable[..., torch.Tensor]:
    """Return a `torch.empty` whose tensors are mapped files in `folder`: they take memory as far as there is some to
    spare. The files have no name, and go with the tensors."""
    def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = math.prod(shape)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            for start in range(0, size * dtype.itemsize, 1 << 24):  # a full disk is an error now, a crash later
                file.write(bytes(min(1 << 24, size * dtype.itemsize - start)))
            file.flush()
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(shape)
    return empty


STREAMS = 8  # tensors (T, d) of a run beside the source's: h, x and y of both, the next x and y of one


def activation_bytes(model: Model, tokens: int, count: int = STREAMS, dtype: torch.dtype | None = None) -> int:
    """The bytes of so many tensors (T, d) of a model's streams, in its dtype or another."""
    return count * tokens * model.config.hidden_size * (dtype or model.dtype).itemsize


def stream_maker(model: Model, size: int, memory: int, folder: Path) -> Callable[..., torch.Tensor]:
    """Return what makes a model's streams, of `size` bytes in all: `torch.empty`, or `scratch` in a folder if they are
    on the CPU and take more than `memory` bytes."""
    return scratch(folder) if model.device.type == "cpu" and size > memory else torch.empty


def available_memory(device: torch.device) -> int:
    """Free bytes of the device that a model lives on."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def work_key(settings: dict, ids: torch.Tensor, *models: Model) -> dict[str, str]:
    """All that the parts of a run that are kept depend on, by name: settings, text ids (B, L), checkpoints, dtype."""
    return {"settings": json.dumps(settings), "text": f"{[*ids.shape]} {model_io.text_hash(ids)}",
            "weights": " ".join(model.checkpoint.fingerprint() for model in models), "dtype": str(models[-1].dtype)}


def clear(cache: Path, patterns: Iterable[str]) -> None:
    """Remove the files of these names from a folder, what a killed run left of them, and the folder if it is empty
    then."""
    for pattern in patterns:
        for path in (*cache.glob(pattern), *cache.glob(f".{pattern}.*")):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not empty
        cache.rmdir()


def import_pyplot(path: Path):
    """Return matplotlib's pyplot, without a display, to draw a picture in a file of that name. Raises InputError if it
    is not installed or does not know the format of the name's ending, and if no file of that name can be made."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"{path}: must name a file in an existing folder")
    try:
        import matplotlib
    except ImportError:
        raise InputError("matplotlib is missing; pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    known = pyplot.Figure().canvas.get_supported_filetypes()
    if picture_format(path) not in known:
        raise InputError(f"{path}: no picture can have this ending; must be one of {', '.join(sorted(known))}")
    return pyplot


def picture_format(path: Path) -> str:
    """Return the format that a picture's name asks for, such as png."""
    return path.suffix[1:].lower() or "png"


def write_picture(figure, path: Path, dpi: int) -> None:
    """Write a figure to a file in the format of its name, whole or not at all."""
    data = io.BytesIO()
    figure.savefig(data, dpi=dpi, format=picture_format(path), bbox_inches="tight")
    model_io.write_whole(path, data.getvalue())
