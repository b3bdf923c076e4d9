"""Randomness as a pure function of what it is for, never of who asks or in which order.

Every draw is keyed by (seed, stream, step, global index), so ranks that must agree do agree, the
layout of the model does not matter, and nothing has to be saved to resume.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def key_of(*parts: object) -> int:
    """A 63-bit key of any printable parts; stable over processes, machines and versions."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def mix(value: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser on uint64 (Steele et al. 2014): a bijection whose output looks random."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


def uniform(seed: int, stream: str, steps: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Uniform draws in [0, 1), float64 [len(steps), len(indices)], one for each (step, global index)."""
    key = np.uint64(key_of(seed, stream))
    with np.errstate(over="ignore"):
        rows = mix(key + steps.astype(np.uint64) * _GOLDEN)[:, None]
        bits = mix(rows + (indices.astype(np.uint64) + np.uint64(1))[None, :] * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by the key of ``parts`` (seed, tensor name, ...)."""
    return torch.Generator().manual_seed(key_of(*parts))
