# SPDX-License-Identifier: MIT
"""Outputs of every command that writes a checkpoint, in each installed loader: how far its logits are from ours.

    python tests/loaders.py                        all models, 10 minutes; or their names: tiny-olmoe qwen3_next

By hand. It wants transformers; llama-cpp-python, mlx-lm, lm_eval, trl with peft are tried if they are there, the first
with PYTHONPATH=DIR:DIR/gguf-py, DIR llama.cpp's sources, which have the converter. A cell of the table is the largest
difference over the models, in float32, of logits, of lm_eval in nats a token. transformers: no tensor missing, left
over or of another shape; 8 tokens with the cache of keys and values; saved there, loaded again there and here. trl: as
it comes, and after a step of LoRA: merged, saved, loaded again there and here. Where layers differ (budgets), a stock
class, llama.cpp and mlx-lm must fail: `refused`. `-`: not there, or it fails or differs on every source itself: a line
says so. Status 1 if a loader fails on an output, or differs by over TOLERANCE.
"""
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HOME = tempfile.TemporaryDirectory()  # of the modeling files that transformers copies
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": HOME.name, "TOKENIZERS_PARALLELISM": "false"}

import conftest  # noqa: E402  (the environment is set above; it sets the path)
import torch  # noqa: E402
from model_io import Model  # noqa: E402

try:
    import transformers
except ImportError:
    sys.exit("loaders.py needs transformers: pip install transformers")

Pairs = Iterator[tuple[torch.Tensor, torch.Tensor]]
TOLERANCE = 1e-3  # of logits of size 1 to 10
TEXT = "What every loader computes of it, we compute, too."
PLAIN = {"qwen2_moe": "qwen2-dense-between", "qwen3_next": "qwen3_next-tied-mtp"} | (
    {"qwen3_5_moe": "qwen3_5-vision-mtp"} if hasattr(transformers, "Qwen3_5MoeConfig") else {})  # not in version 4
EASY = {"mlp_only_layers": [], "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "rms_norm_eps": 1e-6, "mtp_num_hidden_layers": 0}
MODELS = ["tiny-olmoe", "tiny-qwen3-moe", *PLAIN, "qwen2-dense-between", "qwen3-plain-tied", "qwen3_next-tied-mtp",
          "qwen3_vl-published", "qwen3_5-vision-mtp", "fp8-olmoe", "dense-qwen3"]
RUNS = {"hodgecover": "SOURCE --keep KEEP TEXT", "plan": "SOURCE --keep KEEP --plan-only TEXT",
        "export_plan": "SOURCE PLAN", "budgets barriers": "SOURCE barriers --keep MORE --plan PLAN",
        **{f"baselines {method}": f"SOURCE --keep KEEP TEXT --method {method}" for method in (
            "reap", "hope", "mc-smoe", "hc-smoe", "ream", "slimqwen", "stun", "ream --all-slots")},
        "budgets rco": "SOURCE rco --keep KEEP TEXT --steps 2", "wanda": "SOURCE --rate 0.5 TEXT",
        "heapr": "SOURCE --width WIDTH TEXT", "nested": "SOURCE TEXT", "nested slice": "NESTED --slice KEEP,WIDTH",
        "refit": "SOURCE HODGECOVER TEXT", "distil": "SOURCE HEAPR TEXT"}
DENSE_RUNS = {"dot_moe": "SOURCE --experts 3 --top-k 2 TEXT", "distil dot_moe": "SOURCE DOT_MOE TEXT"}


def prepared(name: str, work: Path) -> Path:
    """A source, with a tokenizer: a tiny checkpoint, a golden one, or a random one of a golden one's family without
    options that not every loader knows. Keys of published configurations lie beside those of transformers 5."""
    if name.startswith("tiny"):
        return Path(shutil.copytree(conftest.ROOT / "examples" / name, work / name))
    source = conftest.named(PLAIN.get(name, name))
    if name in PLAIN:
        config, source = transformers.AutoConfig.from_pretrained(source), work / "plain"
        text = config.get_text_config()
        text.update({key: value for key, value in EASY.items() if hasattr(text, key)})
        torch.manual_seed(0)
        model = getattr(transformers, config.architectures[0])(config)
        for weight in model.parameters():
            weight.data = torch.randn_like(weight) * 0.16 + weight.data * (weight.dim() == 1)
        model.save_pretrained(source, **({"save_original_format": False} if "3_5" in name else {}))  # fused experts
    path = conftest.with_tokenizer(source, work / name)
    config = json.loads((path / "config.json").read_text())
    text = config.get("text_config", config)
    rope, linear = text.get("rope_parameters", {}), "linear_attention" in text.get("layer_types", [])
    text |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    text |= {"num_experts": text.pop("num_local_experts")} if "num_local_experts" in text else {}
    text |= {"rope_scaling": rope, "norm_topk_prob": True} if "vl" in name else {}
    text |= {"full_attention_interval": text["layer_types"].index("full_attention") + 1} if linear else {}
    (path / "config.json").write_text(json.dumps(config))
    return path


def outputs(source: Path, work: Path) -> dict[str, Path]:
    """The source, and what the commands made of it, by the command."""
    config, sparse = Model(source).config, any(each.sparse for each in Model(source).layer_configs)
    keep, width = max(config.num_experts // 2, config.top_k), config.expert_width // 2
    words = {"KEEP": keep, "MORE": keep + 1, "KEEP,WIDTH": f"{keep},{width}", "WIDTH": width, "SOURCE": source}
    text = f"--tokens 256 --seq-len {128 if source.name.startswith('tiny') else 32} --dtype float32"
    found = {"source": source}
    for row, arguments in (RUNS if sparse else DENSE_RUNS).items():
        words[row.upper()] = found[row] = work / row.replace(" ", "-")
        command = importlib.import_module("hodgecover" if row == "plan" else row.split()[0])
        given = [words.get(word, word) for word in arguments.replace("TEXT", text).split()]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            status = conftest.run(command, *given, "--out", found[row])
        assert status == 0, f"{row} of {source}: {said.getvalue()}"
    return {row: path for row, path in found.items() if row != "plan"}


# ----------------------------- loaders: (checkpoint, ids (B, L), our logits, scratch) -> pairs that should be equal


def ragged(path: Path) -> bool:
    """Whether layers differ."""
    return "per_layer_config" in (path / "config.json").read_text()


def load(path: Path, trust: bool = True) -> torch.nn.Module:
    composite = "text_config" in json.loads((path / "config.json").read_text())
    auto = transformers.AutoModelForImageTextToText if composite else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(path, dtype="auto", output_loading_info=True, trust_remote_code=trust)
    assert not any(info.values()), info
    return model.float().eval()


def tokenizer_of(path: Path) -> "transformers.PreTrainedTokenizerFast":
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def saved(model: torch.nn.Module, ids: torch.Tensor, scratch: Path) -> Pairs:
    model.save_pretrained(scratch)
    yield load(scratch)(ids).logits, (own := model.eval()(ids).logits)
    yield Model(scratch, torch.float32).logits(ids), own


def of_transformers(path: Path, ids: torch.Tensor, want: torch.Tensor, scratch: Path) -> Pairs:
    with contextlib.suppress(RuntimeError) if ragged(path) else contextlib.nullcontext():
        load(path, trust=False)
        assert not ragged(path), "the stock class takes layers that differ"
    model, begin = load(path), ids[:, :9]
    yield model(ids).logits, want
    out = model.generate(begin, attention_mask=torch.ones_like(begin), max_new_tokens=8, min_new_tokens=8,
                         do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0)
    yield torch.stack(out.logits, 1), Model(path, torch.float32).logits(out.sequences)[:, 8:-1]
    yield from saved(model, ids, scratch)


def of_trl(path: Path, ids: torch.Tensor, want: torch.Tensor, scratch: Path) -> Pairs:
    import datasets
    import peft
    import trl
    config = trl.SFTConfig(scratch / "run", max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
                           bf16=False, save_strategy="no", learning_rate=0.1, disable_tqdm=True,  # the auxiliary loss
                           router_aux_loss_coef=0.0 if ragged(path) else None)  # wants as many experts in each layer
    with torch.enable_grad(), contextlib.redirect_stdout(io.StringIO()):
        trainer = trl.SFTTrainer(
            load(path), config, train_dataset=datasets.Dataset.from_dict({"input_ids": ids.tolist()}),
            processing_class=tokenizer_of(path), peft_config=peft.LoraConfig(target_modules=["q_proj", "o_proj"]))
        yield trainer.model.eval()(ids).logits.detach(), want
        trainer.train()
    merged = trainer.model.merge_and_unload()
    assert (merged.eval()(ids).logits - want).abs().max() > TOLERANCE, "the step has changed nothing"
    yield from saved(merged, ids, scratch / "saved")


def of_lm_eval(path: Path, ids: torch.Tensor, want: torch.Tensor, scratch: Path) -> Pairs:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    tokenizer, request = tokenizer_of(path), Instance("loglikelihood_rolling", {}, (TEXT,), 0)
    theirs, = HFLM(load(path), tokenizer=tokenizer, device="cpu").loglikelihood_rolling([request], disable_tqdm=True)
    text = torch.tensor([[tokenizer.eos_token_id, *tokenizer.encode(TEXT)]])
    log_p = Model(path, torch.float32).logits(text).double().log_softmax(-1)[0, :-1].gather(1, text[0, 1:, None])
    yield torch.tensor(theirs / len(log_p)), log_p.mean()


def of_mlx(path: Path, ids: torch.Tensor, want: torch.Tensor, scratch: Path) -> Pairs:
    import mlx.core as mx
    from mlx_lm.utils import load_model
    model, _ = load_model(path)
    model.set_dtype(mx.float32)
    yield torch.tensor(model(mx.array(ids.tolist())).tolist()), want


def of_llama(path: Path, ids: torch.Tensor, want: torch.Tensor, scratch: Path) -> Pairs:
    import conversion
    import llama_cpp
    raw, file = conversion.ModelBase.load_hparams(path, False), scratch / "model.gguf"
    kind = conversion.get_model_class(conversion.get_model_architecture(raw, conversion.ModelType.TEXT))
    kind.no_mtp = True
    kind.set_vocab = lambda self: (self._set_vocab_none(), self.gguf_writer.add_vocab_size(want.shape[-1]))
    kind(path, conversion.base.gguf.LlamaFileType.ALL_F32, file).write()
    model = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0)  # 0: float32
    for row, logits in zip(ids.tolist(), want):
        model.reset()
        model.eval(row)
        yield torch.tensor(model.scores[:len(row)]), logits


# --------------------------------------------------------------------------------------------------------- the table


LOADERS = {  # distribution -> its modules, what tries it
    "transformers": (["transformers"], of_transformers), "llama-cpp-python": (["llama_cpp", "conversion"], of_llama),
    "mlx-lm": (["mlx_lm"], of_mlx), "lm_eval": (["lm_eval"], of_lm_eval), "trl": (["trl", "peft"], of_trl)}


def tried(loader: str, path: Path) -> tuple[float, str]:
    """The difference of a loader on a checkpoint, infinite for an error; what to say of it."""
    model = Model(path, torch.float32)
    ids = torch.randint(1, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        try:
            pairs = LOADERS[loader][1](path, ids, model.logits(ids), Path(scratch))
            found = torch.stack([(theirs.double() - ours.double()).abs().max() for theirs, ours in pairs]).max().item()
            return found, f"{found:.0e}"
        except Exception as err:  # whatever a stranger's code raises is a finding
            return float("inf"), f"{type(err).__name__}: {' '.join(str(err).split())[:120]}"


def try_all(model: str, able: list[str], table: dict[tuple[str, str], str]) -> None:
    """Try the loaders on a source, those that take it on its outputs, and note the worst in the table."""
    with tempfile.TemporaryDirectory() as work:
        for row, path in outputs(prepared(model, Path(work)), Path(work)).items():
            for loader in [*able]:
                found, says = tried(loader, path)
                if not found <= TOLERANCE and row == "source":  # it may be NaN
                    able.remove(loader)
                    print(f"{loader} does not take {model} itself: {says}", flush=True)
                elif found == float("inf") and ragged(path) and loader in ("llama-cpp-python", "mlx-lm"):
                    table[row, loader] = "refused"
                elif not found <= TOLERANCE:
                    table[row, loader] = "FAILS"
                    print(f"{loader} FAILS on {row} of {model}: {says}", flush=True)
                elif (before := table.get((row, loader), says)) not in ("refused", "FAILS"):
                    table[row, loader] = max(before, says, key=float)


def main() -> int:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    there = [name for name, (modules, _) in LOADERS.items() if all(map(importlib.util.find_spec, modules))]
    for name in ("torch", *LOADERS, "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            print(name, importlib.metadata.version(name), end=", ")
    print("not tried:", ", ".join(name for name in LOADERS if name not in there) or "none", flush=True)
    table: dict[tuple[str, str], str] = {}
    for model in sys.argv[1:] or MODELS:
        try_all(model, [*there], table)
    for row in ("", *dict.fromkeys(row for row, _ in table)):
        cells = [table.get((row, loader), "-") if row else loader for loader in LOADERS]
        print(f"{row:27}" + "".join(f"{cell:>17}" for cell in cells))
    return int("FAILS" in table.values())


if __name__ == "__main__":
    sys.exit(main())
