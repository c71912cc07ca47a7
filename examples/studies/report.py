# SPDX-License-Identifier: MIT
"""Draw the pictures of RESULTS.md, and fill its tables, from results.csv alone.

    python examples/studies/report.py     (needs matplotlib)

A cell is the mean over the calibration samples +- their standard deviation. A difference is taken sample by sample:
the mean +- half of the 95% interval of Student's t, in bold if it does not contain 0. There is no correction for the
number of cells, and all samples are judged on the same text. A picture carries a hash of what it draws. Rows of other
versions than VERSIONS_SHOWN are left out: 0.4 has other constants and other merges than 0.3.
"""
import argparse
import csv
import hashlib
import io
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import common  # noqa: E402
import model_io  # noqa: E402

DOCUMENT, RESULTS = HERE.parent / "RESULTS.md", HERE / "results.csv"
MODELS = ("tiny-olmoe", "tiny-qwen3-moe")
RATES = ("25%", "50%", "66%")
VERSIONS_SHOWN = "0.1.0", "0.2.0", "0.3.0"  # whose figures RESULTS.md has; no cell is of two of them
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5% point for 2 to 10 samples


class Row(NamedTuple):
    """A line of results.csv: one sample of a cell, or of 0.1 and 0.2 the mean of `samples` with deviations."""

    model: str
    table: str
    line: str
    column: str
    seed: int  # -1 of a mean
    perplexity: float
    kl: float  # from the source, in nats a token
    gone: float  # share of the source's expert parameters
    cost: float  # processor seconds
    version: str
    samples: int  # 1 of a sample
    perplexity_sd: float
    kl_sd: float


Results = dict[tuple[str, ...], list[Row]]  # by model, table, line, column


def read(path: Path, versions: Sequence[str] = VERSIONS_SHOWN) -> Results:
    """The samples of each cell of a file of study.py that these versions measured, in order of their seeds. Raises
    InputError for another file."""
    rows = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for fields in csv.DictReader(file):
                values = {name: Row.__annotations__[name](text) for name, text in fields.items()}
                rows.append(Row(**values))
    except (KeyError, TypeError, ValueError):
        raise model_io.InputError(f"{path}: must be a table of study.py with {', '.join(Row._fields)}") from None
    results: Results = {}
    for row in sorted(rows, key=lambda row: row.seed):
        if row.version in versions:
            results.setdefault(row[:4], []).append(row)
    return results


# ------------------------------------------------------------------------------------------------------- statistics


def half_interval(values: Sequence[float]) -> float:
    """Half of the 95% interval of the mean of 2 to 10 values, by Student's t."""
    return STUDENT_T[len(values) - 2] * stdev(values) / len(values)**0.5


def level_cell(rows: list[Row]) -> str:
    """Perplexity, and KL with its deviation, and how many samples if not five; empty without."""
    if not rows:
        return ""
    kl = [row.kl for row in rows]
    deviation = stdev(kl) if len(kl) > 1 else rows[0].kl_sd
    spread = f" ± {deviation:.3f}" if deviation else ""
    count = rows[0].samples * len(rows)
    few = f", n = {count}" if count != 5 else ""
    return f"{mean(row.perplexity for row in rows):.1f} ({mean(kl):.3f}{spread}{few})"


def differences(rows: list[Row], base: list[Row]) -> list[float]:
    """KL of a cell minus that of another, of the seeds that both have."""
    kl = {row.seed: row.kl for row in base if row.samples == 1}
    return [row.kl - kl[row.seed] for row in rows if row.seed in kl]


def difference_cell(values: Sequence[float]) -> str:
    """The mean and its half interval, in bold if the interval does not contain 0; empty for fewer than 2 samples.

    >>> difference_cell([0.1, 0.3]), difference_cell([0.2, 0.21]), difference_cell([0.2])
    ('+0.200 ± 1.271', '**+0.205 ± 0.064**', '')
    """
    if len(values) < 2:
        return ""
    half = half_interval(values)
    cell = f"{mean(values):+.3f} ± {half:.3f}"
    return f"**{cell}**" if abs(mean(values)) > half else cell


# ------------------------------------------------------------------------------------------------------------ tables


def markdown(title: str, columns: Sequence[tuple[str, str]], lines: dict[str, list[str]]) -> str:
    """A table of lines by their labels; columns: (model, column)."""
    head = [title, *(f"`{model}` {column}" for model, column in columns)]
    rows = [head, ["---"] * len(head), *([label, *cells] for label, cells in lines.items())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def levels(results: Results, tables: Sequence[str], lines: Sequence[str], columns: Sequence[str] = RATES,
           models: Sequence[str] = MODELS) -> str:
    """Perplexity (KL) of these lines in each table, the models side by side."""
    where = [(model, column) for model in models for column in columns]
    found = {line + (f", {table.replace('-', ' and ')}" if len(tables) > 1 and table != "plain" else ""):
             [level_cell(results.get((model, table, line, column), [])) for model, column in where]
             for line in lines for table in tables}
    return markdown("perplexity (KL)" if len(tables) > 1 else f"{tables[0]}: perplexity (KL)", where,
                    {label: cells for label, cells in found.items() if any(cells)})


def gaps(results: Results, table: str, lines: Sequence[str], columns: Sequence[str], model: str) -> str:
    """How far the KL of each line is above that of the first, sample by sample."""
    first, *others = lines

    def cell(line: str, column: str) -> str:
        own, base = (results.get((model, table, label, column), []) for label in (line, first))
        return difference_cell(differences(own, base))
    return markdown(f"KL minus that of {first}", [(model, column) for column in columns],
                    {line: [cell(line, column) for column in columns] for line in others})


TABLES = {  # name in RESULTS.md -> what `levels` takes
    "choice": (("plain", "refitted"), ("random", "reap", "hodgecover")),
    "trained": (("refitted", "refitted-distilled"), ("random", "reap", "hodgecover", "reap, by barriers",
                                                     "narrow, camera", "narrow, camera, 16,384 tokens"), ("50%",)),
    "training": (("training",), ("16,384 tokens", "16,384 tokens, 8 passes", "65,536 tokens", "524,288 tokens",
                                 "layerwise, 524,288 tokens", "next token alone", "router alone"), ("50%",),
                 MODELS[:1]),
    "refit": (("refit",), ("2,048 tokens", "16,384 tokens", "65,536 tokens", "ridge 3.0, 16,384 tokens", "sweeps: 0",
                           "text: source code"), ("50%", "66%"), MODELS[:1]),
    "nested": (("nested",), ("together, 65,536 tokens", "each alone, 65,536 tokens", "each alone, 21,504 tokens"),
               ("0%", *RATES), MODELS[:1]),
    "dense": (("dense",), ("dot", "random", "coactivation", "dot, distilled", "random, distilled",
                           "coactivation, distilled"), ("25%", "50%", "75%"), ("tiny-qwen3",)),
}


def filled(document: str, results: Results) -> str:
    """A document with its tables filled: what stands between `<!-- table NAME -->` and `<!-- end -->`."""
    return re.sub(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)",
                  lambda match: f"{match[1]}{levels(results, *TABLES[match[2]])}\n{match[3]}", document, flags=re.S)


# ---------------------------------------------------------------------------------------------------------- pictures


class Forest(NamedTuple):
    """A forest plot: its lines, what they are compared with, and the tables of both, a panel each."""

    lines: Sequence[str]
    reference: str
    panels: Sequence[tuple[str, str]] = (("plain", "plain"), ("refitted", "refitted"))


MORE = "16,384 tokens"
FRONTIER = ("reap", "hodgecover", "hodgecover, by barriers", "narrow, camera", "wanda")
FORESTS = {
    "selectors": Forest(("hodgecover", "greedy-barrier", "triplet-penalty", "triplet-hypergraph", "hodge-no-triangle",
                         "additive-residual", "weighted-cover", "hope", "man", "msan", "aimer", "frequency", "random"),
                        "reap"),
    "merging": Forest(("mc-smoe", "hc-smoe", "ream", "slimqwen", "stun", *(f"{name}, in all slots" for name in (
        "mc-smoe", "hc-smoe", "ream", "slimqwen"))), "reap"),
    "narrow": Forest(("narrow, camera", "narrow, heapr", "narrow, magnitude", "narrow, random", "both, camera",
                      "both, heapr", *(f"{way}, {MORE}" for way in ("reap", "narrow, camera", "narrow, heapr",
                                                                    "both, camera"))), "reap"),
    "wanda": Forest(tuple(f"{name}, wanda" for name in ("hodgecover", "reap", "random", "stun", "hc-smoe")), "wanda"),
    "budgets": Forest(("hodgecover", "reap, by barriers", "hodgecover, by barriers", "reap, by coverage",
                       "reap, by evo", "rco", "rco, ragged", *(f"{name}, first layer whole" for name in (
                           "reap", "hodgecover", "hope", "random"))), "reap"),
    "redirect": Forest(("hodgecover, fold", "fold, least barrier without its additive part",
                        "fold, nearest router row"), "hodgecover", [("plain", "plain")]),
    "readout": Forest(("hodgecover, 512 tokens", "hodgecover, readout model, 512 tokens"), "reap, 512 tokens"),
    "settings": Forest(("1% critical", "10% critical", "50% critical", "both lambdas 0.04", "both lambdas 25",
                        "lambda of edges 0", "lambda of triangles 0", "order by index"), "hodgecover",
                       [("settings", "plain")])}


def forest(results: Results, name: str) -> Iterator[tuple[str, str, str, str, float, float]]:
    """What a forest plot draws: model, table, line, column, difference in KL, half of its interval."""
    lines, reference, panels = FORESTS[name]
    for model, (table, base), line, column in itertools.product(MODELS, panels, lines, RATES):
        values = differences(results.get((model, table, line, column), []),
                             results.get((model, base, reference, column), []))
        if len(values) > 1:
            yield model, table, line, column, mean(values), half_interval(values)


def frontier(results: Results) -> Iterator[tuple[str, str, str, float, float, float]]:
    """What the frontier draws: model, table, line, share of the expert parameters gone, mean KL and its deviation."""
    for model, table, line, column in itertools.product(MODELS, ("plain", "refitted"), FRONTIER, RATES):
        if len(rows := results.get((model, table, line, column), [])) > 1:
            kl = [row.kl for row in rows]
            yield model, table, line, mean(row.gone for row in rows), mean(kl), stdev(kl)


def pictures(results: Results) -> dict[str, list[tuple]]:
    """What each picture draws, by its name."""
    drawn = {name: list(forest(results, name)) for name in FORESTS} | {"frontier": list(frontier(results))}
    return {name: points for name, points in drawn.items() if points}


def digest(drawn: Sequence[tuple]) -> str:
    """A hash of what a picture draws, which the picture carries."""
    return hashlib.sha256(repr([[f"{cell:.4g}" if isinstance(cell, float) else cell for cell in one]
                                for one in drawn]).encode()).hexdigest()


def draw_forest(pyplot, drawn: list[tuple], name: str):
    """A figure: the models and the tables side by side, a line each, the columns in colours."""
    lines, reference, _ = FORESTS[name]
    panels = list(dict.fromkeys(one[:2] for one in drawn))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(2 + 2.4 * len(panels), 0.9 + 0.25 * len(lines)),
                                   sharex=True, sharey=True, squeeze=False)
    for axis, panel in zip(axes[0], panels):
        for at, (column, colour) in enumerate(zip(RATES, ("tab:blue", "tab:orange", "tab:red"))):
            points = [(value, lines.index(line) + 0.24 * (at - 1), half)
                      for *its, line, own, value, half in drawn if (*its,) == panel and own == column]
            if points:
                x, y, half = zip(*points)
                axis.errorbar(x, y, xerr=half, fmt="o", markersize=3, linewidth=1, color=colour, label=f"{column} gone")
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.set_title(", ".join(panel), fontsize=9)
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set_xticks([-1, -0.1, 0, 0.1, 1], ["-1", "-0.1", "0", "0.1", "1"], fontsize=8)
        axis.grid(axis="y", linewidth=0.3)
    axes[0][0].set_yticks(range(len(lines)), lines, fontsize=8)
    axes[0][0].set_ylim(len(lines) - 0.4, -0.6)
    axes[0][-1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    figure.supxlabel(f"KL from the source minus that of {reference}, nats a token (linear up to 0.1): left of 0 is "
                     "better", fontsize=8)
    figure.tight_layout()
    return figure


def draw_frontier(pyplot, drawn: list[tuple]):
    """A figure: a panel for each model, KL against the share of the expert parameters gone."""
    figure, axes = pyplot.subplots(1, len(MODELS), figsize=(9, 3.6))
    for axis, model in zip(axes, MODELS):
        for (at, line), table in itertools.product(enumerate(FRONTIER), ("plain", "refitted")):
            if points := [one[3:] for one in drawn if one[:3] == (model, table, line)]:
                x, y, deviation = zip(*points)
                style, label = ("o--", line) if table == "plain" else ("o-", f"{line}, {table}")
                axis.errorbar([100 * share for share in x], y, deviation, fmt=style, color=f"C{at}", markersize=3,
                              linewidth=1, capsize=2, label=label)
        axis.set(title=model, xlabel="expert parameters gone, %", yscale="log")
        axis.set_yticks([0.1, 0.2, 0.5, 1, 2], ["0.1", "0.2", "0.5", "1", "2"])
        axis.minorticks_off()
    axes[0].set_ylabel("KL from the source, nats a token")
    axes[1].legend(fontsize=7, bbox_to_anchor=(1.02, 1), loc="upper left")
    return figure


def run(_: argparse.Namespace) -> None:
    """What the command does, after parsing."""
    results, pyplot = read(RESULTS), common.import_pyplot(HERE / "any.png")
    for name, drawn in pictures(results).items():
        data = io.BytesIO()
        figure = draw_frontier(pyplot, drawn) if name == "frontier" else draw_forest(pyplot, drawn, name)
        figure.savefig(data, dpi=100, bbox_inches="tight", metadata={"Source": digest(drawn)})
        model_io.write_whole(HERE / f"{name}.png", data.getvalue())
    model_io.write_whole(DOCUMENT, filled(DOCUMENT.read_text("utf-8"), results).encode())


main = common.main_of(partial(common.parser_of, __file__, __doc__), run)


if __name__ == "__main__":
    sys.exit(main())
