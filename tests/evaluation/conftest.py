from collections.abc import Iterator

import pytest

from robustness_tokens.evaluation import evaluate


@pytest.fixture(scope="package", autouse=True)
def figures_are_not_drawn() -> Iterator[None]:
    """Drawing takes three times as long as a tiny evaluation; the tests of figures call `make_figures` themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "make_figures", lambda *args: {"layers.png": b"not drawn"})
        yield
