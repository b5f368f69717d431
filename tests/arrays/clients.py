"""What scikit-learn and SciPy make of arrays of the namespace: run as a program, as SciPy reads its
setting when it is first imported. Prints for each client what it waited for and downloaded, and how
far its result is from the one with NumPy."""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

os.environ["SCIPY_ARRAY_API"] = "1"

import numpy as np

import gpuremote.cupy as xp

# By name: they come without types.
_names = ("decomposition", "discriminant_analysis", "linear_model", "mixture", "preprocessing")
sklearn, metrics, datasets = map(
    importlib.import_module, ("sklearn", "sklearn.metrics", "sklearn.datasets")
)
decomposition, discriminants, linear_model, mixtures, preprocessing = (
    importlib.import_module(f"sklearn.{name}") for name in _names
)
PCA, LDA = decomposition.PCA, discriminants.LinearDiscriminantAnalysis
scipy_fft, scipy_linalg, scipy_signal, scipy_special, scipy_stats = (
    importlib.import_module(f"scipy.{name}")
    for name in ("fft", "linalg", "signal", "special", "stats")
)

Client = Callable[[Any, Any], Any]

POINTS, LABELS = datasets.load_iris(return_X_y=True)
WEIGHTS = np.random.default_rng(0).random((len(POINTS), 3))
WEIGHTS /= WEIGHTS.sum(1, keepdims=True)


def lda(x: Any, y: Any) -> Any:
    return LDA().fit(x, y).transform(x)


def mixture(x: Any, y: Any) -> Any:
    means = x[:3, :] + 0.0
    model = mixtures.GaussianMixture(
        3, means_init=means, init_params="random", max_iter=3, tol=0.0, random_state=0
    )
    return model.fit(x).means_


def ridge(x: Any, y: Any) -> Any:
    return linear_model.Ridge(solver="svd").fit(x, x[:, 0] * 2 + 1).coef_


CLIENTS: dict[str, Client] = {
    "PCA.fit_transform": lambda x, y: PCA(3, svd_solver="full").fit_transform(x),
    "PCA.covariance_eigh": lambda x, y: PCA(2, svd_solver="covariance_eigh").fit_transform(x),
    "StandardScaler": lambda x, y: preprocessing.StandardScaler().fit_transform(x),
    "MinMaxScaler": lambda x, y: preprocessing.MinMaxScaler().fit_transform(x),
    "LinearDiscriminantAnalysis": lda,
    "LinearDiscriminantAnalysis.fit": lambda x, y: LDA().fit(x, y).means_,
    "Ridge": ridge,
    "GaussianMixture": mixture,
    "accuracy_score": lambda x, y: metrics.accuracy_score(y, y),
    "f1_score": lambda x, y: metrics.f1_score(y, y * 0 + 1, average="macro"),
    "r2_score": lambda x, y: metrics.r2_score(x[:, 0], x[:, 1]),
    "mean_squared_error": lambda x, y: metrics.mean_squared_error(x[:, 0], x[:, 1]),
    "cosine_similarity": lambda x, y: metrics.pairwise.cosine_similarity(x),
    "euclidean_distances": lambda x, y: metrics.pairwise.euclidean_distances(x, x[:9, :]),
    "rbf_kernel": lambda x, y: metrics.pairwise.rbf_kernel(x),
    "fftconvolve": lambda x, y: scipy_signal.fftconvolve(x[:, 0], x[:, 1]),
    "hilbert": lambda x, y: scipy_signal.hilbert(x[:, 0]),
    "resample": lambda x, y: scipy_signal.resample(x[:, 0], 50),
    "fft": lambda x, y: scipy_fft.fft(x),
    "rfftn": lambda x, y: scipy_fft.rfftn(x),
    "irfft": lambda x, y: scipy_fft.irfft(x[:, 0]),
    "logsumexp": lambda x, y: scipy_special.logsumexp(x, axis=1),
    "softmax": lambda x, y: scipy_special.softmax(x, axis=1),
    "xlogy": lambda x, y: scipy_special.xlogy(x, x),
    "zscore": lambda x, y: scipy_stats.zscore(x),
    "skew": lambda x, y: scipy_stats.skew(x),
    "describe": lambda x, y: scipy_stats.describe(x).variance,
}
"""These work on the device."""

DOWNLOADING: dict[str, Client] = {
    "linalg.inv": lambda x, y: scipy_linalg.inv(x.T @ x),
    "linalg.svdvals": lambda x, y: scipy_linalg.svdvals(x),
    "detrend": lambda x, y: scipy_signal.detrend(x),
    "gammaln": lambda x, y: scipy_special.gammaln(x),
}
"""These work on host arrays only, and ask for one without saying so."""


def host(value: Any) -> Any:
    return np.asarray(value.get() if isinstance(value, xp.ndarray) else value)


def run(client: Client, x: Any, y: Any) -> dict[str, Any]:
    with sklearn.config_context(array_api_dispatch=False):
        expected = client(POINTS, LABELS)
    before = xp.session().stats()
    with sklearn.config_context(array_api_dispatch=True):
        found = client(x, y)
    after = xp.session().stats()
    return {
        "trips": sum((after.round_trips - before.round_trips).values()),
        "ops": after.ops - before.ops,
        "downloads": after.implicit_downloads - before.implicit_downloads,
        "error": float(np.max(np.abs(host(found) - host(expected)), initial=0.0)),
    }


def main() -> None:
    warnings.simplefilter("ignore")  # of models that are not to converge here
    clients = DOWNLOADING if os.environ.get("GPUREMOTE_DOWNLOAD") == "allow" else CLIENTS
    x, y = xp.asarray(POINTS), xp.asarray(LABELS)
    json.dump({name: run(client, x, y) for name, client in clients.items()}, sys.stdout)


if __name__ == "__main__":
    main()
