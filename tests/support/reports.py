"""Small reports, and texts that try to be markup."""

from pathlib import Path
from typing import Any

from robustness_tokens.configuration import state_digest
from robustness_tokens.hub import load_adapter
from robustness_tokens.report import Check, MeasuredImages, Result, RobustnessReport


def make_result(**changes: Any) -> Result:
    values: dict[str, Any] = {
        "task": "classification",
        "metric": "accuracy",
        "value": 0.25,
        "confidence_interval": (0.2, 0.3),
        "tokens": "trained",
        "knowledge": "full",
        "attack": "pgd_cross_entropy",
        "attack_parameters": {"num_steps": 20, "step_size": 2 / 255, "seeds": [1, 2], "random_start": True, "p": None},
        "eps": 16 / 255,
        "num_images": 500,
        "seed": 3,
    }
    return Result(**{**values, **changes})


CLEAN: dict[str, Any] = {"knowledge": None, "attack": None, "attack_parameters": {}, "eps": 0.0}


def make_report(**changes: Any) -> RobustnessReport:
    values: dict[str, Any] = {
        "package_version": "0.1.0",
        "adapter": "user/adapter",
        "base_model": "facebook/dinov2-small",
        "base_model_revision": "0123abcd",
        "dataset": {"name": "user/pictures", "split": "test", "num_images": 500},
        "budget": "standard",
        "seed": 3,
        "results": [make_result(), make_result(value=0.9, confidence_interval=None, **CLEAN)],
        "checks": [Check(number=4, name="white box", passed=True, value="25% <= 40%", explanation="at most grey box")],
        "series": {"accuracy by eps, full": [0.9, 0.5, 0.25]},
        "seconds": 12.5,
    }
    return RobustnessReport(**{**values, **changes})


def report_on(folder: Path, **changes: Any) -> RobustnessReport:
    """A report on the adapter in a folder."""
    return make_report(adapter_digest=state_digest(load_adapter(folder).state), **changes)


# Ten images, of which the first, the fourth and the last two are correct.
KEPT: dict[str, Any] = {"value": 0.4, "confidence_interval": None, "num_images": 10, "correct_bits": "kMA="}
IMAGES = MeasuredImages(rows=[4, 0, 2, 9, 5, 1, 3, 7, 8, 6], sha256="0123456789abcdef" * 4)
MEASURED: dict[str, Any] = {
    "dataset": {"name": "user/pictures", "split": "test", "num_images": 10},
    "images": IMAGES,
    "results": [make_result(**KEPT), make_result(**{**KEPT, "num_images": 4, "value": 0.5, "correct_bits": "kA=="})],
}


HOSTILE = [
    "[click](http://evil.example)",
    "![x](http://evil.example/x.png)",
    "<script>alert(1)</script>",
    "<http://evil.example>",
    "http://evil.example",
    "see HTTPS://evil.example and www.evil.example or mail me@evil.example",
    "a | b | c",
    "a \\| [b](http://evil.example)",
    "` [b](http://evil.example) `",
    "``` ` `` <b>",
    "line\n\n# heading\n\n- item",
    "line\r\n<!-- robustness_tokens:end -->\r\n",
    "\u2028# heading\u2028",
    "\u202egnp.exe\x1b[31m\x00",
    "\ud800",
    "&lt;script&gt; &#60;b&#62;",
    "*bold* _it_ ~~gone~~ $x$ $$y$$",
    "\\",
    "`",
]
