# SPDX-License-Identifier: MIT
"""Show what refit.py brings on the tiny checkpoint, over several calibration samples.

    python examples/refit_study.py                          every method refitted, alone and with Wanda
    python examples/refit_study.py --curves --samples 3     HodgeCover's survivors: tokens, ridge, sweeps, text
    python examples/refit_study.py --samples 2 --tokens 1024    a first look

Tables are those of reproduce.py: held-out perplexity and KL from the source, mean +- standard deviation over the
samples, and differences sample by sample. A sample is a seed: of the 2,048 tokens that choose the survivors and of the
16,384 that they are refitted on. 0 sweeps fit one factor for each expert's output, and nothing else.
"""
import argparse
import sys
import sysconfig
from functools import partial
from pathlib import Path

import torch

import common
import hodgecover
import refit
import reproduce
from model_io import Model
from reproduce import Make, Sample, Table

TOKENS = refit.TOKENS  # to refit on, unless a line says otherwise
KEPT = {name: reproduce.DROPPED[name] for name in ("50%", "66%")}  # columns of the curves


# ----------------------------------------------------------------------------------------------------------- the text


def source_code(part: str) -> list[str]:
    """The standard library's own code, without the modules in folders."""
    return [common.code_alone(path) for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]


def licences(part: str) -> list[str]:
    """The licence texts of the packages that lie beside Python's own."""
    folders = (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"], "/usr/share/common-licenses")
    files = {path.resolve() for folder in folders for path in Path(folder).rglob("*")
             if path.name.upper().startswith(("LICEN", "GPL", "LGPL", "GFDL", "MPL", "APACHE", "ARTISTIC", "COPYING"))}
    texts = {path.read_text("utf-8", errors="ignore") for path in files if path.is_file() and path.suffix != ".py"}
    return sorted(texts)


PARTS = {"calibration text": ["calibration"], "with training text": ["train", "calibration"]}  # of a sample's documents
OTHER = {"source code": source_code, "licences": licences}  # whole


def training_ids(sample: Sample, text: str, tokens: int) -> torch.Tensor:
    """So many tokens of one of PARTS or of OTHER, (B, L), or all there are."""
    documents, parts = (OTHER[text], ["all"]) if text in OTHER else (sample.documents, PARTS[text])
    return reproduce.sampled(sample.source, documents, parts, tokens, reproduce.SEQ_LEN, sample.seed)


# --------------------------------------------------------------------------------------------------------- the tables


def refitted(sample: Sample, value: object, out: Path, make: Make, text: str = "calibration text",
             tokens: int = TOKENS, **options: object) -> Model:
    """Make a checkpoint, and refit it on so many tokens of a text, with options of `refit.refit_layer`."""
    output = make(sample, value, out)
    fit = partial(refit.refit_layer, **options)
    for _ in refit.refit(sample.source, output, training_ids(sample, text, tokens), fit):
        pass
    return output


def method_tables() -> list[Table]:
    """Methods and hybrids, refitted."""
    lines = reproduce.method_lines()
    hybrids = reproduce.hybrid_lines(("hodgecover", "reap", "random"), lines)

    def each(makes: dict[str, Make]) -> dict[str, Make]:
        return {label: partial(refitted, make=make) for label, make in makes.items()}
    return [Table(f"experts dropped, refitted on {TOKENS:,} tokens", reproduce.DROPPED, each(lines)),
            Table(f"parameters of the experts gone, refitted on {TOKENS:,} tokens", reproduce.HYBRIDS, each(hybrids),
                  rates=True)]


def curve_tables() -> list[Table]:
    """Tokens, ridge, sweeps and other text, of HodgeCover's survivors."""
    hodgecover_way = partial(reproduce.selected, method="hodgecover")
    way = partial(refitted, make=hodgecover_way)
    by_tokens = {"not refitted": hodgecover_way}
    by_tokens |= {f"{tokens:,} tokens": partial(way, tokens=tokens)
                  for tokens in (2048, 4096, 8192, 16384, 32768, 65536)}
    by_tokens |= {f"{tokens:,} tokens, with training text": partial(way, text="with training text", tokens=tokens)
                  for tokens in (65536, 131072)}
    by_ridge = {f"ridge {ridge}, {tokens:,} tokens": partial(way, tokens=tokens, ridge=ridge)
                for tokens in (2048, 16384, 65536) for ridge in (0.03, 0.3, 3.0)}
    by_sweeps = {f"{sweeps} sweeps": partial(way, sweeps=sweeps) for sweeps in (0, 1, 2, 3, 10)}
    by_text = {text: partial(way, text=text) for text in ("calibration text", *OTHER)}
    titled = {"tokens": by_tokens, "ridge, tokens": by_ridge, "sweeps": by_sweeps, "text": by_text}
    return [Table(title, KEPT, lines) for title, lines in titled.items()]


# --------------------------------------------------------------------------------------------------- the command line


def run(args: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    tables = reproduce.picked(curve_tables() if args.curves else method_tables(), args.only, args.columns)
    reproduce.show_held_out(tables, reproduce.read_samples(args), args.tokens)


def command_line() -> hodgecover.Parser:
    """The parser of this command."""
    parser = reproduce.command_line(__file__, __doc__)
    parser.add_argument("--curves", action="store_true", help="what the refit depends on instead")
    return parser


main = common.main_of(command_line, run)


if __name__ == "__main__":
    sys.exit(main())
