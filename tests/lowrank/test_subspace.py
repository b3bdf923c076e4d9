"""Leading subspaces of matrices that ranks hold in parts, against torch's SVD of the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megalowrank.lowrank import subspace
from megalowrank.lowrank.subspace import iterated_vectors, leading_vectors, stiefel
from tests.harness import run_ranks
from tests.lowrank.subspace_cases import SHAPES, layers_of, matrix_of, search


def overlap_error(rows: torch.Tensor, expected: torch.Tensor) -> float:
    """How far two orthonormal bases (rows) are from spanning the same space: 0 if they do."""
    return float((expected.double() - expected.double() @ rows.double().t() @ rows.double()).norm())


def svd_rows(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """The leading singular vectors on the narrower side, by torch."""
    U, _, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return Vh[:rank] if matrix.shape[0] >= matrix.shape[1] else U[:, :rank].t()


@pytest.mark.parametrize("randomized", [False, True])
def test_one_process(randomized: bool) -> None:
    found = search(layers_of(0, 1), None, None, randomized)
    assert len(found) == len(SHAPES)
    for j, rows in enumerate(found):
        expected = svd_rows(matrix_of(j), len(rows))
        assert overlap_error(rows, expected) < (2e-2 if randomized else 1e-6)
        torch.testing.assert_close(rows @ rows.t(), torch.eye(len(rows)), rtol=0, atol=1e-5)
        largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
        assert bool((largest > 0).all()), "a sign that rounding can turn"


@pytest.mark.parametrize("randomized", [False, True])
@pytest.mark.parametrize("layout", ["dp2", "tp2", "tp2 dp2", "tp4"])
def test_every_rank_gets_the_subspace_of_the_whole_mean(tmp_path: Path, layout: str, randomized: bool) -> None:
    """Rows and columns divided, with padding; every rank the same bits."""
    world = 4 if layout in ("tp2 dp2", "tp4") else 2
    tensor = {"dp2": 1, "tp2": 2, "tp2 dp2": 2, "tp4": 4}[layout]
    payload = {"tensor": tensor, "randomized": randomized}
    ranks = run_ranks("tests.lowrank.subspace_cases:divided", world, payload, tmp_path)
    assert all(found == ranks[0] for found in ranks)
    alone = search(layers_of(0, 1), None, None, randomized)
    assert len(ranks[0]) == len(alone)
    for j, (rows, one) in enumerate(zip(ranks[0], alone, strict=True)):
        expected = svd_rows(matrix_of(j), len(one))
        assert overlap_error(torch.tensor(rows), expected) < (2e-2 if randomized else 1e-5), (j, SHAPES[j])
        torch.testing.assert_close(torch.tensor(rows), one, rtol=0, atol=2e-4)


def test_a_decomposition_that_fails_is_replaced_by_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """And counted; the iteration's own small decomposition goes through."""
    true, calls = torch.linalg.eigh, []

    def fails_on_whole(gram: torch.Tensor) -> object:
        calls.append(len(gram))
        if len(gram) > 14:
            raise torch.linalg.LinAlgError("did not converge")
        return true(gram)

    monkeypatch.setattr(subspace.torch.linalg, "eigh", fails_on_whole)
    layers = layers_of(0, 1)
    finder = subspace.SubspaceSearch(layers, None, None, False, (3, 0))
    for number in range(len(layers)):
        finder.take(number, matrix_of(number).clone())
    found = finder.results()
    assert finder.failed == sum(size > 14 for size in calls if size) > 0
    for layer, rows in found:
        assert overlap_error(rows, svd_rows(matrix_of(layer.index), layer.rank)) < 2e-2


@pytest.mark.parametrize("randomized", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_has_no_subspace(bad: float, randomized: bool) -> None:
    layers = layers_of(0, 1)
    finder = subspace.SubspaceSearch(layers, None, None, randomized, (3, 0))
    for number in range(len(layers)):
        matrix = matrix_of(number).clone()
        if number == 1:
            matrix[2, 3] = bad
        finder.take(number, matrix)
    assert [layer.index for layer, _ in finder.results()] == [j for j in range(len(layers)) if j != 1]
    assert finder.unfit == 1


def test_random_projectors_are_uniform_on_the_stiefel_manifold() -> None:
    """Orthonormal to rounding; every direction is as likely: the mean of PᵀP is r/n, and no sign is preferred."""
    drawn = torch.stack([stiefel(3, 8, 5, "trial", number) for number in range(4000)])
    identity = torch.eye(3, dtype=torch.float64).expand(4000, 3, 3)
    torch.testing.assert_close(drawn @ drawn.transpose(1, 2), identity, rtol=0, atol=1e-12)
    mean_projection = (drawn.transpose(1, 2) @ drawn).mean(0)
    torch.testing.assert_close(mean_projection, 3 / 8 * torch.eye(8, dtype=torch.float64), rtol=0, atol=0.02)
    assert float(drawn.mean(0).abs().max()) < 0.03
    assert torch.equal(stiefel(3, 8, 5, "trial", 7), drawn[7])


def test_a_sphere_is_uniform_in_every_coordinate() -> None:
    """For r = 1 and n = 3 every coordinate of a uniform direction is uniform in [-1, 1] (Archimedes)."""
    drawn = np.sort(torch.cat([stiefel(1, 3, "sphere", number) for number in range(4000)])[:, 0].numpy())
    expected = -1 + 2 * (np.arange(4000) + 0.5) / 4000
    assert float(np.abs(drawn - expected).max()) < 0.08


def test_iteration_finds_leading_vectors_from_products_alone() -> None:
    matrix = matrix_of(0)
    gram = matrix.double().t() @ matrix.double()
    start = torch.randn(len(gram), 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = iterated_vectors(lambda X: gram @ X, start, 3)
    assert overlap_error(rows, leading_vectors(gram, 3)) < 1e-3
