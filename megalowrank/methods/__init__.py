"""The registry: one line per method, and the only place that knows them by name."""

from __future__ import annotations

from megalowrank.errors import unknown_name
from megalowrank.methods.base import Method
from megalowrank.methods.full_rank import FullRank
from megalowrank.methods.galore import GaLore
from megalowrank.methods.golore import GoLore
from megalowrank.methods.heterolora import HeteroLoRA
from megalowrank.methods.lora import LoRA
from megalowrank.methods.lte import LTE
from megalowrank.methods.relora import ReLoRA
from megalowrank.methods.switchlora import SwitchLoRA

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (FullRank, LoRA, SwitchLoRA, ReLoRA, GoLore, GaLore, LTE, HeteroLoRA)
}


def method_class(name: str) -> type[Method]:
    """The method called ``name``; ConfigError names the closest one otherwise."""
    if name not in METHODS:
        raise unknown_name("--method is unknown", name, METHODS)
    return METHODS[name]
