"""Back to the tokens of the last finite loss, where a run has diverged."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from .modeling import RobustnessTokenPreTrainedModel
from .training_args import MixedPrecision
from .training_step import base_features, compute_features


class LastGoodTokens:
    """Keeps the tokens with which the loss was last seen to be finite.

    Args:
        model: That is trained.
    """

    def __init__(self, model: RobustnessTokenPreTrainedModel) -> None:
        self._model = model
        self._kept: tuple[Tensor, int] | None = None

    def keep(self, step: int) -> None:
        """Notes that the loss is finite with the tokens as they are after so many steps."""
        self._kept = (self._model.robustness_tokens.detach().clone(), step)

    @torch.no_grad()
    def are_broken(self, pixel_values: Tensor, *, mixed_precision: MixedPrecision, accelerator: Accelerator) -> bool:
        """Whether the tokens in the model, and not the base alone, make features that are not finite.

        Args:
            pixel_values: (B, 3, H, W) normalised images of this process.
            mixed_precision: Of the training.
            accelerator: Of the training; all processes are told the same.
        """
        broken = not _are_finite(compute_features(self._model, pixel_values, mixed_precision=mixed_precision))
        if broken:
            broken = _are_finite(base_features(self._model, pixel_values, mixed_precision=mixed_precision))
        return bool(accelerator.reduce(torch.tensor(float(broken), device=pixel_values.device)) > 0)

    @torch.no_grad()
    def go_back(
        self, pixel_values: Tensor, *, step: int, mixed_precision: MixedPrecision, accelerator: Accelerator
    ) -> int | None:
        """Puts the kept tokens back, unless those in the model are as good, and the base alone is at fault.

        Args:
            pixel_values: (B, 3, H, W) normalised images, to see who is at fault.
            step: Optimiser steps done.
            mixed_precision: Of the training.
            accelerator: Of the training; all processes do the same.

        Returns:
            The step after which the model had the tokens that it has now; None where they are broken, and none are
            kept, as in a run that began with them.
        """
        tokens = self._model.robustness_tokens
        broken = self.are_broken(pixel_values, mixed_precision=mixed_precision, accelerator=accelerator)
        if not broken and tokens.isfinite().all():
            return step
        if self._kept is None:
            return None
        kept, step_of_kept = self._kept
        tokens.copy_(kept)
        return step_of_kept


def _are_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
