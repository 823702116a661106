"""The KL's coefficient: fixed, or steered towards a target (Ziegler et al. 2019, section 2.2)."""

from __future__ import annotations

MAX_ERROR = 0.2


class KLController:
    """Holds beta. `target` is the wanted KL in **nats a response** (the sum over its tokens); 0 keeps beta as it is.

    After `n` responses of mean KL k: `beta <- beta (1 + clip(k / target - 1, -0.2, 0.2) n / horizon)`.
    """

    def __init__(self, coef: float, target: float = 0.0, horizon: int = 10_000) -> None:
        self.coef = coef
        self._target = target
        self._horizon = horizon

    def update(self, kl_per_response: float, responses: int) -> None:
        """Learn the mean KL of `responses` new responses, over all ranks."""
        if self._target > 0:
            error = min(max(kl_per_response / self._target - 1, -MAX_ERROR), MAX_ERROR)
            self.coef *= 1 + error * responses / self._horizon
