# SPDX-License-Identifier: MIT
"""examples/random_checkpoint.py and examples/train_tiny.py: the checkpoints that they make."""
import json
import math
import re

import model_io
import pytest
import random_checkpoint
import torch
import train_tiny
from conftest import DENSE, PROSE, ROOT, assert_refused, contents, refuse, run
from model_io import Checkpoint, Model
from safetensors.torch import load_file

SMALL = dict(vocab_size=2048, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, num_experts=8, num_experts_per_tok=2)
WIDTHS = {"olmoe-1b-7b": dict(intermediate_size=12, num_key_value_heads=4, head_dim=8),
          "qwen3-30b-a3b": dict(moe_intermediate_size=12),
          "qwen3.5-35b-a3b": dict(moe_intermediate_size=12, shared_expert_intermediate_size=12, linear_num_key_heads=2,
                                  linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)}


# ---------------------------------------------------------------------------------------------- random_checkpoint.py


@pytest.fixture(params=WIDTHS)
def shape(request, monkeypatch) -> str:
    """A shape's name, its sizes made small, its shards too."""
    name = request.param
    monkeypatch.setitem(random_checkpoint.SHAPES, name, random_checkpoint.SHAPES[name] | SMALL | WIDTHS[name])
    monkeypatch.setattr(random_checkpoint, "SHARD_BYTES", 150_000)
    return name


def test_a_random_checkpoint_runs(shape, tmp_path, capsys):
    """The same one each time; its logits have the deviation that it states."""
    for name in ("a", "b"):
        assert run(random_checkpoint, shape, tmp_path / name) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    model = Model(tmp_path / "a")
    logits = model.logits(model.encode([PROSE])[None, :256])
    assert logits.std().item() == pytest.approx(random_checkpoint.LOGIT_DEVIATION, rel=0.1)
    shards = [load_file(tmp_path / "a" / file) for file in sorted(model.checkpoint.metadata)]
    stored = {name: tensor for shard in shards for name, tensor in shard.items()}
    parameters = sum(tensor.numel() for tensor in stored.values())
    assert f"{parameters / 1e9:.2f}e9 parameters" in capsys.readouterr().out
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    index = json.loads((tmp_path / "a" / model_io.INDEX).read_text())
    assert index["metadata"]["total_size"] == 2 * parameters and index["weight_map"].keys() == stored.keys()
    for index in range(4):
        norms = [weight for name, weight in model.layer(index).weights.items() if name.endswith("norm.weight")]
        assert len(norms) >= 3 and all((weight == 1).all() for weight in norms)
    assert len(shards) > 2
    for shard in shards:
        assert len(shard) == 1 or 2 * sum(tensor.numel() for tensor in shard.values()) <= 150_000


def test_a_shard_that_is_full_is_followed_by_another(monkeypatch):
    """Each tensor counts, the first of a shard too; one that is too large has a shard of its own."""
    monkeypatch.setattr(random_checkpoint, "SHARD_BYTES", 100)
    shapes = {"a": [20], "b": [2, 15], "c": [40], "d": [20], "e": [2, 50], "f": [1]}
    assert [[*shard] for shard in random_checkpoint.into_shards(shapes)] == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]


def test_a_hollow_checkpoint_has_the_same_shapes_and_no_numbers(shape, tmp_path):
    assert run(random_checkpoint, shape, tmp_path / "hollow", "--hollow") == 0
    assert run(random_checkpoint, shape, tmp_path / "full") == 0
    hollow, full = Model(tmp_path / "hollow").checkpoint, Checkpoint(tmp_path / "full")
    assert hollow.tensors == full.tensors
    assert not any(hollow.load(name).any() for name in hollow.tensors)
    for file in hollow.metadata:
        assert (tmp_path / "hollow" / file).stat().st_size == (tmp_path / "full" / file).stat().st_size


@pytest.mark.parametrize("name, parameters", [("olmoe-1b-7b", 6_919_161_856), ("qwen3-30b-a3b", 30_532_122_624)])
def test_the_shapes_are_the_published_ones(name, parameters):
    shapes = random_checkpoint.tensor_shapes(random_checkpoint.SHAPES[name])
    assert sum(map(math.prod, shapes.values())) == parameters


@pytest.mark.parametrize("arguments, says", [
    (["gpt", "new"], "invalid choice: 'gpt'"), (["olmoe-1b-7b", "used"], "exists and is not an empty folder"),
    (["olmoe-1b-7b"], "required: DIR"), (["olmoe-1b-7b", "new", "--seed", "1"], "unrecognized arguments"),
])
def test_a_random_checkpoint_that_cannot_be_made_gets_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(random_checkpoint, "write_shard", refuse)
    assert_refused(capsys, run(random_checkpoint, *arguments), says)
    assert [file.name for file in tmp_path.rglob("*")] == ["used", "file"]


# ------------------------------------------------------------------------------------------------ train_tiny.py


TEXT = {"train": (PROSE * 3, "A second document. " * 60), "held-out": (PROSE * 2,), "calibration": (PROSE[::-1],)}


@pytest.fixture(params=train_tiny.CONFIGS)
def kind(request, monkeypatch) -> str:
    """A kind's name, its model made smaller, on less text."""
    name = request.param
    monkeypatch.setitem(train_tiny.CONFIGS, name, train_tiny.CONFIGS[name] | {
        "hidden_size": 24, "num_experts": 8, "num_experts_per_tok": 3, "num_hidden_layers": 2, "vocab_size": 300})
    monkeypatch.setitem(train_tiny.TEXTS, name, TEXT.get)
    return name


def test_training_runs_the_model_that_is_written(kind, tmp_path):
    """The dense way to the experts' sum gives the logits of model_io; the balance is what its docstring says."""
    config = train_tiny.CONFIGS[kind]
    cfg = model_io.read_config(config)
    torch.manual_seed(1)
    weights = {name: weight.detach().bfloat16().float()
               for name, weight in train_tiny.initial_weights(cfg).items()}
    train_tiny.save(weights, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, ids = Model(tmp_path), torch.randint(300, (2, 20))
    logits, balance = train_tiny.forward(ids, weights, cfg)
    torch.testing.assert_close(logits, model.logits(ids), rtol=1e-4, atol=1e-5)
    by_hand = torch.zeros(())
    for step in model.stream(ids):
        for e in range(cfg.num_experts):
            p = (step.x @ step.layer.router.T).softmax(-1)
            by_hand += 8 * (step.gates[:, e] > 0).float().mean() * p[:, e].mean() / 2
    assert balance.item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_training_learns(kind):
    """More than the frequencies of the tokens, in 60 short steps; the experts share the work."""
    config = train_tiny.CONFIGS[kind]
    cfg = model_io.read_config(config)
    torch.manual_seed(2)
    ids = torch.arange(2000) * 7 % 40
    weights = train_tiny.train(ids, cfg, 60, batch=2, seq_len=16, peak=0.08)
    logits, balance = train_tiny.forward(ids[None, :64], weights, cfg)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:64]).item()
    assert math.exp(loss) < 4 < 35 < train_tiny.unigram_perplexity(ids, ids[:64], cfg.vocab_size)
    assert 3 <= balance < 3.1 or not cfg.num_experts
    assert not any(weight.requires_grad for weight in weights.values())


def test_training_writes_a_whole_checkpoint(kind, tmp_path, monkeypatch, capsys):
    """What was trained, the same each time; in the layout of the checkpoint that the repository carries."""
    train, trained = train_tiny.train, []
    monkeypatch.setattr(train_tiny, "train", lambda *given: trained.append(train(*given)) or trained[-1])
    for name in ("a", "b"):
        assert run(train_tiny, kind, tmp_path / name, "--steps", 1) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]
    said = capsys.readouterr()
    found, unigram = (float(part.split()[-1]) for part in said.out.splitlines()[0].split(", of "))
    ids = model_io.sequences(Model(tmp_path / "a").encode([PROSE * 2]), train_tiny.SEQ_LEN)
    assert Model(tmp_path / "a").perplexity(ids) == pytest.approx(found, abs=0.06)
    assert unigram < 100  # of 300 tokens
    assert "step     0/1" in said.err

    embedding = trained[0]["model.embed_tokens.weight"].bfloat16()
    assert torch.equal(Checkpoint(tmp_path / "a").load("model.embed_tokens.weight"), embedding)
    layout = ROOT / "examples" / f"tiny-{kind.replace('_', '-')}"  # the repository carries no dense one
    ours, published = Model(tmp_path / "a"), Model(layout if kind != "qwen3" else DENSE[0])
    left_out = re.compile(r"layers\.[234]\.|experts\.([89]|\d\d)\.")  # more layers and experts than `little` has
    assert {*ours.checkpoint.tensors} == {name for name in published.checkpoint.tensors if not left_out.search(name)}
    assert {file.name for file in ours.checkpoint.path.iterdir()} == {
        file.name for file in (ROOT / "examples" / "tiny-olmoe").iterdir()}
    ids = ours.encode(["All work"]).tolist()
    assert ours.use_tokenizer(lambda tokenizer: tokenizer.decode(ids)) == "All work"


def test_a_unigram_model_knows_frequencies_alone():
    counts = [3 + 1, 1 + 1, 0 + 1, 0 + 1]
    by_hand = math.exp(-sum(math.log(counts[token] / 8) for token in (0, 1, 2)) / 3)
    train_ids, ids = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 2])
    assert train_tiny.unigram_perplexity(train_ids, ids, 4) == pytest.approx(by_hand)


@pytest.mark.parametrize("part", ["held-out", "calibration"])
def test_the_text_of_a_part_is_written_whole(kind, part, tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny, "train", refuse)
    assert run(train_tiny, kind, f"--{part}", tmp_path / "text.txt") == 0
    assert contents(tmp_path) == {"text.txt": TEXT[part][0].encode()}


@pytest.mark.parametrize("arguments, says", [
    (["olmoe"], "one of the arguments DIR --held-out --calibration is required"), (["gpt", "new"], "invalid choice"),
    (["olmoe", "new", "--held-out", "text"], "not allowed with"),
    (["olmoe", "--held-out", "text", "--steps", 5], "--steps: does not go with --held-out"),
    (["olmoe", "--calibration", "text", "--steps", 5], "--steps: does not go with --calibration"),
    (["olmoe", "new", "--steps", 0], "--steps 0: must be from 1"),
    (["olmoe", "used"], "used: exists and is not an empty folder"),
    (["olmoe", "--held-out", "used/file"], "used/file: exists"), (["olmoe", "--held-out", ""], ".: exists"),
    (["olmoe", "--calibration", "nowhere/text"], "nowhere/text: must name a new file in an existing folder"),
])
def test_training_that_cannot_be_done_gets_one_line(tmp_path, monkeypatch, capsys, arguments, says):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(train_tiny.TEXTS, "olmoe", refuse)
    assert_refused(capsys, run(train_tiny, *arguments), says)
    assert [file.name for file in tmp_path.rglob("*")] == ["used", "file"]


def test_training_that_fails_leaves_nothing(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny, "train", refuse)
    with pytest.raises(AssertionError):
        run(train_tiny, kind, tmp_path / "out")
    assert not list(tmp_path.iterdir())
