"""The truncated decomposition is the nearest product, whatever its inputs."""

from __future__ import annotations

import torch
from compression._calibrated import compressed, layer, leaf, weight

import rankfold as rf
from rankfold.compression import CompressionReport


def test_no_product_of_the_rank_is_nearer_and_the_error_is_the_tail_of_the_spectrum() -> None:
    plain = weight(layer())
    reports: list[CompressionReport] = []
    found = weight(compressed(layer(), "svd", rank=3, report=reports.append))
    left, values, right = torch.linalg.svd(plain, full_matrices=False)
    torch.testing.assert_close(found, left[:, :3] * values[:3] @ right[:3])
    row = reports[0].rows[0]
    tail = float(values[3:].norm() / values.norm())
    assert abs(row.error - tail) < 1e-12
    assert abs(row.plain_error - tail) < 1e-12
    assert row.rank == 3
    torch.testing.assert_close(
        torch.tensor(row.spectrum).double(), values / values[0], atol=1e-3, rtol=1e-3
    )  # as it is printed


def test_the_singular_values_are_split_evenly() -> None:
    model = compressed(layer(), "svd", rank=3)
    up, down = leaf(model, "up"), leaf(model, "down")
    torch.testing.assert_close(up.T @ up, down @ down.T)


def test_no_data_are_read() -> None:
    model = rf.compress(layer(), "svd", keep=0.5, data=[object()], progress=False)
    assert weight(model).shape == (10, 12)
