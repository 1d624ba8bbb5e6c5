"""Sharpness-aware minimisation: gradients at the nearby weights with about the highest loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SharpnessAware:
    """Moves the weights uphill while the gradient of a batch is computed.

    rho: L2 norm of that perturbation, over all trainable weights; with 0 the methods do nothing. Each batch
    of each process has its own perturbation, as in the paper. BatchNorms update their statistics at the
    original weights only, and both passes use the same dropout mask.

    Source: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, 2021.
    """

    def __init__(self, rho: float) -> None:
        self.rho = rho
        self._in_step = False
        self._exact: list[tuple[nn.Parameter, Tensor]] = []
        self._held: list[_BatchNorm] = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Let `climb` move the weights until the block ends; then restore them bit for bit."""
        self._in_step = self.rho > 0
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, value in self._exact:
                    parameter.copy_(value)
            for norm in self._held:
                norm.track_running_stats = True
            self._in_step, self._exact, self._held = False, [], []

    def climb(self, model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> None:
        """Move the weights of a model by `rho` along the gradient of its loss; outside a step, do nothing.

        model: not wrapped for distribution, so that no process waits for another. loss: may be scaled by any
        factor. Without a finite gradient, as after an overflow in float16, the weights do not move.
        """
        if not self._in_step:
            return
        trained = [p for p in model.parameters() if p.requires_grad]
        devices = {p.device for p in trained if p.device.type == "cuda"}
        with torch.enable_grad(), torch.random.fork_rng(devices=[d.index for d in devices]):
            found = torch.autograd.grad(loss(model), trained, allow_unused=True)
        pairs = [
            (p, gradient)
            for p, gradient in zip(trained, found, strict=True)
            if gradient is not None
        ]
        with torch.no_grad():
            norm = torch.stack([gradient.float().norm() for _, gradient in pairs]).norm()
            length = torch.where(norm.isfinite() & (norm > 0), self.rho / norm, 0.0)
            for parameter, gradient in pairs:
                self._exact.append((parameter, parameter.clone()))
                parameter.add_(torch.nan_to_num(gradient, 0.0, 0.0, 0.0) * length)
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
                module.track_running_stats = False
                self._held.append(module)
