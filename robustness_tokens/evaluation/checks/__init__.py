"""The 12 checks that an evaluation must pass before its numbers count; a report begins with them.

Sources: Carlini et al., "On Evaluating Adversarial Robustness", arXiv 1902.06705 (the list); Tramer et al., "On
Adaptive Attacks to Adversarial Example Defenses", arXiv 2002.08347; Croce & Hein, "Reliable evaluation of adversarial
robustness with an ensemble of diverse parameter-free attacks", arXiv 2003.01690.
"""

from __future__ import annotations

from ...report import Check
from ...utils import process_state, share_from_main
from ..measurements import Measurements
from . import comparisons, gradients
from .parts import CheckFunction


CHECKS: tuple[CheckFunction, ...] = (
    comparisons.white_box,
    comparisons.queries,
    comparisons.transfer,
    comparisons.noise,
    comparisons.steps,
    comparisons.restarts,
    comparisons.strength_order,
    comparisons.eps_sweep,
    comparisons.unbounded,
    gradients.gradients,
    comparisons.budget,
    gradients.attack_unit_test,
)


def run_checks(measurements: Measurements) -> list[Check]:
    """Returns the checks in the order of their numbers, the same on every process."""
    # Processes hold different images, so the main process alone probes the model.
    checks: list[Check] = share_from_main(lambda: [check(measurements) for check in CHECKS], process_state())
    return checks
