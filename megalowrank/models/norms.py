"""RMSNorm and LayerNorm: torch's, or the fused kernels of NVIDIA apex where ``--norm-impl apex`` asks for them.

apex is never taken because it is installed. The project called apex on PyPI is another one, a toolkit for the web
framework Pyramid; an import of it succeeds, so it is told apart by its parts.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F

from megalowrank.errors import ConfigError

KERNELS = "fused_layer_norm_cuda"


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., H] -> [.., H].

        The view makes autograd add up the norm's own gradient terms before it adds the residual's, so that
        the sum does not depend on what an engine wraps around the module.
        """
        return F.rms_norm(x.view_as(x), self.weight.shape, self.weight, self.eps)


class LayerNorm(torch.nn.Module):
    """Norm over the last dimension with mean, weight and bias."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[.., H] -> [.., H]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def norm_class(kind: str, implementation: str) -> type[torch.nn.Module]:
    """The module of ``kind`` (RMSNorm or LayerNorm) from torch or apex, called as (config, hidden_size, eps).

    Raises ConfigError if apex is asked for and not there.
    """
    if implementation == "apex":
        return _apex_norm(kind)
    return {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[kind]


def _apex_norm(kind: str) -> type[torch.nn.Module]:
    _require_apex()
    fused: Any = getattr(importlib.import_module("apex.normalization"), f"Fused{kind}", None)
    if fused is None:
        raise _refusal(f"an apex without Fused{kind}")

    class ApexNorm(fused):
        """apex's fused norm as megatron-core calls a norm."""

        def __init__(self, config: Any, hidden_size: int, eps: float, **kwargs: Any) -> None:
            super().__init__(hidden_size, eps=eps)
            self.to(config.params_dtype)

    return ApexNorm


def _require_apex() -> None:
    """Raise ConfigError unless NVIDIA's apex with its compiled norms can be imported."""
    if importlib.util.find_spec("apex") is None:
        raise _refusal("no apex installed")
    if importlib.util.find_spec("apex.normalization") is None:
        raise _refusal(f"another project called apex{_metadata()}, which is what PyPI has under that name")
    if importlib.util.find_spec(KERNELS) is None:
        raise _refusal(f"an apex that was built without its compiled norms ({KERNELS})")


def _metadata() -> str:
    """Version and summary of the installed distribution called apex, if there is one."""
    try:
        found = importlib.metadata.metadata("apex")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f" ({found['Version']}, {found['Summary']})"


def _refusal(found: str) -> ConfigError:
    return ConfigError("--norm-impl apex needs NVIDIA apex", found, "torch, or apex built from github.com/NVIDIA/apex")
