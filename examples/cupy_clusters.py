"""Handwritten digits on a remote device: scikit-learn's PCA through the array API, then k-means by
hand, with the same function for remote and for local arrays.

scikit-learn and SciPy use the namespace of the arrays that they are given if they are told to:
``array_api_dispatch``, and ``SCIPY_ARRAY_API=1`` before SciPy is imported.

Prints, among other things::

    round trips of PCA: 1
    round trips of k-means: 1
    centres, labels and inertia equal NumPy's
"""

from __future__ import annotations

import os

os.environ["SCIPY_ARRAY_API"] = "1"

from typing import Any

import numpy as np
import sklearn
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

import gpuremote.cupy as cp

CLUSTERS = 10
STEPS = 30


def k_means(xp: Any, points: Any) -> tuple[Any, Any, Any]:
    """Centres, the cluster of each point and the sum of squared distances, by Lloyd's algorithm.

    Nothing waits: an empty cluster, which a branch would have to know about, keeps its centre by
    ``where``.
    """
    centres = points[:CLUSTERS]
    squares = xp.sum(points * points, axis=1, keepdims=True)
    numbers = xp.arange(CLUSTERS)
    labels, inertia = xp.zeros(len(points), dtype=xp.int64), xp.zeros(())
    for _ in range(STEPS):
        distances = squares - 2.0 * points @ centres.T + xp.sum(centres * centres, axis=1)
        labels = xp.argmin(distances, axis=1)
        inertia = xp.sum(xp.min(distances, axis=1))
        member = (labels[:, None] == numbers).astype(points.dtype)
        counts = xp.sum(member, axis=0)[:, None]
        means = member.T @ points / xp.maximum(counts, 1.0)
        centres = xp.where(counts > 0, means, centres)
    return centres, labels, inertia


def trips() -> int:
    return cp.session().stats().round_trips.total()


def main() -> None:
    digits = load_digits()
    images, truth = digits.data, digits.target
    remote = cp.asarray(images)

    with sklearn.config_context(array_api_dispatch=True):
        before = trips()
        pca = PCA(8, svd_solver="full")
        points = pca.fit_transform(remote)
        print(f"PCA gives an array of shape {points.shape} on {points.device}")
        print("round trips of PCA:", trips() - before)

    before = trips()
    found = cp.session().get_many(k_means(cp, points))
    print("round trips of k-means:", trips() - before)
    print("implicit downloads:", cp.session().stats().implicit_downloads)

    expected = k_means(np, PCA(8, svd_solver="full").fit_transform(images))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)
    print("centres, labels and inertia equal NumPy's")

    names = np.array([np.bincount(truth[found[1] == k]).argmax() for k in range(CLUSTERS)])
    right = np.mean(names[found[1]] == truth)
    print(f"{right:.1%} of the digits are in a cluster with most others of their kind")
    cp.close()


if __name__ == "__main__":
    main()
