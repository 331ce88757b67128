"""A linear classifier on features."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vfm_vae.finite import check_finite


class LinearProbe:
    """Logistic regression on standardised features, fitted to convergence by L-BFGS on the features' device.

    Minimises the sum of cross-entropies plus half the squared weights (biases are free), in float32.

    Args:
        features: Features of the training images, `[n, d]`.
        labels: Their classes, int64 `[n]`.
        max_iterations: Largest number of L-BFGS iterations.

    Raises:
        ValueError: there are fewer than two classes, features and labels don't belong together, or features hold nan
            or inf.
    """

    def __init__(self, features: Tensor, labels: Tensor, max_iterations: int = 500) -> None:
        if features.ndim != 2 or len(features) != len(labels):
            raise ValueError(
                f"features and labels: [n, d] and [n] are wanted; got {tuple(features.shape)} and {tuple(labels.shape)}"
            )
        self.classes, targets = labels.unique(return_inverse=True)
        if len(self.classes) < 2:
            raise ValueError(f"labels: a probe tells classes apart, but there are {len(self.classes)}")
        check_finite("features", features)
        features = features.detach().float()
        self._mean, std = features.mean(0), features.std(0)
        self._scale = torch.where(std > 0, std, 1)
        self._weight = torch.zeros(len(self.classes), features.shape[1], device=features.device)
        self._bias = torch.zeros(len(self.classes), device=features.device)
        self._fit(self._standardise(features), targets, max_iterations)

    # Validation runs without gradients, in which this is an island.
    @torch.inference_mode(False)
    @torch.enable_grad()
    def _fit(self, features: Tensor, targets: Tensor, max_iterations: int) -> None:
        features, targets = features.clone(), targets.clone()
        parameters = [self._weight.clone().requires_grad_(), self._bias.clone().requires_grad_()]
        weight, bias = parameters
        solver = torch.optim.LBFGS(
            parameters, max_iter=max_iterations, tolerance_grad=1e-5, history_size=20, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            solver.zero_grad()
            with torch.autocast(features.device.type, enabled=False):
                error = F.cross_entropy(F.linear(features, weight, bias), targets)
                value = error + weight.square().sum() / (2 * len(features))
            value.backward()
            return value

        solver.step(loss)
        self._weight, self._bias = weight.detach(), bias.detach()

    def predict(self, features: Tensor) -> Tensor:
        """The class of features `[B, d]` that is likeliest, int64 `[B]`, on their device.

        Raises:
            ValueError: if they hold nan or inf.
        """
        check_finite("features", features)
        with torch.autocast(features.device.type, enabled=False):
            logits = F.linear(self._standardise(features.detach().float()), self._weight, self._bias)
        return self.classes[logits.argmax(1)]

    def _standardise(self, features: Tensor) -> Tensor:
        return (features - self._mean) / self._scale
