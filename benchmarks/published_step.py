"""A training step as the published implementation takes it, written from its description, faults and all.

The backbone is not frozen and runs in float32, each of the attack's backward passes goes through everything and adds
up gradients of all weights, the targets are computed twice, clean and attacked images go through the model apart, and
the attacked images go through the model without tokens at every step, to log a baseline.

Source: https://github.com/BrianPulfer/robustness-tokens, and Pulfer et al., ECCV 2024, arXiv 2503.10191.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Model


_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PublishedStep:
    """One step after the other on the same images.

    Args:
        backbone: In eval mode. It is not frozen, and its weights gather gradients.
        num_tokens: Robustness tokens.
        num_attack_steps: Of the attack (published: 30).
    """

    def __init__(self, backbone: Dinov2Model, *, num_tokens: int = 10, num_attack_steps: int = 30) -> None:
        self.backbone = backbone.requires_grad_(True)
        self.num_attack_steps = num_attack_steps
        self.tokens = nn.Parameter(0.01 * torch.randn(1, num_tokens, backbone.config.hidden_size))
        self.optimizer = torch.optim.Adam([self.tokens], lr=1e-3)
        self.mean, self.std = torch.tensor(_MEAN).view(3, 1, 1), torch.tensor(_STD).view(3, 1, 1)

    def features(self, pixel_values: Tensor, tokens: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) normalised images -> (B, N, D); tokens, (1, K, D), enter last and are dropped."""
        hidden_states = self.backbone.embeddings(pixel_values)
        length = hidden_states.shape[1]
        if tokens is not None:
            hidden_states = torch.cat([hidden_states, tokens.expand(len(hidden_states), -1, -1)], dim=1)
        for layer in self.backbone.encoder.layer:
            hidden_states = layer(hidden_states)
        normalised: Tensor = self.backbone.layernorm(hidden_states)
        return normalised[:, :length]

    def attack(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) normalised images -> attacked ones, on the 8-bit grid."""
        clean_images = self._unnormalise(pixel_values)
        with torch.no_grad():
            target = self.features(pixel_values)
        lowest, highest = pixel_values.min(), pixel_values.max()
        attacked = pixel_values + 0.01 * torch.randn_like(pixel_values)
        for _ in range(self.num_attack_steps):
            attacked = attacked.detach().requires_grad_()
            mse = F.mse_loss(self._unnormalise(attacked), clean_images)
            loss = F.cosine_similarity(self.features(attacked), target).mean() + mse
            loss.backward()
            assert attacked.grad is not None
            with torch.no_grad():
                attacked = attacked - 0.01 * attacked.grad.sign()
                attacked = pixel_values + (attacked - pixel_values).clamp(-8 / 255, 8 / 255)
                attacked = attacked.clamp(lowest, highest)
            if mse >= 1e-4:
                break
        images = (self._unnormalise(attacked.detach()).clamp(0, 1) * 255).floor() / 255
        return (images - self.mean) / self.std

    def __call__(self, images: Tensor) -> dict[str, float]:
        """Takes a step.

        Args:
            images: (B, 3, H, W) float in [0, 1].

        Returns:
            The three cosines that it logs.
        """
        pixel_values = (images - self.mean) / self.std
        attacked = self.attack(pixel_values)
        with torch.no_grad():
            target = self.features(pixel_values)
        invariance = F.cosine_similarity(self.features(pixel_values, self.tokens), target).mean()
        adversarial = F.cosine_similarity(self.features(attacked, self.tokens), target).mean()
        self.optimizer.zero_grad()
        (-(invariance + adversarial)).backward()
        self.optimizer.step()
        with torch.no_grad():
            baseline = F.cosine_similarity(self.features(attacked), target).mean()
        cosines = {"invariance_cosine": invariance, "adversarial_cosine": adversarial, "baseline_cosine": baseline}
        return {name: value.item() for name, value in cosines.items()}

    def _unnormalise(self, pixel_values: Tensor) -> Tensor:
        return pixel_values * self.std + self.mean
