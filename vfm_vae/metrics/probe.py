"""What a linear classifier reads from features."""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, from_numpy


class LinearProbe:
    """Logistic regression on standardised features, fitted to convergence by L-BFGS.

    Args:
        features: of the training images, `[n, d]`.
        labels: their classes, int64 `[n]`.
        max_iterations: of L-BFGS.
    """

    def __init__(self, features: Tensor, labels: Tensor, max_iterations: int = 500) -> None:
        classifier = LogisticRegression(max_iter=max_iterations)
        self._pipeline = make_pipeline(StandardScaler(), classifier).fit(_numpy(features), _numpy(labels))

    def predict(self, features: Tensor) -> Tensor:
        """The class of features `[B, d]` that is likeliest, int64 `[B]`, on their device."""
        return from_numpy(self._pipeline.predict(_numpy(features))).to(features.device)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy() if tensor.is_floating_point() else tensor.cpu().numpy()
