"""Where the state of a sharded engine lies, as far as one process without an accelerator can tell."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megalowrank.engine import zero_state


def test_forward_copies_are_on_the_accelerator_though_masters_are_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed values travel by NCCL, which knows no tensor in host memory; DeepSpeed's ``device`` then is the host."""
    accelerator = SimpleNamespace(current_device_name=lambda: "cuda:0")
    monkeypatch.setattr(zero_state, "get_accelerator", lambda: accelerator)
    stage_3 = type("DeepSpeedZeroOptimizer_Stage3", (), {})()
    stage_3.fp32_partitioned_groups_flat, stage_3.fp16_groups = [], []
    stage_3.dtype, stage_3.device = torch.bfloat16, "cpu"
    layout = zero_state.zero_layout(SimpleNamespace(optimizer=stage_3), [])
    assert layout.forward.device == torch.device("cuda:0") and layout.forward.dtype == torch.bfloat16
