"""An ``Estimate`` as aligned lines of text: what a run prints before its first step."""

from __future__ import annotations

from megalowrank.models.accounting.estimate import Estimate, StageEstimate
from megalowrank.models.accounting.parameters import GROUPS
from megalowrank.models.accounting.refresh import Refresh


def startup_table(found: Estimate, stage: int | None = None) -> str:
    """Parameters, bytes and collectives of one rank of ``stage`` (default: the one with most on the device)."""
    stage = found.dearest if stage is None else stage
    blocks = [_parameters(found), _memory(found, found.stages[stage], stage)]
    if found.stages[stage].wire:
        blocks.append(_wire(found.stages[stage]))
    refresh = found.stages[stage].refresh
    if refresh is not None:
        blocks.append(_refresh(refresh))
    if len(found.stages) > 1:
        blocks.append(_stages(found))
    return "\n\n".join("\n".join(lines) for lines in blocks)


def summary(found: Estimate) -> list[str]:
    """What does not fit a table: the arithmetic of a rank, and how low-rank products travel."""
    layout = found.layout
    lines = [f"{max(found.pipeline.flops) / 1e9:,.3f} GFLOP per update on a rank of the busiest stage"]
    if layout.pipe_size > 1:
        lines[0] += f", pipeline bubble {100 * found.pipeline.bubble:.1f} %"
    if layout.tensor_size > 1 and found.count.factors:
        chosen = ", ".join(f"{name} {schedule}" for name, schedule in layout.schedules.items())
        lines.append(f"low-rank products: {chosen or 'ride'}")
    return lines


def _parameters(found: Estimate) -> list[str]:
    count = found.count
    lines = [f"{'parameters':<24}{'elements':>18}{'share':>9}"]
    lines += [_parameter_line(name, count.groups[name], count.total) for name in GROUPS if count.groups[name]]
    lines.append(_parameter_line("total", count.total, count.total))
    return [*lines, _parameter_line("trainable", count.trainable, count.total)]


def _parameter_line(name: str, numel: int, total: int) -> str:
    return f"{name:<24}{numel:>18,}{100 * numel / total:>8.2f}%"


def _memory(found: Estimate, stage: StageEstimate, number: int) -> list[str]:
    """Categories that hold something, and their sum, which is an upper bound: not all peak together."""
    head = "memory of one rank" if len(found.stages) == 1 else f"memory, stage {number}"
    lines = [f"{head:<24}{'device':>14}{'host':>14}"]
    shown = {name: size for name, size in stage.memory.items() if size.total}
    lines += [f"{name:<24}{human(size.device):>14}{human(size.host):>14}" for name, size in shown.items()]
    total = "sum" if found.layout.seq_length else "sum, no activations"
    return [*lines, f"{total:<24}{human(stage.device):>14}{human(stage.host):>14}"]


def _wire(stage: StageEstimate) -> list[str]:
    lines = [f"{'collectives of an update':<26}{'calls':>12}{'bytes':>14}"]
    for (group, name), volume in sorted(stage.wire.items()):
        lines.append(f"{group + ': ' + name:<26}{volume.calls:>12,}{human(volume.payload):>14}")
    return lines


def _refresh(refresh: Refresh) -> list[str]:
    """Beside its probe passes."""
    head = f"a refresh, every {refresh.interval:,}"
    lines = [f"{head:<26}{'calls':>12}{'bytes':>14}"]
    for (group, name), volume in sorted(refresh.volumes.items()):
        lines.append(f"{group + ': ' + name:<26}{volume.calls:>12,}{human(volume.payload):>14}")
    if refresh.volumes:
        lines.append(f"{'spread over updates':<26}{'':>12}{human(refresh.sent_per_update):>14}")
    return [*lines, f"{'sums of gradients held':<26}{'':>12}{human(refresh.held):>14}"]


def _stages(found: Estimate) -> list[str]:
    lines = [f"{'stage':<6}{'blocks':>10}{'parameters':>16}{'device':>12}{'host':>12}{'wire':>12}{'idle':>8}"]
    for number, (stage, idle) in enumerate(zip(found.stages, found.pipeline.idle, strict=True)):
        blocks = f"{stage.blocks[0]}-{stage.blocks[1] - 1}"
        lines.append(
            f"{number:<6}{blocks:>10}{stage.parameters:>16,}{human(stage.device):>12}{human(stage.host):>12}"
            f"{human(stage.sent):>12}{100 * idle:>6.1f} %"
        )
    return lines


def human(size: float) -> str:
    """Bytes in binary units; a dash for nothing."""
    if not size:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
