"""The exact denoiser of a finite list of images: what a network would say that had learned the list by heart, and the density that it stands for."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

PREDICTIONS = ("epsilon", "v", "x0", "flow", "edm")
# Numbers in a table of samples x images, fp64: the samples go by in groups of which it holds so many.
TABLE = 4 << 20


class Levels(Protocol):
    """What is asked of a fastdiff.Schedule."""

    @property
    def name(self) -> str: ...
    @property
    def timesteps(self) -> int: ...
    @property
    def preserving(self) -> bool: ...
    def noise_at(self, t: float) -> tuple[float, float]: ...


class IdealDenoiser(nn.Module):
    """`model(x, t[, labels])` says, as `prediction` has it, E[x_0 | x_t] where x_0 is one of a list of images.

    images: [K, *shape], of any shape, points in the plane included. weights: how likely each is, [K], not all 0; alike by default. labels: int64 [K],
    so that `labels` of a call, [N] in 0 .. num_classes, leave each sample its class's images, or with num_classes all of them.

    The posterior of x_t = alpha x_0 + sigma z over the list is softmax(-|x_t - alpha x_k|^2 / (2 sigma^2) + ln w_k), and its mean is the denoiser
    of least squared error (Vincent 2011, section 4; Karras et al. 2022, equation 57 in appendix B.3). t: [N] or one for all; a timestep or a fraction
    between two, as `Schedule.noise_at` has it; sigma itself for a schedule of "edm", and ln(sigma / alpha) / 4 of an x scaled by c_in for a prediction
    of "edm", as EDM's networks take it. Computed in float64, answered in x's dtype; gradients are exact. ValueError for what does not fit.
    """

    images: Tensor
    log_weights: Tensor
    kinds: Tensor | None

    def __init__(
        self,
        images: Tensor,
        schedule: Levels,
        prediction: str = "x0",
        weights: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        if not isinstance(images, Tensor) or images.ndim < 2 or not len(images) or not images.is_floating_point():
            raise ValueError("images must be a tensor of floating-point numbers, [K, *shape] of at least one")
        if not bool(images.isfinite().all()):
            raise ValueError("images hold numbers that are not finite")
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction is {prediction!r}; known: {', '.join(PREDICTIONS)}")
        if prediction == "v" and not schedule.preserving:
            raise ValueError(f"prediction 'v' is defined where alpha^2 + sigma^2 = 1, not for a schedule of {schedule.name!r}")
        count = len(images)
        self.schedule, self.prediction, self.sigma_data = schedule, prediction, sigma_data
        self.shape = tuple(images.shape[1:])
        weights = torch.ones(count) if weights is None else torch.as_tensor(weights)
        if weights.shape != (count,) or not bool(((weights >= 0) & weights.isfinite()).all()) or not bool((weights > 0).any()):
            raise ValueError(f"weights must be {count} finite numbers, one an image, none below 0 and not all 0")
        self.num_classes = None
        if labels is not None:
            labels = torch.as_tensor(labels)
            if labels.shape != (count,) or labels.dtype != torch.int64 or int(labels.min()) < 0:
                raise ValueError(f"labels must be int64 [{count}], one an image, none below 0")
            self.num_classes = int(labels.max()) + 1
            held = torch.zeros(self.num_classes, dtype=torch.float64).index_add_(0, labels.cpu(), weights.detach().cpu().double())
            if not bool((held > 0).all()):
                raise ValueError(f"class {int((held == 0).int().argmax())} has no image of positive weight")
        self.register_buffer("images", images.detach().double().flatten(1).clone())  # [K, D]
        self.register_buffer("log_weights", (weights.detach().double() / weights.double().sum()).log().to(images.device))
        self.register_buffer("kinds", None if labels is None else labels.detach().to(images.device))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """[N, *shape], what `prediction` asks for, in x's dtype."""
        if self.prediction == "edm":
            self._fits(x)
            k = torch.exp(4 * self._column(t, x))
            spread = (k**2 + self.sigma_data**2).sqrt()  # Karras et al. 2022, table 1
            at = x.double().flatten(1) * spread
            x0 = self._mean(at, torch.ones_like(k), k, labels)
            m = (x0 - self.sigma_data**2 / spread**2 * at) * spread / (k * self.sigma_data)
        else:
            alpha, sigma = self._levels(x, t)
            at = x.double().flatten(1)
            x0 = self._mean(at, alpha, sigma, labels)
            if self.prediction == "x0":
                m = x0
            else:
                z = (at - alpha * x0) / self._noisy(sigma, self.prediction)
                m = {"epsilon": z, "v": alpha * z - sigma * x0, "flow": z - x0}[self.prediction]
        return m.reshape(x.shape).to(x.dtype)

    def posterior(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """How likely it is that x [N, *shape] at t came from each image, fp64 [N, K]; the rows' sums are 1."""
        alpha, sigma = self._levels(x, t)
        return torch.softmax(self._logits(x.double().flatten(1), alpha, sigma, labels), dim=1)

    def score(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """grad_x ln p_t(x) = (alpha E[x_0 | x] - x) / sigma^2, fp64 [N, *shape] (Vincent 2011; Efron 2011, equation 1.4)."""
        alpha, sigma = self._levels(x, t)
        at = x.double().flatten(1)
        return ((alpha * self._mean(at, alpha, sigma, labels) - at) / self._noisy(sigma, "the score") ** 2).reshape(x.shape)

    def log_density(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """ln p_t(x) = ln sum_k w_k N(x; alpha x_k, sigma^2), of the noised list, or of a label's part of it, in nats, fp64 [N]."""
        alpha, sigma = self._levels(x, t)
        self._noisy(sigma, "the density")
        at, dims = x.double().flatten(1), self.images.shape[1]
        found = [
            torch.logsumexp(self._logits(at[i], alpha[i], sigma[i], None if labels is None else labels[i]), dim=1)
            for i in self._groups(len(x))
        ]
        whole = torch.cat(found) if found else at.new_zeros(0)
        return whole - dims * (sigma[:, 0].log() + math.log(2 * math.pi) / 2)

    def _mean(self, at: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """E[x_0 | x], fp64 [N, D]."""
        images = self.images.double()
        found = [
            torch.softmax(self._logits(at[i], alpha[i], sigma[i], None if labels is None else labels[i]), dim=1) @ images
            for i in self._groups(len(at))
        ]
        return torch.cat(found) if found else torch.zeros_like(at)

    def _logits(self, at: Tensor, alpha: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """ln (w_k N(x; alpha x_k, sigma^2)) but for the Gaussian's constant, fp64 [N, K]; -inf where a label leaves an image out."""
        images, weights = self.images.double(), self.log_weights.double()
        squares = at.square().sum(1, keepdim=True) - 2 * alpha * (at @ images.T) + alpha**2 * images.square().sum(1)
        # Without any noise it is the nearest image: a limit that is reached well above what underflows.
        logits = weights - squares / (2 * sigma.clamp(min=1e-100) ** 2)
        if labels is None:
            return logits
        if self.kinds is None or self.num_classes is None:
            raise ValueError("labels were given to a denoiser of images without labels")
        if labels.shape != at.shape[:1] or not bool(((labels >= 0) & (labels <= self.num_classes)).all()):
            raise ValueError(f"labels must be one a sample, in 0 .. {self.num_classes}, of which {self.num_classes} is any class")
        own = (labels[:, None] == self.kinds) | (labels[:, None] == self.num_classes)  # [N, K]
        shares = torch.where(own, weights, -math.inf)
        return torch.where(own, logits, -math.inf) - torch.logsumexp(shares, dim=1, keepdim=True)

    def _levels(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, fp64 [N, 1] each."""
        self._fits(x)
        column = self._column(t, x)
        if self.schedule.name == "edm":
            if bool((column < 0).any()):
                raise ValueError("t is sigma itself for a schedule of 'edm', and never below 0")
            return torch.ones_like(column), column
        steps, place = torch.unique(column[:, 0].cpu(), return_inverse=True)
        last = self.schedule.timesteps - 1
        if len(steps) and not 0 <= steps[0] <= steps[-1] <= last:
            raise ValueError(f"t holds {steps[0]:g} to {steps[-1]:g}; this schedule has timesteps 0 to {last}")
        known = torch.from_numpy(np.array([self.schedule.noise_at(v) for v in steps.tolist()], np.float64).reshape(-1, 2))
        levels = known[place].to(x.device)
        return levels[:, :1], levels[:, 1:]

    def _fits(self, x: Any) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or tuple(x.shape[1:]) != self.shape:
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x is {got}; the images of the list ask for floating-point numbers [N, {', '.join(map(str, self.shape))}]")

    def _column(self, t: Tensor, x: Tensor) -> Tensor:
        """t as fp64 [N, 1]."""
        t = torch.as_tensor(t, device=x.device).double()
        if t.numel() != 1 and t.shape != x.shape[:1]:
            raise ValueError(f"t has shape {list(t.shape)}; give one for all or one a sample, [{len(x)}]")
        return t.reshape(-1, 1).expand(len(x), 1)

    def _noisy(self, sigma: Tensor, what: str) -> Tensor:
        if not bool((sigma > 0).all()):
            raise ValueError(f"without noise {what} is not defined; take a later timestep, or a prediction of x0")
        return sigma

    def _groups(self, n: int) -> list[slice]:
        """Samples whose tables are made at a time."""
        many = max(TABLE // len(self.images), 1)
        return [slice(i, i + many) for i in range(0, n, many)]
