from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustness_tokens import Normalizer, RobustnessTokenForImageClassification, RobustnessTokenModel, inject_tokens
from robustness_tokens.configuration import TOKENS
from robustness_tokens.evaluation.attack_suite import Attack, AttackBatch, run_attack
from robustness_tokens.evaluation.threat_models import EvaluatedModel, attacker_views
from robustness_tokens.models import speedups
from robustness_tokens.models.heads import ClassificationHead, ProbedModel, SegmentationHead
from tests.support.bases import HIDDEN_SIZE, IMAGE_SIZE, NUM_LABELS, NUM_TOKENS, ONEDNN_BFLOAT16, build_base
from tests.support.families import FAMILIES


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def classifier() -> RobustnessTokenForImageClassification:
    model = RobustnessTokenForImageClassification.from_base(
        build_base("dinov2", classifier=True), num_robustness_tokens=NUM_TOKENS, initializer_range=1.0
    )
    return model


def test_functions_of_the_image_are_the_models_own(
    classifier: RobustnessTokenForImageClassification, images: Tensor
) -> None:
    evaluated = EvaluatedModel(classifier)
    pixel_values = evaluated.normalizer(images)
    with torch.no_grad():
        with classifier.disable_adapter():
            features, logits = classifier.get_features(pixel_values), classifier(pixel_values).logits
        assert torch.equal(evaluated.features(images, None), features)
        assert torch.equal(evaluated.logits(images, None), logits)
        assert torch.equal(evaluated.features(images, evaluated.tokens), classifier.get_features(pixel_values))
        assert torch.equal(evaluated.logits(images, evaluated.tokens), classifier(pixel_values).logits)
        assert not torch.equal(logits, classifier(pixel_values).logits)


@pytest.mark.parametrize("num_tokens", [1, NUM_TOKENS, 7])
def test_other_tokens_compute_what_a_model_with_them_does(
    classifier: RobustnessTokenForImageClassification, images: Tensor, num_tokens: int
) -> None:
    own = torch.randn(num_tokens, HIDDEN_SIZE)
    evaluated = EvaluatedModel(classifier)
    with torch.no_grad():
        before = evaluated.logits(images, evaluated.tokens)
        found = evaluated.logits(images, {TOKENS: own})
        other = inject_tokens(build_base("dinov2", classifier=True), own)
        assert torch.allclose(found, other(evaluated.normalizer(images)).logits, atol=1e-6)
        assert torch.equal(evaluated.logits(images, evaluated.tokens), before)


def test_the_gradient_reaches_the_images_and_not_the_tokens(
    classifier: RobustnessTokenForImageClassification, images: Tensor
) -> None:
    evaluated = EvaluatedModel(classifier)
    logits = evaluated.logits(images.requires_grad_(), evaluated.tokens)
    logits.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0
    assert classifier.robustness_tokens.grad is None


def test_attacks_may_be_in_bfloat16_but_measurements_are_exact(
    classifier: RobustnessTokenForImageClassification, images: Tensor
) -> None:
    classifier.config.training = {"mixed_precision": "bf16"}
    half, full = EvaluatedModel(classifier), EvaluatedModel(classifier, attack_precision="no")
    with torch.no_grad():
        assert half.logits(images, None).dtype == torch.float32
        assert not torch.equal(half.logits(images, None), full.logits(images, None))
        assert torch.equal(half.logits(images, None, exact=True), full.logits(images, None))


def test_attacks_are_in_float32_where_the_device_has_no_bfloat16(
    classifier: RobustnessTokenForImageClassification, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speedups, "has_bfloat16", lambda device_type: False)
    classifier.config.training = {"mixed_precision": "bf16"}
    for evaluated in (EvaluatedModel(classifier), EvaluatedModel(classifier, attack_precision="bf16")):
        assert evaluated.attack_precision == "no"  # as the report has it
        with torch.no_grad(), evaluated.attacked_faster():
            assert classifier.get_base_model().config._attn_implementation == "sdpa"
        with torch.no_grad():
            assert torch.equal(evaluated.logits(images, None), evaluated.logits(images, None, exact=True))


def test_an_unknown_precision_is_an_error(classifier: RobustnessTokenForImageClassification) -> None:
    unknown: Any = "fp16"
    with pytest.raises(ValueError, match=r"attack_precision must be one of \('no', 'bf16'\), got 'fp16'"):
        EvaluatedModel(classifier, attack_precision=unknown)


@pytest.mark.parametrize(("precision", "attention"), [("bf16", "eager"), ("no", "sdpa")])
def test_attacks_compute_faster_and_leave_nothing_behind(
    classifier: RobustnessTokenForImageClassification,
    images: Tensor,
    precision: Any,
    attention: str,
    onednn_everywhere: None,
) -> None:
    evaluated, base = EvaluatedModel(classifier, attack_precision=precision), classifier.get_base_model()
    before = {module: type(module) for module in classifier.modules()}
    with torch.no_grad():
        expected = evaluated.logits(images, evaluated.tokens, exact=True)

    def inside() -> None:
        assert base.config._attn_implementation == attention
        swapped = {plain for module, plain in before.items() if type(module) is not plain}
        has_products = precision == "no" or ONEDNN_BFLOAT16
        assert swapped == ({nn.Linear, nn.Conv2d} if has_products else set())
        if precision == "no":
            with torch.no_grad():
                assert torch.allclose(evaluated.logits(images, evaluated.tokens), expected, atol=1e-5)

    def outside() -> None:
        assert base.config._attn_implementation == "sdpa"
        assert {module: type(module) for module in classifier.modules()} == before
        with torch.no_grad():
            assert torch.equal(evaluated.logits(images, evaluated.tokens, exact=True), expected)

    def fail() -> None:
        with evaluated.attacked_faster():
            inside()
            raise KeyboardInterrupt

    outside()
    with evaluated.attacked_faster():
        inside()
    outside()
    with pytest.raises(KeyboardInterrupt):
        fail()
    outside()


def test_an_attack_runs_in_it(
    classifier: RobustnessTokenForImageClassification, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated, seen = EvaluatedModel(classifier, attack_precision="bf16"), set()
    real = EvaluatedModel.logits

    def spy(self: EvaluatedModel, *args: Any, **kwargs: Any) -> Tensor:
        seen.add(classifier.get_base_model().config._attn_implementation)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(EvaluatedModel, "logits", spy)
    batch = AttackBatch(images=images, labels=torch.zeros(3, dtype=torch.int64), index=torch.arange(3))
    attack = Attack(name="cross_entropy", num_steps=1, num_restarts=1)
    run_attack(attack, attacker_views("full", evaluated)[0], batch, eps=0.1, seed=0)
    assert seen == {"eager"}


def test_what_a_level_may_differentiate(classifier: RobustnessTokenForImageClassification) -> None:
    evaluated = EvaluatedModel(classifier)
    own = [{TOKENS: torch.zeros_like(classifier.robustness_tokens)}, {TOKENS: torch.ones(3, HIDDEN_SIZE)}]
    (queries,) = attacker_views("none", evaluated)
    assert not queries.differentiable
    assert attacker_views("none", evaluated, surrogate=evaluated)[1].is_surrogate
    (base,) = attacker_views("base", evaluated)
    assert base.tokens == (None,)
    views = attacker_views("own_tokens", evaluated, own_tokens=own)
    assert [view.name for view in views] == ["own_tokens_0", "own_tokens_1", "own_tokens_ensemble"]
    assert [view.tokens for view in views[:2]] == [(own[0],), (own[1],)]
    assert all(found is expected for found, expected in zip(views[2].tokens, own, strict=True))
    (full,) = attacker_views("full", evaluated)
    assert torch.equal(full.tokens[0][TOKENS], classifier.robustness_tokens)  # type: ignore[index]  # not None
    assert len({view.name for level in (views, [queries, base, full]) for view in level}) == 6


def test_own_tokens_must_be_there(classifier: RobustnessTokenForImageClassification) -> None:
    with pytest.raises(ValueError, match="own_tokens"):
        attacker_views("own_tokens", EvaluatedModel(classifier))
    with pytest.raises(ValueError, match="knowledge must be among"):
        attacker_views("all", EvaluatedModel(classifier))  # type: ignore[arg-type]


def test_the_task_is_what_the_model_says() -> None:
    model = RobustnessTokenModel.from_base(build_base("dinov2"))
    assert EvaluatedModel(model).task == "features"
    for head in (ClassificationHead(2 * HIDDEN_SIZE, 4), SegmentationHead(HIDDEN_SIZE, 4)):
        assert EvaluatedModel(ProbedModel(model, head)).task == head.task
    with pytest.raises(ValueError, match="has no head"):
        EvaluatedModel(model, task="classification")
    injected: Any = inject_tokens(build_base("dinov2", classifier=True), torch.zeros(2, HIDDEN_SIZE))
    normalizer = Normalizer([0.5] * 3, [0.5] * 3)
    assert EvaluatedModel(injected, normalizer=normalizer).task == "classification"
    with pytest.raises(ValueError, match="normalizer is not given"):
        EvaluatedModel(injected)
    with pytest.raises(ValueError, match="without robustness tokens"):
        EvaluatedModel(build_base("dinov2"))


def test_pixel_logits_have_the_size_of_the_labels(images: Tensor) -> None:
    model = RobustnessTokenModel.from_base(build_base("dinov2"))
    evaluated = EvaluatedModel(ProbedModel(model, SegmentationHead(HIDDEN_SIZE, NUM_LABELS)))
    assert evaluated.pixel_logits(images, None, (32, 24)).shape == (3, NUM_LABELS, 32, 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["beit_classifier", "siglip_classifier", "timm_eva_classifier"])
def test_injected_classifiers_in_half_precision_take_float32_images(
    name: str, dtype: torch.dtype, images: Tensor
) -> None:
    model = inject_tokens(FAMILIES[name].build().to(dtype), torch.randn(NUM_TOKENS, HIDDEN_SIZE))
    normalizer = Normalizer([0.5] * 3, [0.5] * 3)
    evaluated = EvaluatedModel(model, task="classification", normalizer=normalizer, feature_view="patches")
    with torch.no_grad():
        expected = model(pixel_values=normalizer(images).to(dtype)).logits
        assert torch.equal(evaluated.logits(images, evaluated.tokens), expected.float())
        assert evaluated.features(images, None).dtype == torch.float32
