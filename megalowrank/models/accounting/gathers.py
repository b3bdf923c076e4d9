"""Which parameters DeepSpeed 0.19.8 gathers under ZeRO-3, by running its rules over the modules of a micro-batch.

Before a module computes, its parameters are gathered in one call, and those of the modules after it ahead of time, up
to a bucket of elements. After it they are given back, unless they are needed again soon, or are *persistent* (small,
and whole on every rank). What holds is the steady state: the first two micro-batches of a run, while DeepSpeed records
the order of modules, gather more, and so do those that follow an evaluation.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from megalowrank.config import ModelConfig
from megalowrank.models.accounting.layout import Layout
from megalowrank.models.accounting.parts import Part
from megalowrank.models.architecture import architecture

_PASSES = 3
_NEVER = -(10**10)


@dataclass(frozen=True)
class Event:
    """A module is about to compute (``fetch``), or has (else); ``again``: a forward pass within the backward one."""

    module: str
    fetch: bool
    again: bool = False


@dataclass
class Gathered:
    """Calls, elements that all-gathers made whole, and the most elements that were whole at one time."""

    calls: int = 0
    elements: int = 0
    most: int = 0


def micro_batch_events(config: ModelConfig, blocks: Sequence[int], recompute: bool) -> list[Event]:
    """The modules of a forward and a backward pass in the order of DeepSpeed's hooks, those without parameters too."""
    shape = architecture(config)
    begin = ["embedding", *["position"] * (shape.rotary_percent is None)]
    found = [Event("root", True)]
    for module in begin:
        found += _call(module)
    for number in blocks:
        found += _block(number, shape.parallel_residual)
    found += [*_call("norm"), *_call("output"), Event("root", False), Event("root", True)]
    found += [*_call("output"), *_call("norm")]
    for number in reversed(blocks):
        found += _block_backward(number, shape.parallel_residual, recompute)
    return found + [Event(module, True) for module in reversed(begin)]


def _call(module: str, again: bool = False) -> list[Event]:
    return [Event(module, True, again), Event(module, False, again)]


def _block(number: int, parallel_residual: bool, again: bool = False) -> list[Event]:
    """The forward pass of a block; megatron-core's layer has three modules that do nothing after its attention."""
    at = f"layers.{number}"
    idle = [] if parallel_residual else [f"{at}.idle.{i}" for i in range(3)]
    found = [Event(at, True, again), *_call(f"{at}.input_layernorm", again), Event(f"{at}.attention", True, again)]
    for module in (f"{at}.attention.qkv", f"{at}.core", f"{at}.attention.o"):
        found += _call(module, again)
    found.append(Event(f"{at}.attention", False, again))
    for module in (*idle, f"{at}.pre_mlp_layernorm"):
        found += _call(module, again)
    found += [Event(f"{at}.mlp", True, again), *_call(f"{at}.mlp.up", again), *_call(f"{at}.mlp.down", again)]
    return [*found, Event(f"{at}.mlp", False, again), Event(at, False, again)]


def _block_backward(number: int, parallel_residual: bool, recompute: bool) -> list[Event]:
    """The backward pass of a block. A recomputed one ends within its last product, which is not given back."""
    at = f"layers.{number}"
    idle = [] if parallel_residual else [f"{at}.idle.{i}" for i in (1, 0)]
    found = [Event(at, True), Event(f"{at}.mlp", True), Event(f"{at}.mlp.down", True)]
    if recompute:
        found += _block(number, parallel_residual, again=True)[:-3]
    found += [Event(f"{at}.mlp.down", False), *_call(f"{at}.mlp.up"), Event(f"{at}.mlp", False)]
    for module in (f"{at}.pre_mlp_layernorm", *idle):
        found += _call(module)
    found.append(Event(f"{at}.attention", True))
    for module in (f"{at}.attention.o", f"{at}.core", f"{at}.attention.qkv"):
        found += _call(module)
    return [*found, Event(f"{at}.attention", False), *_call(f"{at}.input_layernorm"), Event(at, False)]


def gathered_by_micro_batch(
    config: ModelConfig, parts: Sequence[Part], blocks: Sequence[int], layout: Layout
) -> Gathered:
    """What the all-gathers of one micro-batch move on every rank, with the padding of shards."""
    tied = architecture(config).tied_output
    coordinator = _Coordinator(parts, micro_batch_events(config, blocks, layout.recompute), layout, tied)
    found = Gathered()
    for number in range(_PASSES):
        found = coordinator.run(whole=number > 0 or layout.accumulation < _PASSES)
    return found


@dataclass
class _Coordinator:
    """DeepSpeed's ``PartitionedParameterCoordinator`` with a complete trace, on numbers of parameters."""

    parts: Sequence[Part]
    events: list[Event]
    layout: Layout
    tied: bool
    released: dict[int, frozenset[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.of: dict[str, list[int]] = {}
        for number, part in enumerate(self.parts):
            self.of.setdefault(part.module.replace("gate_up", "up"), []).append(number)
        if self.tied:
            self.of["output"] = self.of["embedding"]
        self.persistent = {i for i, part in enumerate(self.parts) if part.numel <= self.layout.persistence_threshold}
        order = [event.module for event in self.events if event.fetch]
        self.queue_of_pass = [(i, step) for step, module in enumerate(order) for i in self.of.get(module, ())]
        self.uses: dict[int, list[int]] = {}
        for i, step in self.queue_of_pass:
            self.uses.setdefault(i, []).append(step)
        self.before = [0]
        for module in order:
            self.before.append(self.before[-1] + sum(self.parts[i].numel for i in self.of.get(module, ())))

    def run(self, whole: bool) -> Gathered:
        """One micro-batch; ``whole``: persistent parameters are there when it begins."""
        self.found = Gathered()
        self.queue, self.step, self.live = deque(self.queue_of_pass), 0, 0
        self.seen = dict.fromkeys(range(len(self.parts)), _NEVER)
        self.whole = set(self.persistent) if whole else set()
        self.flying: set[int] = set()
        self.active: dict[int, set[str]] = {i: set() for i in range(len(self.parts))}
        self.stack: list[str] = []
        self.remade: dict[str, set[int]] = {}
        backward = next(i for i, event in enumerate(self.events) if event.module == "root" and not event.fetch)
        for number, event in enumerate(self.events):
            if event.fetch:
                self._fetch(event, number > backward and not event.again)
            else:
                self._release(number, event, number > backward and not event.again)
        return self.found

    def _fetch(self, event: Event, backward: bool) -> None:
        own = set(self.of.get(event.module, ()))
        if backward:
            self.stack.append(event.module)
        self._gather(own - self.whole - self.flying)
        for i in own:
            self.active[i].add(event.module)
            if event.again and self.stack and not self.parts[i].trained:
                self.remade.setdefault(self.stack[-1], set()).add(i)
        self.whole |= own
        self.flying -= own
        expected = {i for i in own if self.seen[i] < self.step}
        taken: set[int] = set()
        while self.queue and len(taken) < len(expected):
            i, used = self.queue.popleft()
            self.seen[i] = used
            taken.add(i)
        self._prefetch()
        self.step += 1

    def _prefetch(self) -> None:
        """Gather the parameters of later modules, up to the bucket and the limit of live elements."""
        budget = min(self.layout.max_live - self.live, self.layout.prefetch_bucket)
        ahead: set[int] = set()
        count = 0
        while self.layout.prefetch_bucket > 0 and self.queue and count < budget:
            i, step = self.queue.popleft()
            self.seen[i] = max(self.seen[i], step)
            if i not in ahead and i not in self.whole and i not in self.flying:
                ahead.add(i)
                count += self.parts[i].numel
        self._gather(ahead)
        self.flying |= ahead

    def _gather(self, wanted: set[int]) -> None:
        if not wanted:
            return
        ranks = self.layout.data_size
        self.live += sum(self.parts[i].numel for i in wanted)
        self.found.calls += 1
        self.found.elements += sum(-(-self.parts[i].numel // ranks) * ranks for i in wanted)
        self.found.most = max(self.found.most, self.live)

    def _release(self, number: int, event: Event, backward: bool) -> None:
        own = set(self.of.get(event.module, ()))
        free = set(self._free_after(number, own))
        if backward:
            remade = self.remade.pop(event.module, set())
            free |= remade - self.persistent
            own |= remade
            self.stack.remove(event.module)
        for i in own:
            self.active[i].discard(event.module)
            if i in free and i in self.whole and not self.active[i]:
                self.whole.discard(i)
                self.live -= self.parts[i].numel

    def _free_after(self, number: int, own: set[int]) -> frozenset[int]:
        """What a module gives back: decided in the first micro-batch, as DeepSpeed remembers its answers."""
        if number not in self.released:
            self.released[number] = frozenset(
                i for i in own - self.persistent if self.seen[i] <= self.step and not self._soon(i)
            )
        return self.released[number]

    def _soon(self, i: int) -> bool:
        """Whether a parameter is used again before ``max_reuse`` other elements are."""
        uses = self.uses[i]
        place = bisect_left(uses, self.step)
        return place < len(uses) and self.before[uses[place]] - self.before[self.step] < self.layout.max_reuse
