"""The 17 checks of an evaluation, which its report leads with.

Sources: Carlini et al., "On Evaluating Adversarial Robustness", arXiv 1902.06705 (the list); Tramer et al., "On
Adaptive Attacks to Adversarial Example Defenses", arXiv 2002.08347; Croce & Hein, "Reliable evaluation of adversarial
robustness with an ensemble of diverse parameter-free attacks", arXiv 2003.01690.
"""

from __future__ import annotations

from ..acceleration import process_state, share_from_main
from ..report.schema import Check
from . import attack_checks, knowledge_checks, probing_checks
from .check_parts import CheckFunction
from .measurements import Measurements


CHECKS: tuple[CheckFunction, ...] = (
    knowledge_checks.clean_cost,
    knowledge_checks.grey_box,
    knowledge_checks.own_tokens,
    knowledge_checks.white_box,
    knowledge_checks.feature_adaptive,
    knowledge_checks.queries,
    knowledge_checks.transfer,
    knowledge_checks.noise,
    attack_checks.steps,
    attack_checks.restarts,
    attack_checks.strength_order,
    attack_checks.eps_sweep,
    attack_checks.unbounded,
    probing_checks.gradients,
    attack_checks.budget,
    probing_checks.attack_unit_test,
    knowledge_checks.baselines,
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
