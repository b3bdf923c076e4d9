"""Adapters against PEFT's own arithmetic: our factors as a PEFT folder, and PEFT folders as ours."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megalowrank.checkpoint.hf import convert
from megalowrank.checkpoint.hf.convert import Export, from_hf, to_hf
from megalowrank.checkpoint.plain import load_plain
from megalowrank.checkpoint.weights import SavedWeights
from megalowrank.errors import ConfigError, TrainingError
from megalowrank.parallel.groups import initialize_single_process
from tests.checkpoint.saved_models import CONFIGS, save_model, tokens
from tests.checkpoint.test_hf import Evil, quiet
from tests.models.hugging_face import effective_weights, hugging_face, theirs

ADAPTERS = Export(adapters=True)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(str(Path(folder) / "store"))


def base_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def adapted_logits(base: Path, adapter: Path) -> torch.Tensor:
    return PeftModel.from_pretrained(base_of(base), adapter).eval()(tokens()).logits


CASES = [
    ("llama, tied, grouped", "switchlora", True, {}),
    ("llama", "relora", False, {}),
    ("llama", "lora", True, {"lora_target": ["gate", "up", "layers.1.mlp.down"]}),
    ("gpt2", "switchlora", False, {}),
    ("gpt2, not tied", "lora", True, {"lora_target": ["q", "k", "v"]}),
    ("neox", "relora", True, {}),
    ("llama, tied, grouped", "galore", True, {}),
    ("neox, tied", "lora", False, {"lora_target": ["layers.0.*"]}),
]


TABLE = """granularity = "layer"
[layers.0.q]
rank = 2
[layers.0.k]
enabled = false
[layers.1.v]
rank = 3
alpha = 1.5
[layers.1.up]
enabled = false
"""


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_every_matrix_has_its_rank_and_scale_in_the_adapter(name: str, tmp_path: Path) -> None:
    """Where Q, K and V are one module too, of which K has no factors."""
    model = save_model(CONFIGS[name], "lora", tmp_path / "run", lora_config=TABLE)
    to_hf(tmp_path / "run", tmp_path / "out", ADAPTERS, quiet)
    expected = hugging_face(CONFIGS[name], model, torch.float32)(tokens()).logits
    assert len({(layer.rank, layer.scale) for layer in model.layers}) == 3
    assert (adapted_logits(tmp_path / "out" / "base", tmp_path / "out" / "adapter") - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("name", "method", "low", "flags"), CASES, ids=lambda v: v if isinstance(v, str) else "")
@torch.no_grad()
def test_peft_computes_the_trained_model(
    name: str, method: str, low: bool, flags: dict[str, Any], tmp_path: Path
) -> None:
    """Base and adapter give the merged model; the base is W without factors; both come back as they were."""
    config = CONFIGS[name]
    model = save_model(config, method, tmp_path / "run", low, **flags)
    to_hf(tmp_path / "run", tmp_path / "out", ADAPTERS, quiet)
    base, adapter = tmp_path / "out" / "base", tmp_path / "out" / "adapter"
    expected = hugging_face(config, model, torch.float32)(tokens()).logits
    assert (adapted_logits(base, adapter) - expected).abs().max() < 1e-4
    assert (base_of(base)(tokens()).logits - expected).abs().max() > 0.05
    model.layers.clear()
    plain = theirs(config, effective_weights(model))
    stored = load_file(base / "model.safetensors")
    for key, value in stored.items():
        other = plain["lm_head.weight" if key == "embed_out.weight" else key]
        assert torch.equal(value, other.float()), key
    assert sorted(os.listdir(adapter)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    back_and_out_again(tmp_path)


def back_and_out_again(folder: Path) -> None:
    """The imported checkpoint has the same factors; exported again the adapter is the same file."""
    out = folder / "out"
    from_hf(out / "base", folder / "back", out / "adapter", quiet)
    before, after = SavedWeights.open(folder / "run"), SavedWeights.open(folder / "back")
    assert after.run["method"] == "lora" and after.names == before.names
    assert after.scale("layers.0.attention.q") == pytest.approx(before.scale("layers.0.attention.q"), rel=1e-12)
    for name in (name.removesuffix(".weight") for name in before.names):
        pair, other = before.factors(name), after.factors(name)
        assert (pair is None) == (other is None), name
        assert pair is None or other is None or all(map(torch.equal, pair, other)), name
    to_hf(folder / "back", folder / "again", ADAPTERS, quiet)
    file = Path("adapter") / "adapter_model.safetensors"
    assert (folder / "again" / file).read_bytes() == (out / file).read_bytes()
    paths = [folder / name / "adapter" / "adapter_config.json" for name in ("out", "again")]
    settings = [json.loads(path.read_text()) for path in paths]
    assert settings[0].pop("base_model_name_or_path") != settings[1].pop("base_model_name_or_path")
    assert settings[0] == settings[1]


def test_one_adapter_per_projection_as_others_name_them(tmp_path: Path) -> None:
    save_model(CONFIGS["llama"], "switchlora", tmp_path / "run")
    to_hf(tmp_path / "run", tmp_path / "out", ADAPTERS, quiet)
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert settings["target_modules"] == names and settings["r"] == 4 and settings["lora_alpha"] == 1.0
    keys = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert keys["base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight"].shape == (4, 48)
    assert keys["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (48, 4)
    assert len(keys) == 2 * 2 * 7


# ---------------------------------------------------------------- adapters of others

MODULES = {
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "neox": ["query_key_value", "dense_4h_to_h"],
}


def peft_folder(name: str, folder: Path, **more: Any) -> Path:
    """An adapter that PEFT made, with B drawn too, and its base beside it."""
    save_model(CONFIGS[name], "full", folder / "run")
    to_hf(folder / "run", folder / "base", Export(), quiet)
    torch.manual_seed(2)
    options = {"r": 3, "lora_alpha": 5, "target_modules": MODULES[name], "task_type": "CAUSAL_LM", **more}
    model = get_peft_model(base_of(folder / "base"), LoraConfig(**options))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_adapters_of_others_come_in(name: str, tmp_path: Path) -> None:
    """On a fused module B is dense: Q, K and V get the same A."""
    adapter = peft_folder(name, tmp_path)
    expected = adapted_logits(tmp_path / "base", adapter)
    from_hf(tmp_path / "base", tmp_path / "ours", adapter, quiet)
    saved = SavedWeights.open(tmp_path / "ours")
    found = load_plain(saved).module.logits(tokens()).transpose(0, 1)
    assert (found - expected).abs().max() < 1e-4
    assert saved.run["method_config"]["lora_rank"] == 3 and saved.scale("layers.0.attention.q") == pytest.approx(5 / 3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"use_dora": True}, "no LoRA factor|use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"v_proj": 2}}, "several ranks or scales"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "no LoRA factor; got .*embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "no LoRA factor; got .*lm_head"),
    ],
)
def test_what_our_factors_do_not_compute_is_refused(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapter = peft_folder("llama", tmp_path, **more)
    with pytest.raises(ConfigError, match=message):
        from_hf(tmp_path / "base", tmp_path / "out", adapter, quiet)
    assert not (tmp_path / "out").exists()


def test_a_pickled_adapter_is_refused_and_never_run(tmp_path: Path) -> None:
    adapter = peft_folder("llama", tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "trace")))
    with pytest.raises(ConfigError, match="pickled, which is never read; got adapter_model.bin"):
        from_hf(tmp_path / "base", tmp_path / "out", adapter, quiet)
    assert not (tmp_path / "trace").exists()


def test_a_run_without_factors_and_a_machine_without_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(CONFIGS["llama"], "full", tmp_path / "run")
    with pytest.raises(ConfigError, match="--adapters needs a run with low-rank factors; got --method full"):
        to_hf(tmp_path / "run", tmp_path / "out", ADAPTERS, quiet)
    monkeypatch.setattr(convert.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--adapters needs the package peft"):
        to_hf(tmp_path / "run", tmp_path / "out", ADAPTERS, quiet)
    assert os.listdir(tmp_path) == ["run"]


def test_a_wrong_adapter_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(CONFIGS["neox"], "lora", tmp_path / "run")
    from megalowrank.checkpoint.hf import adapters

    monkeypatch.setattr(adapters, "_rows", lambda module: type(module)(module.name, module.parts, module.shapes))
    with pytest.raises(TrainingError, match="computes something else"):
        to_hf(tmp_path / "run", tmp_path / "out", ADAPTERS, quiet)
    assert os.listdir(tmp_path) == ["run"]
