"""Hugging Face folders from checkpoints and back, against transformers' own models of the same weights."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from megalowrank.checkpoint.hf import convert
from megalowrank.checkpoint.hf.config import read_config
from megalowrank.checkpoint.hf.convert import Export, from_hf, to_hf
from megalowrank.checkpoint.hf.names import Stored, logical_shapes
from megalowrank.checkpoint.plain import load_plain
from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.errors import ConfigError, TrainingError
from megalowrank.parallel.groups import initialize_single_process
from tests.checkpoint.saved_models import CONFIGS, LENGTH, WORDS, save_model, tokens
from tests.models.hugging_face import hugging_face


@pytest.fixture(scope="module", autouse=True)
def one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(str(Path(folder) / "store"))


def quiet(line: str) -> None:
    """Nobody reads the reports here."""


@torch.no_grad()
def foreign(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens()).logits


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


# ---------------------------------------------------------------- out and back


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_family_goes_out_and_comes_back(name: str, tmp_path: Path) -> None:
    """The same logits as transformers' model of the same weights; the same tensors back; the same files again."""
    model = save_model(CONFIGS[name], "switchlora", tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "hf", Export(), quiet)
    expected = hugging_face(CONFIGS[name], model, torch.float32)(tokens()).logits
    assert expected.std() > 0.5, "there must be something to compare"
    assert (foreign(tmp_path / "hf") - expected).abs().max() < 1e-4
    from_hf(tmp_path / "hf", tmp_path / "back", None, quiet)
    before, after = SavedWeights.open(tmp_path / "run"), SavedWeights.open(tmp_path / "back")
    shapes = logical_shapes(CONFIGS[name])
    assert shapes == {t.name: t.shape for t in model.tensors if not t.is_factor} and after.names == shapes.keys()
    for key, shape in shapes.items():
        assert torch.equal(before.read(key, shape), after.read(key, shape)), key
    assert after.run["method"] == "full" and after.checkpoint.step == 0
    assert after.model_config() == replace(before.model_config(), init_method_std=0.15)
    to_hf(tmp_path / "back", tmp_path / "again", Export(), quiet)
    assert files(tmp_path / "again") == files(tmp_path / "hf")


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora", "relora", "switchlora", "galore"])
@torch.no_grad()
def test_every_method_is_merged_in_float32(method: str, low: bool, tmp_path: Path) -> None:
    """In bfloat16 the frozen W counts with its residual: without it the difference is a thousand times larger."""
    config = CONFIGS["llama, tied, grouped"]
    model = save_model(config, method, tmp_path / "run", low)
    difference = to_hf(tmp_path / "run", tmp_path / "hf", Export(), quiet)
    expected = hugging_face(config, model, torch.float32)(tokens()).logits
    assert (foreign(tmp_path / "hf") - expected).abs().max() < 1e-4 and difference < 1e-4
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"| method | {method} |" in card and "| tokens | 588 |" in card
    assert ("| rank |" in card) == (method != "full")


@torch.no_grad()
def test_files_are_cut_where_they_are_large(tmp_path: Path) -> None:
    save_model(CONFIGS["neox"], "lora", tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "whole", Export(), quiet)
    to_hf(tmp_path / "run", tmp_path / "cut", Export(max_shard_size="40KB"), quiet)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    parts = sorted(set(index["weight_map"].values()))
    assert len(parts) > 3 and not (tmp_path / "cut" / "model.safetensors").exists()
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    found = {key: value for part in parts for key, value in load_file(tmp_path / "cut" / part).items()}
    assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)
    assert torch.equal(foreign(tmp_path / "cut"), foreign(tmp_path / "whole"))
    from_hf(tmp_path / "cut", tmp_path / "back", None, quiet)
    with pytest.raises(ConfigError, match="--max-shard-size is malformed"):
        to_hf(tmp_path / "run", tmp_path / "bad", Export(max_shard_size="big"), quiet)


def test_bfloat16_rounds_once_after_merging(tmp_path: Path) -> None:
    save_model(CONFIGS["gpt2"], "lora", tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "low", Export(dtype="bfloat16"), quiet)
    to_hf(tmp_path / "run", tmp_path / "high", Export(), quiet)
    low, high = (load_file(tmp_path / name / "model.safetensors") for name in ("low", "high"))
    assert all(torch.equal(low[key], high[key].bfloat16()) for key in high)
    assert json.loads((tmp_path / "low" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_files_around_the_weights(tmp_path: Path) -> None:
    save_model(CONFIGS["gpt2, not tied"], "full", tmp_path / "run")
    lines = [{"step": 6, "loss": 3.5}, {"step": 7, "loss": 3.25}, {"step": 7, "eval_loss": 3.4}, {"step": 8, "loss": 9}]
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{cut")
    to_hf(tmp_path / "run", tmp_path / "hf", Export(), quiet)
    card = (tmp_path / "hf" / "README.md").read_text()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "| training loss, nats per token | 3.25 |" in card and "| held-out loss, nats per token | 3.4 |" in card
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["tie_word_embeddings"] is False
    assert config["attn_pdrop"] == 0.0 and config["n_positions"] == LENGTH
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id is None
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


# ---------------------------------------------------------------- models of others


def llama(**more: Any) -> Any:
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6}
    heads = {"num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=WORDS, initializer_range=0.2, **more))


def gpt2(**more: Any) -> Any:
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 32, "vocab_size": WORDS}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, **more))


def neox(**more: Any) -> Any:
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=WORDS, initializer_range=0.2, **more))


def opt(**more: Any) -> Any:
    sizes = {"hidden_size": 48, "ffn_dim": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    return OPTForCausalLM(OPTConfig(**sizes, vocab_size=WORDS, max_position_embeddings=32, init_std=0.2, **more))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def as_published_gpt2(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the prefix, and with the masks that old versions saved."""
    found = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    return {**found, "h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.1.attn.masked_bias": torch.tensor(-1e4)}


def as_published_pythia(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool)
    found = {**tensors, "gpt_neox.layers.0.attention.bias": mask}
    return {**found, "gpt_neox.layers.1.attention.rotary_emb.inv_freq": torch.ones(2)}


def as_published_opt(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("model."): value for key, value in tensors.items()}


def with_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


THEIRS: dict[str, tuple[Callable[[], Any], Callable[..., Any] | None]] = {
    "llama": (lambda: llama(rms_norm_eps=1e-4, rope_parameters={"rope_type": "default", "rope_theta": 777.0}), None),
    "llama, tied, with its head in the file": (lambda: llama(tie_word_embeddings=True), with_head),
    "llama in half precision": (lambda: llama().half(), None),
    "gpt2": (gpt2, None),
    "gpt2 as published": (lambda: gpt2(n_inner=40, tie_word_embeddings=True), as_published_gpt2),
    "neox": (lambda: neox(layer_norm_eps=1e-3), None),
    "pythia as published": (lambda: neox(), as_published_pythia),
    "opt": (lambda: opt(tie_word_embeddings=False), None),
    "opt as published": (opt, as_published_opt),
}


@pytest.mark.parametrize("name", THEIRS)
@torch.no_grad()
def test_models_of_others_come_in(name: str, tmp_path: Path) -> None:
    """Norms and biases are drawn too, so that none can be lost."""
    make, change = THEIRS[name]
    torch.manual_seed(1)
    model = make()
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    model.save_pretrained(tmp_path / "hf")
    if change:
        rewrite(tmp_path / "hf", change)
    if "pythia" in name:
        path = tmp_path / "hf" / "config.json"
        raw = json.loads(path.read_text())
        raw.pop("rope_parameters")
        path.write_text(json.dumps({**raw, "rotary_pct": 0.25, "rotary_emb_base": 300}))
    expected = foreign(tmp_path / "hf")
    difference = from_hf(tmp_path / "hf", tmp_path / "ours", None, quiet)
    found = load_plain(SavedWeights.open(tmp_path / "ours")).module.logits(tokens()).transpose(0, 1)
    assert expected.std() > 0.5 and (found - expected).abs().max() < 2e-4 and difference < 2e-4
    settings = json.loads((tmp_path / "ours" / "model.json").read_text())["model"]
    assert settings["num_layers"] == 2 and settings["vocab_size"] == WORDS


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "rope_scaling": (llama, {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
                     "rope_scaling"),
    "attention_bias": (llama, {"attention_bias": True}, "attention_bias"),
    "mlp_bias": (llama, {"mlp_bias": True}, "mlp_bias"),
    "hidden_act": (llama, {"hidden_act": "gelu"}, "hidden_act .*got gelu; allowed: silu"),
    "sliding_window": (llama, {"sliding_window": 8}, "sliding_window"),
    "head_dim": (llama, {"head_dim": 16}, "head_dim"),
    "quantised": (llama, {"quantization_config": {"bits": 4}}, "quantization_config"),
    "remote code": (llama, {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
    "another family": (llama, {"model_type": "mistral"}, "model_type .*'mistral'; allowed: llama, gpt2, gpt_neox, opt"),
    "activation": (gpt2, {"activation_function": "relu"}, "activation_function"),
    "scaled attention": (gpt2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    "sequential": (neox, {"use_parallel_residual": False}, "use_parallel_residual"),
    "norms after the sublayers": (opt, {"do_layer_norm_before": False}, "do_layer_norm_before .*got False; allowed: T"),
    "narrow words": (opt, {"word_embed_proj_dim": 24}, "word_embed_proj_dim .*got 24; allowed: 48"),
    "no last norm": (opt, {"_remove_final_layer_norm": True}, "_remove_final_layer_norm .*got True"),
    "no biases": (opt, {"enable_bias": False}, "enable_bias .*got False"),
    "bare norms": (opt, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine .*got False"),
    "another activation": (opt, {"activation_function": "gelu"}, "activation_function .*got gelu; allowed: relu"),
    "no bias": (neox, {"attention_bias": False}, "attention_bias"),
    "odd rotary": (neox, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.2}},
                   "must be even"),
    "fewer layers": (llama, {"num_hidden_layers": 1}, "surplus tensor model.layers.1"),
    "more layers": (llama, {"num_hidden_layers": 3}, "lacks tensor model.layers.2"),
    "another size": (llama, {"vocab_size": WORDS + 1}, "another shape than config.json says"),
    "tied to another head": (llama, {"tie_word_embeddings": True}, "differs from the embedding"),
    "nonsense": (llama, {"hidden_size": "wide"}, "config.json is not usable"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_ours_do_not_compute_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, change, message = REFUSED[name]
    make().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message) as caught:
        from_hf(tmp_path / "hf", tmp_path / "out", None, quiet)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == ["hf"]


class Evil:
    """Unpickled, it leaves a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("beside", [False, True])
def test_pickles_are_refused_and_never_run(beside: bool, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "hf")
    for name in ("pytorch_model.bin", "training_args.bin", "rng_state.pth"):
        (tmp_path / "hf" / name).write_bytes(pickle.dumps(Evil(tmp_path / "trace")))
    if not beside:
        (tmp_path / "hf" / "model.safetensors").unlink()
        with pytest.raises(ConfigError, match="pickled, which is never read; got pytorch_model.bin; allowed: model"):
            from_hf(tmp_path / "hf", tmp_path / "out", None, quiet)
    else:
        from_hf(tmp_path / "hf", tmp_path / "out", None, quiet)
    assert not (tmp_path / "trace").exists() and (tmp_path / "out").exists() == beside


@pytest.mark.parametrize("content", ['{"weight_map": {"a": "../evil.safetensors"}}', '{"weight_map": 3}', "[", "[]"])
def test_a_bad_index_is_refused(content: str, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "evil.safetensors")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match="model.safetensors.index.json"):
        from_hf(tmp_path / "hf", tmp_path / "out", None, quiet)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot read .*model.safetensors"):
        from_hf(tmp_path / "hf", tmp_path / "out", None, quiet)


# ---------------------------------------------------------------- when it goes wrong


def interleaved_wrong(stored: Stored, values: Any) -> torch.Tensor:
    return right_join(replace(stored, heads=1), values)


def one_row_moved(stored: Stored, values: Any) -> torch.Tensor:
    found = right_join(stored, values)
    return found.roll(1, 0) if "dense_h_to_4h.weight" in stored.name else found


right_join = Stored.join


@pytest.mark.parametrize("wrong", [interleaved_wrong, one_row_moved])
def test_a_wrong_conversion_is_noticed_and_leaves_nothing(
    wrong: Callable[..., torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(CONFIGS["neox"], "lora", tmp_path / "run")
    monkeypatch.setattr(Stored, "join", wrong)
    with pytest.raises(TrainingError, match="computes something else: logits up to .* nothing was written"):
        to_hf(tmp_path / "run", tmp_path / "hf", Export(), quiet)
    assert os.listdir(tmp_path) == ["run"]


def test_a_wrong_import_is_noticed_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama().save_pretrained(tmp_path / "hf")

    def slightly_off(folder: Path) -> Any:
        config, length, notes = read_config(folder)
        return replace(config, rotary_base=9000.0), length, notes

    monkeypatch.setattr(convert, "read_config", slightly_off)
    with pytest.raises(TrainingError, match="computes something else"):
        from_hf(tmp_path / "hf", tmp_path / "out", None, quiet)
    assert os.listdir(tmp_path) == ["hf"]


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], "full", tmp_path / "run")
    (tmp_path / "hf").mkdir()
    with pytest.raises(ConfigError, match="the output exists"):
        to_hf(tmp_path / "run", tmp_path / "hf", Export(), quiet)
    with pytest.raises(ConfigError, match="cannot write the output folder"):
        to_hf(tmp_path / "run", tmp_path / "run" / "latest" / "hf", Export(), quiet)
    assert os.listdir(tmp_path / "hf") == []


def test_an_opt_of_ours_that_theirs_cannot_express(tmp_path: Path) -> None:
    save_model(replace(CONFIGS["opt"], norm_epsilon=1e-6), "full", tmp_path / "run")
    with pytest.raises(ConfigError, match="one epsilon; got 1e-06; allowed: 1e-05"):
        to_hf(tmp_path / "run", tmp_path / "hf", Export(), quiet)


@torch.no_grad()
def test_padding_before_an_opt_reads_none_of_its_positions(tmp_path: Path) -> None:
    """Positions are counted from the first token that is not masked; the rows before them change nothing."""
    save_model(CONFIGS["opt"], "full", tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "hf", Export(), quiet)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    table = model.model.decoder.embed_positions.weight
    assert table.shape == (31, 48) and not table[:2].any() and table[2:].std() > 0.1
    mask = torch.ones_like(tokens())
    assert torch.equal(model(tokens(), attention_mask=mask).logits, model(tokens()).logits)
    mask[:, :4] = 0
    padded = model(tokens(), attention_mask=mask).logits[:, 4:]
    assert (padded - model(tokens()[:, 4:]).logits).abs().max() < 1e-4


def test_a_llama_of_ours_that_theirs_cannot_express(tmp_path: Path) -> None:
    save_model(replace(CONFIGS["llama"], rotary_percent=0.5), "full", tmp_path / "run")
    with pytest.raises(ConfigError, match="rotates whole heads"):
        to_hf(tmp_path / "run", tmp_path / "hf", Export(), quiet)
