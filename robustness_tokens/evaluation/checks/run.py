"""The 17 checks of an evaluation, which its report leads with.

Sources: Carlini et al., "On Evaluating Adversarial Robustness", arXiv 1902.06705 (the list); Tramer et al., "On
Adaptive Attacks to Adversarial Example Defenses", arXiv 2002.08347; Croce & Hein, "Reliable evaluation of adversarial
robustness with an ensemble of diverse parameter-free attacks", arXiv 2003.01690.
"""

from __future__ import annotations

from ...report import Check
from ...utils import process_state, share_from_main
from ..measurements import Measurements
from . import attackers, convergence, gradients
from .parts import CheckFunction


CHECKS: tuple[CheckFunction, ...] = (
    attackers.clean_cost,
    attackers.grey_box,
    attackers.own_tokens,
    attackers.white_box,
    attackers.feature_adaptive,
    attackers.queries,
    attackers.transfer,
    attackers.noise,
    convergence.steps,
    convergence.restarts,
    convergence.strength_order,
    convergence.eps_sweep,
    convergence.unbounded,
    gradients.gradients,
    convergence.budget,
    gradients.attack_unit_test,
    attackers.baselines,
)


def run_checks(measurements: Measurements) -> list[Check]:
    """Judges what was measured, and probes the model on a few images.

    Args:
        measurements: Of all images, the same on every process; the main process probes the model on its own batches.

    Returns:
        The checks in the order of their numbers, the same on every process.
    """
    # Each process holds other images, and so would probe the model on others.
    checks: list[Check] = share_from_main(lambda: [check(measurements) for check in CHECKS], process_state())
    return checks
