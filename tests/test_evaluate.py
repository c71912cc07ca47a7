# SPDX-License-Identifier: MIT
"""examples/evaluate.py: its numbers against plain ones, its samples, what it refuses."""
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import common
import evaluate
import model_io
import pytest
import torch
from conftest import GOLDEN, PROSE, assert_refused, contents, dropped, named, refuse, run, with_tokenizer
from model_io import Checkpoint, Model
from safetensors.torch import load_file, save_file

ROOM = ["--seq-len", 32, "--max-tokens", 96, "--sample", 0, "--dtype", "float64"]


def evaluated(capsys, source: Path, output: Path, *options: object) -> dict[str, list[str]]:
    """What the command prints: the words that follow each name at the start of a line."""
    text = source.with_name("text.txt")
    assert run(evaluate, source, output, "--text", text, *ROOM, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    return {re.split(r"\s{2,}", line)[0]: re.split(r"\s{2,}", line)[1:] for line in lines}


def plain_numbers(source: Model, output: Model, ids: torch.Tensor) -> tuple[float, float, float, float]:
    """Both perplexities, KL and top-1 agreement, token by token."""
    log_p, log_q = (model.logits(ids).double().log_softmax(-1) for model in (source, output))
    losses, kl, agree = ([], []), [], []
    for b, sequence in enumerate(ids.tolist()):
        for t in range(len(sequence)):
            p, q = log_p[b, t], log_q[b, t]
            kl.append(sum(p.exp() * (p - q)).item())
            agree.append(p.argmax() == q.argmax())
            if t + 1 < len(sequence):
                losses[0].append(-p[sequence[t + 1]])
                losses[1].append(-q[sequence[t + 1]])
    found = [torch.stack(loss).mean().exp().item() for loss in losses]
    return *found, sum(kl) / len(kl), sum(agree).item() / len(agree)


# ------------------------------------------------------------------------------------------------------- its numbers


def test_predictions_are_the_plain_ones_on_evenly_spaced_sequences(small, capsys):
    output = dropped(small, small.with_name("halved"))
    before = contents(small), contents(output)
    said = evaluated(capsys, small, output, "--max-tokens", 127)  # not a fourth sequence
    source = Model(small, torch.float64)
    text = model_io.sequences(source.encode([PROSE]), 32)
    assert len(text) == 53
    ids = text[[0, 17, 35]]
    perplexity, other, kl, top_1 = plain_numbers(source, Model(output, torch.float64), ids)
    assert said["perplexity"] == [f"{perplexity:,.2f}", f"{other:,.2f}"] and kl > 0.01
    assert said["KL(source || output)"] == [f"{kl:.4f}", "nats a token"]
    assert said["top-1 agreement"] == [f"{top_1:.1%}"] and top_1 < 1
    assert said["on 96 tokens of text.txt, in sequences of 32, float64"] == []
    assert (contents(small), contents(output)) == before


def test_routing_is_that_of_the_text(small, capsys):
    """E.5: entropy over log n, and experts without a token; means over the layers of each model, counted one by one."""
    output = dropped(small, small.with_name("halved"))
    said = evaluated(capsys, small, output)
    entropies, dead = [], []
    for model in (Model(small, torch.float64), Model(output, torch.float64)):
        ids = model_io.sequences(model.encode([PROSE]), 32)[[0, 17, 35]]
        n, of_layer, unused = model.config.num_experts, [], 0
        for step in model.stream(ids):
            counts = [(step.gates[:, e] > 0).sum().item() for e in range(n)]
            shares = [count / sum(counts) for count in counts if count]
            of_layer.append(-sum(share * math.log(share) for share in shares) / math.log(n))
            unused += counts.count(0)
        entropies.append(f"{sum(of_layer) / len(of_layer):.3f}")
        dead.append(f"{unused / n / len(of_layer):.1%}")
    assert said["routing entropy"] == entropies and said["dead experts"] == dead
    assert common.routing_of([torch.tensor([4, 0]), torch.tensor([1, 1])]) == (0.5, 0.25)
    assert common.routing_of([]) is None


def test_all_of_the_text_is_the_default(small, capsys):
    assert run(evaluate, small, small, "--text", small.parent / "text.txt", "--seq-len", 32, "--sample", 0) == 0
    assert "on 1,696 tokens" in capsys.readouterr().out


def test_a_family_beside_itself(family, capsys):
    """Every family runs: the same model, size, and words."""
    said = evaluated(capsys, family, family, "--sample", 3)
    assert said["KL(source || output)"][0] == "0.0000" and said["top-1 agreement"] == ["100.0%"]
    megabytes = sum((family / file).stat().st_size for file in Checkpoint(family).metadata) / 1e6
    assert said["weight files, MB"] == [f"{megabytes:.1f}", f"{megabytes:.1f}", "100%"]
    source, output = (next(name for name in said if name.startswith(f"{who}: ")) for who in ("source", "output"))
    assert source.removeprefix("source") == output.removeprefix("output")


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_parameters_are_those_of_the_tensors(path):
    """All of them as they lie in the files; active ones as the layers hold them, k of the experts of each."""
    model = Model(path)
    stored = {name: tensor for file in model.checkpoint.metadata for name, tensor in load_file(path / file).items()}
    active = model.config.vocab_size * model.config.hidden_size + model.config.hidden_size
    active += model.unembedding().numel() if "lm_head.weight" in stored else 0
    for index in range(model.config.num_layers):
        layer = model.layer(index)
        active += sum(weight.numel() for weight in layer.weights.values())
        if layer.experts:
            active += layer.router.numel() + model.config.top_k * sum(part[0].numel() for part in layer.experts)
    assert evaluate.count_parameters(model) == (sum(tensor.numel() for tensor in stored.values()), active)


@pytest.mark.parametrize("name", ["olmoe-plain", "qwen2-renormalised", "qwen3_5-text"])
def test_zeros_in_the_experts_are_shown_if_there_are_some(name, tmp_path, capsys):
    """One by one and fused; a quarter of each routed expert's down projection, half of a shared one's."""
    (tmp_path / "text.txt").write_text(PROSE)
    source = with_tokenizer(named(name), tmp_path / "source")
    output = Path(shutil.copytree(source, tmp_path / "output"))
    assert "zeros in the experts" not in evaluated(capsys, source, output)
    checkpoint, zeroed, total = Checkpoint(output), 0, 0
    for tensor, info in checkpoint.tensors.items():
        if ".mlp.experts." in tensor or re.search(r"\.shared_expert\.", tensor):
            weight = checkpoint.load(tensor)
            total += weight.numel()
            if "down_proj" in tensor:
                weight[..., :weight.shape[-1] // (2 if "shared" in tensor else 4)] = 0
                zeroed += (weight == 0).sum().item()
                common.overwrite(checkpoint, tensor, weight)
    share = zeroed / total
    assert 0.05 < share < 0.15 and evaluate.expert_zeros(Model(output)) == pytest.approx(share)
    said = evaluated(capsys, output, source)["zeros in the experts"]
    assert said == [f"{share:.1%}", f"{evaluate.expert_zeros(Model(source)):.1%}"]


def test_progress_is_shown_for_each_layer(small):
    shown = []
    common.compare(Model(small), Model(small), torch.arange(64).view(2, 32), shown.append)
    assert shown == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("count", [1, 3, 7, 10, 11])
def test_evenly_spaced(count):
    found = common.evenly_spaced(torch.arange(10)[:, None], count).flatten()
    gaps = found.diff()
    assert found[0] == 0 and len(found) == min(count, 10) and (gaps > 0).all()
    assert len(found) < 2 or gaps.max() - gaps.min() <= 1 and 10 - found[-1] - gaps.max() in (0, 1)


# -------------------------------------------------------------------------------------------------------- its samples


def with_head(path: Path, factor: float) -> Model:
    """The checkpoint with its head times a factor."""
    checkpoint = Checkpoint(path)
    common.overwrite(checkpoint, "lm_head.weight", checkpoint.load("lm_head.weight") * factor)
    return Model(path, torch.float64)


def test_a_sharp_model_continues_with_its_most_likely_tokens(small):
    """Each token sees the prompt and all that was drawn; the end-of-text token ends the text, and is not part of it."""
    model = with_head(small, 1e6)
    prompt = model.encode(["All work and no play"])[:16]
    ids = prompt.tolist()
    for _ in range(6):
        ids.append(model.logits(torch.tensor([ids]))[0, -1].argmax().item())
    greedy, ticks = ids[16:], []
    assert len({*greedy}) > 2
    assert evaluate.sample(model, prompt, 6, 0, ticks.append) == greedy and ticks == [(i + 1) / 6 for i in range(6)]
    last = max(range(6), key=lambda i: greedy.index(greedy[i]))
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"eos_token_id": greedy[last]}))
    assert evaluate.sample(Model(small, torch.float64), prompt, 6, 0) == greedy[:greedy.index(greedy[last])]


def test_samples_follow_the_model_at_temperature_1(small):
    """The mean log-probability of 100 draws is the negative entropy, within four standard errors."""
    model = with_head(small, 2)
    model.config = dataclasses.replace(model.config, eos_token_id=None)
    prompt = torch.arange(16)
    log_p = model.logits(prompt[None])[0, -1].double().log_softmax(-1)
    mean = (log_p.exp() * log_p).sum()
    deviation = (log_p.exp() * (log_p - mean).square()).sum().sqrt()
    drawn = torch.tensor([evaluate.sample(model, prompt, 1, seed) for seed in range(100)]).flatten()
    assert abs(log_p[drawn].mean() - mean) < 4 * deviation / 10 < 1
    assert len(drawn.unique()) > 10


def test_what_is_said_depends_on_the_seed_alone(small, capsys):
    output, said = dropped(small, small.with_name("halved")), []
    for seed in (0, 0, 1):
        assert run(evaluate, small, output, "--text", small.parent / "text.txt", *ROOM, "--sample", 8, "--seed",
                   seed) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "prompt: 'All work and no '" in said[0]
    speech = [text.split("source: ")[1] for text in said]
    assert speech[0] != speech[2] and "output: '" in speech[0]
    assert said[0].split("prompt")[0] == said[2].split("prompt")[0]


# -------------------------------------------------------------------------------------------------- what it refuses


def other_vocabulary(path: Path) -> None:
    """One token fewer than the source."""
    tensors = load_file(path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 1}))


def other_tokenizer(path: Path) -> None:
    """The same, written with one more blank."""
    (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text() + " ")


@pytest.mark.parametrize("change, options, says", [
    (other_vocabulary, [], "copy: its vocabulary has 95 tokens, the source's 96"),
    (other_tokenizer, [], "copy/tokenizer.json: differs from the source's"),
    (lambda path: (path / "tokenizer.json").unlink(), [], "copy/tokenizer.json: missing"),
    (lambda path: (path.parent / "text.txt").write_text("short"), [], "6 tokens, too few for one sequence of"),
    (lambda path: (path.parent / "text.txt").unlink(), [], "text.txt"),
    (lambda path: (path / "model.safetensors").unlink(), [], "copy: no weights"),
    (None, ["--max-tokens", 31], "--max-tokens 31: must be at least seq_len (32)"),
    (None, ["--seq-len", 1], "--seq-len 1: must be"),
    (None, ["--sample", -1], "--sample -1: must be from 0"), (None, ["--seed", -1], "--seed -1: must be from 0"),
    (None, ["--memory", "1GB"], "unrecognized arguments: --memory"), (None, ["--calib", "x"], "unrecognized arguments"),
])
def test_wrong_input_gets_one_line_before_the_work(small, capsys, monkeypatch, change, options, says):
    copy = Path(shutil.copytree(small, small.with_name("copy")))
    if change:
        change(copy)
    monkeypatch.setattr(Model, "stream", refuse)
    status = run(evaluate, small, copy, "--text", small.parent / "text.txt", *ROOM, *options)
    assert_refused(capsys, status, says)
