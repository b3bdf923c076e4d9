"""Norms against plain arithmetic, and the apex that is asked for: right, missing, unfinished, and the wrong one."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megalowrank.config import ModelConfig
from megalowrank.errors import ConfigError
from megalowrank.methods import method_class
from megalowrank.models.build import build_gpt, build_llama
from megalowrank.models.norms import KERNELS, LayerNorm, RMSNorm, norm_class
from megalowrank.models.presets import apply_preset
from megalowrank.parallel.groups import initialize_single_process

# the parts of NVIDIA's package that matter, with norms that say who they are
FUSED = """
import torch

class FusedLayerNorm(torch.nn.LayerNorm):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__(normalized_shape, eps, elementwise_affine)

class FusedRMSNorm(torch.nn.RMSNorm):
    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, memory_efficient=False):
        super().__init__(normalized_shape, eps, elementwise_affine)
"""
SUMMARY = "Pyramid toolkit to add Velruse, Flash Messages,CSRF, ReCaptcha and Sessions"
SMALL = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=30)
LLAMA = dataclasses.replace(SMALL, ffn_hidden_size=24)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> None:
    with tempfile.TemporaryDirectory() as folder:
        initialize_single_process(str(Path(folder) / "store"))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages in front of the others; what it brought in is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "fused_layer_norm_cuda")]:
        del sys.modules[name]


def install(site: Path, *, fused: str | None = FUSED, kernels: bool = True) -> None:
    (site / "apex").mkdir()
    (site / "apex" / "__init__.py").write_text("")
    if fused is not None:
        (site / "apex" / "normalization").mkdir()
        (site / "apex" / "normalization" / "__init__.py").write_text(fused)
    if kernels:
        (site / "fused_layer_norm_cuda.py").write_text("")
    importlib.invalidate_caches()


def describe(site: Path, version: str, summary: str) -> None:
    (site / f"apex-{version}.dist-info").mkdir()
    text = f"Metadata-Version: 2.1\nName: apex\nVersion: {version}\nSummary: {summary}\n"
    (site / f"apex-{version}.dist-info" / "METADATA").write_text(text)


def logits(config: ModelConfig, family: str) -> tuple[torch.Tensor, set[str]]:
    """Logits of a small model, and the names of its norms' classes."""
    kind = method_class("full")
    build = build_llama if family == "llama" else build_gpt
    config = dataclasses.replace(config, model_family=family)
    module = build(config, kind(kind.config_class()), length=8, seed=1, dtype=torch.float64).module
    with torch.no_grad():
        found = module.logits(torch.arange(16).view(2, 8))
    return found, {type(m).__mro__[1].__name__ for m in module.modules() if type(m).__name__.endswith("Norm")}


@pytest.mark.parametrize(("kind", "cls"), [("RMSNorm", RMSNorm), ("LayerNorm", LayerNorm)])
def test_norms_are_what_they_say(kind: str, cls: type) -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 10, dtype=torch.float64, generator=source) + 1.5
    norm = norm_class(kind, "torch")(SimpleNamespace(params_dtype=torch.float64), 10, eps=0.01)
    assert type(norm) is cls
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(10, dtype=torch.float64, generator=source))
    centred = x if kind == "RMSNorm" else x - x.mean(-1, keepdim=True)
    expected = norm.weight * centred / (centred.square().mean(-1, keepdim=True) + 0.01).sqrt()
    expected = expected if kind == "RMSNorm" else expected + norm.bias
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "config", "fused"),
    [("llama", LLAMA, "FusedRMSNorm"), ("gpt2", SMALL, "FusedLayerNorm"), ("neox", SMALL, "FusedLayerNorm")],
)
def test_apex_is_used_where_it_is_named_and_nowhere_else(
    site: Path, family: str, config: ModelConfig, fused: str
) -> None:
    install(site)
    plain, classes = logits(config, family)
    assert classes == {"Module"}, "installed, not asked for"
    found, classes = logits(dataclasses.replace(config, norm_impl="apex"), family)
    assert classes == {fused}
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)


def refusal(family: str = "gpt2") -> str:
    config = dataclasses.replace(LLAMA, model_family=family, norm_impl="apex")
    with pytest.raises(ConfigError) as caught:
        apply_preset(config, None, 8)
    message = str(caught.value)
    assert message.startswith("--norm-impl apex needs NVIDIA apex; got ") and "\n" not in message
    return message


def test_without_apex_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "got no apex installed" in refusal() and "github.com/NVIDIA/apex" in refusal()


def test_the_apex_of_pypi_is_recognised(site: Path) -> None:
    """It can be imported, and has none of the parts."""
    install(site, fused=None, kernels=False)
    describe(site, "0.9.10.dev0", SUMMARY)
    assert f"another project called apex (0.9.10.dev0, {SUMMARY})" in refusal()


@pytest.mark.skipif(importlib.util.find_spec(KERNELS) is not None, reason="the kernels are installed")
def test_a_broken_apex_is_refused(site: Path) -> None:
    install(site, kernels=False)
    assert "built without its compiled norms (fused_layer_norm_cuda)" in refusal()


def test_an_old_apex_without_a_norm_is_refused(site: Path) -> None:
    install(site, fused=FUSED.partition("class FusedRMSNorm")[0])
    assert "an apex without FusedRMSNorm" in refusal("llama")
    apply_preset(dataclasses.replace(SMALL, norm_impl="apex"), None, 8, ("gpt2",))


def test_torch_is_the_default_and_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert apply_preset(LLAMA, None, 8).norm_impl == "torch"
