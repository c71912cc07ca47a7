# SPDX-License-Identifier: MIT
"""Compare a compressed checkpoint with its source: how well it predicts a text, how large it is, how it speaks.

    python examples/evaluate.py SOURCE CKPT --text FILE
    python examples/evaluate.py SOURCE CKPT --text FILE --max-tokens 16384 --sample 0      quicker

Prediction: the perplexity of both on the text, cut into sequences of L tokens without overlap; the mean
KL(source || output) of their next-token distributions, in nats a token; the share of positions whose most likely next
token is the same (top-1 agreement). --max-tokens takes whole sequences, evenly spaced over the text. Use a text that no
command was calibrated on.

Size: bytes of the weight files; all parameters; those that one token of text meets, which are k of the n routed
experts and all the rest, without a vision tower or a multi-token head; zeros in the experts if one of the two has more
than 1%. A zero is still stored and counted.

Routing, as the paper's table 7 (E.5) reports it of the compressed layers; the formulas are ours. Entropy is that of the
experts' shares of the tokens' choices over log n, 1 if all are used alike; dead experts get no token of the text; both
are means over the sparse layers.

Speech: both continue the first 16 tokens of the text, sampled at temperature 1 with the same seed, until the end of the
text. There is no cache of keys and values: each token reads the whole checkpoint again.
"""
import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import common
import hodgecover
import model_io
import torch
from hodgecover import Tick
from model_io import InputError, Model

PROMPT = 16  # tokens
ZEROS_WORTH_A_LINE = 0.01


class Parameters(NamedTuple):
    """Numbers of a checkpoint: all, and those that one token of text meets."""

    total: int
    active: int


def count_parameters(model: Model) -> Parameters:
    """Parameters by the shapes of the stored tensors but scales. Of the routed experts a token meets k of n; a vision
    tower and a multi-token head it does not meet."""
    total, active, layers = 0, 0, dict(zip(model.layer_names, model.layer_configs))
    experts = common.expert_matrices(model.checkpoint)
    for name, info in model.checkpoint.weights.items():
        size = torch.Size(info.shape).numel()
        total += size
        if name.startswith((model.prefix, "lm_head.")):
            routed = name in experts and not experts[name]["shared"]
            cfg = layers[experts[name]["layer"]] if routed else model.config
            active += size * cfg.top_k // cfg.num_experts if routed else size
    return Parameters(total, active)


def expert_zeros(model: Model) -> float:
    """Share of zeros in the routed and shared experts, 0 to 1. Reads them, one matrix at a time."""
    zeros = total = 0
    for name in common.expert_matrices(model.checkpoint):
        shape = model.checkpoint.tensors[name].shape
        for row in range(shape[0]) if len(shape) == 3 else [None]:
            weight = model.checkpoint.load(name, row)
            zeros += weight.numel() - weight.count_nonzero().item()
            total += weight.numel()
    return zeros / max(total, 1)


def sample(model: Model, prompt: torch.Tensor, count: int, seed: int, tick: Tick = lambda share: None) -> list[int]:
    """Up to `count` token ids that continue the prompt (L,), drawn from the model's next-token distributions; fewer if
    the end-of-text token is drawn. Runs the whole prefix for each token."""
    generator = torch.Generator().manual_seed(seed)
    head, drawn = model.unembedding(), []
    for number in range(count):
        prefix = torch.cat((prompt, torch.tensor(drawn, dtype=torch.int64)))
        log_p = common.log_probabilities(model.hidden(prefix[None])[0, -1:], head)
        token = torch.multinomial(log_p[0].exp().cpu(), 1, generator=generator).item()
        if token == model.config.eos_token_id:
            break
        drawn.append(token)
        tick((number + 1) / count)
    return drawn


def decoded(model: Model, ids: list[int]) -> str:
    """The text of token ids."""
    return model.use_tokenizer(lambda tokenizer: tokenizer.decode(ids))


def check_pair(source: Model, output: Model) -> None:
    """Raise InputError unless the two models read the same tokens."""
    if output.config.vocab_size != source.config.vocab_size:
        raise InputError(f"{output.checkpoint.path}: its vocabulary has {output.config.vocab_size} tokens, the "
                         f"source's {source.config.vocab_size}; give a checkpoint that was made from the source")
    files = [model.checkpoint.path / "tokenizer.json" for model in (source, output)]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: missing; copy the tokenizer of the model to it")
    if files[0].read_bytes() != files[1].read_bytes():
        raise InputError(f"{files[1]}: differs from the source's; both must read the same tokens")


def read_text(model: Model, file: Path, seq_len: int, max_tokens: int | None) -> torch.Tensor:
    """The sequences (B, L) of a text that are to be predicted. Raises InputError if there is none."""
    if max_tokens is not None and max_tokens < seq_len:
        raise InputError(f"max_tokens {max_tokens}: must be at least seq_len ({seq_len})")
    model_io.warn_of_length(model, seq_len)
    ids = model_io.sequences(model.encode_file(file, max_tokens), seq_len)
    return ids if max_tokens is None else common.evenly_spaced(ids, max_tokens // seq_len)


def table(source: Model, output: Model, found: common.Comparison) -> list[str]:
    """Aligned lines: name, source, output, and the output's share of the source."""
    sizes = [model.checkpoint.nbytes() / 1e6 for model in (source, output)]
    parameters = [count_parameters(model) for model in (source, output)]
    zeros = [expert_zeros(model) for model in (source, output)]

    def line(name: str, values: list[float], text: str, share: bool = True) -> str:
        cells = "".join(f"{text.format(value):>16}" for value in values)
        return f"{name:22}{cells}" + (f"{values[1] / values[0]:8.0%}" if share else "")
    lines = [f"{'':22}{'source':>16}{'output':>16}",
             line("weight files, MB", sizes, "{:,.1f}"),
             line("parameters", [count.total for count in parameters], "{:,}"),
             line("active for a token", [count.active for count in parameters], "{:,}")]
    if max(zeros) > ZEROS_WORTH_A_LINE:
        lines.append(line("zeros in the experts", zeros, "{:.1%}", share=False))
    routings = [found.source_routing, found.output_routing]
    if None not in routings:
        lines.append(line("routing entropy", [each.entropy for each in routings], "{:.3f}", share=False))
        lines.append(line("dead experts", [each.dead for each in routings], "{:.1%}", share=False))
    return [*lines,
            line("perplexity", [found.source_perplexity, found.output_perplexity], "{:,.2f}", share=False),
            f"{'KL(source || output)':22}{'':16}{found.kl:16.4f}  nats a token",
            f"{'top-1 agreement':22}{'':16}{found.top_1:16.1%}"]


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = common.command_line(__file__, __doc__, out=False, text=0, source=True, seed=False, memory=False)
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="held-out text: UTF-8, or .jsonl with "
                        "a text field on each line")
    parser.add_argument("--seq-len", metavar="L", type=int, default=512, help="tokens per sequence [%(default)s]")
    parser.add_argument("--max-tokens", metavar="N", type=int, help="tokens of the text to predict [all]")
    parser.add_argument("--sample", metavar="N", type=int, default=24, help="tokens to sample; 0: none [%(default)s]")
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of the sampled tokens [0]")
    return parser


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    hodgecover.check_range("sample", args.sample, 0, 10**6)
    hodgecover.check_range("seed", args.seed, 0, 2**63 - 1)
    source = common.open_model(args.source, args)
    output = common.open_model(args.checkpoint, args)
    check_pair(source, output)
    ids = read_text(source, args.text, args.seq_len, args.max_tokens)
    prompt = ids[0, :PROMPT]

    found = common.compare(source, output, ids, bar := model_io.progress_bar())
    bar(None)
    print(*table(source, output, found), sep="\n")
    print(f"on {ids.numel():,} tokens of {args.text.name}, in sequences of {args.seq_len}, "
          f"{common.dtype_name(source)}", flush=True)
    if args.sample:
        print(f"\nprompt: {decoded(source, prompt.tolist())!r}")
        for name, model in (("source", source), ("output", output)):
            drawn = sample(model, prompt, args.sample, args.seed, bar := model_io.progress_bar())
            bar(None)
            print(f"{name}: {decoded(model, drawn)!r}", flush=True)


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
