from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from robustness_tokens.models import onednn
from robustness_tokens.models.modeling import RobustnessTokenModel
from robustness_tokens.models.onednn import has_avx512, onednn_is_faster, onednn_products, packed_once
from robustness_tokens.models.speedups import computing_faster
from robustness_tokens.training.arguments import RobustnessTokenTrainingArguments
from robustness_tokens.training.trainer import RobustnessTokenTrainer
from tests.support.bases import ONEDNN_BFLOAT16, input_gradient


PACKED_PRECISIONS = [
    torch.float32,
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not ONEDNN_BFLOAT16, reason="this processor has no bfloat16")
    ),
]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

BaseFactory = Callable[..., Any]
ModelFactory = Callable[..., RobustnessTokenModel]


@pytest.mark.parametrize(
    ("device", "half_precision", "avx512", "mkl", "expected"),
    [
        (CPU, True, False, True, True),
        (CPU, False, True, True, True),
        (CPU, False, False, True, False),
        (CPU, False, False, False, True),  # ARM, say
        (CUDA, True, True, True, False),
    ],
)
def test_onednn_is_taken_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    half_precision: bool,
    avx512: bool,
    mkl: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr(onednn, "has_avx512", lambda: avx512)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert onednn_is_faster(device=device, half_precision=half_precision) is expected


@pytest.mark.parametrize(("capability", "expected"), [("AVX2", False), ("AVX512", True), ("DEFAULT", False)])
def test_avx512_is_asked_of_torch(monkeypatch: pytest.MonkeyPatch, capability: str, expected: bool) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert has_avx512() is expected  # the real one, of this module's import


@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_layers_are_swapped_only_where_that_is_faster_and_asked_for(
    make_model: ModelFactory, monkeypatch: pytest.MonkeyPatch, avx512: bool, asked: bool
) -> None:
    monkeypatch.setattr(onednn, "has_avx512", lambda: avx512)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    base = make_model().get_base_model()
    with computing_faster(base, device=CPU, half_precision=False, onednn=asked):
        plain = nn.Linear in {type(module) for module in base.modules()}
    assert plain is not (avx512 and asked)


def test_onednn_computes_the_same_and_leaves_nothing_behind(make_model: ModelFactory, pixel_values: Tensor) -> None:
    model = make_model()
    expected = input_gradient(model, pixel_values)
    classes = [type(module) for module in model.modules()]
    with onednn_products(model.get_base_model()):
        assert nn.Linear not in {type(module) for module in model.get_base_model().modules()}
        assert nn.Conv2d not in {type(module) for module in model.get_base_model().modules()}
        gradient = input_gradient(model, pixel_values)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("dtype", PACKED_PRECISIONS)
def test_every_product_is_onednns_forward_and_backward(
    make_model: ModelFactory, pixel_values: Tensor, dtype: torch.dtype
) -> None:
    model = make_model()
    count = sum(isinstance(module, nn.Linear | nn.Conv2d) for module in model.get_base_model().modules())
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    with onednn_products(model.get_base_model(), dtype=dtype), autocast, profile() as found:
        input_gradient(model, pixel_values)
    calls = {event.key: event.count for event in found.key_averages()}
    assert calls["mkldnn::_linear_pointwise"] == 2 * count


def test_evaluation_in_inference_mode(make_model: ModelFactory, pixel_values: Tensor) -> None:
    model = make_model()
    expected = input_gradient(model, pixel_values)
    with torch.inference_mode(), onednn_products(model.get_base_model()), torch.inference_mode(False):
        gradient = input_gradient(model, pixel_values)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(4, 4, device="meta").requires_grad_(False),  # offloaded
        nn.Linear(4, 4, dtype=torch.bfloat16).requires_grad_(False),
        nn.Conv2d(3, 8, 4, stride=4, dtype=torch.float16).requires_grad_(False),
    ],
    ids=["meta", "bfloat16", "float16"],
)
def test_weights_that_float32_products_do_not_read_are_not_packed(module: nn.Module) -> None:
    before = type(module)
    with onednn_products(module, dtype=torch.float32):
        assert type(module) is before


def test_an_error_while_packing_is_the_one_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    base = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]).requires_grad_(False)
    real, packed = onednn._PackedWeight, []

    def pack(module: nn.Module, dtype: torch.dtype) -> Any:
        packed.append(module)
        if len(packed) == 2:
            raise MemoryError("no room for a weight")
        return real(module, dtype)

    monkeypatch.setattr(onednn, "_PackedWeight", pack)
    with pytest.raises(MemoryError, match="no room for a weight"), onednn_products(base):
        pass
    assert all(type(module) is nn.Linear and "_packed" not in vars(module) for module in base)


@pytest.mark.parametrize("packed", [torch.float32, torch.bfloat16])
def test_layers_called_in_another_precision_than_packed_compute_as_before(packed: torch.dtype) -> None:
    linear, inputs = nn.Linear(8, 4).requires_grad_(False), torch.randn(2, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=packed == torch.float32):
        expected = linear(inputs)
        with onednn_products(linear, dtype=packed):
            assert torch.equal(linear(inputs), expected)


@pytest.mark.parametrize("dtype", PACKED_PRECISIONS)
def test_packed_weights_are_no_part_of_the_state_and_nest(dtype: torch.dtype) -> None:
    linear = nn.Linear(8, 4).requires_grad_(False)
    before = dict(vars(linear))
    with onednn_products(linear, dtype=dtype):
        keys = set(linear.state_dict())
        with onednn_products(linear, dtype=dtype):
            pass
        assert type(linear) is not nn.Linear
    assert keys == {"weight", "bias"}
    assert type(linear) is nn.Linear
    assert vars(linear) == before


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Lists a layer each time that its weight is packed."""
    found: list[nn.Module] = []
    real = onednn._PackedWeight

    def pack(module: nn.Module, dtype: torch.dtype) -> Any:
        found.append(module)
        return real(module, dtype)

    monkeypatch.setattr(onednn, "_PackedWeight", pack)
    return found


def test_weights_are_laid_out_once_within_a_context_and_not_kept_after(packed: list[nn.Module]) -> None:
    linear, inputs = nn.Linear(8, 4).requires_grad_(False), torch.randn(2, 8)
    with packed_once(), packed_once():
        for _ in range(3):
            with onednn_products(linear):
                output = linear(inputs)
    assert packed == [linear]
    torch.testing.assert_close(output, linear(inputs))
    with packed_once(), onednn_products(linear):
        pass
    with onednn_products(linear):
        pass
    assert packed == [linear] * 3


@pytest.mark.parametrize(
    "change",
    [
        lambda linear: linear.weight.mul_(2),
        lambda linear: linear.bias.add_(1),
        lambda linear: setattr(linear, "weight", nn.Parameter(2 * linear.weight, requires_grad=False)),
        lambda linear: setattr(linear.weight, "data", 2 * linear.weight),
    ],
    ids=["weight", "bias", "another weight", "other data"],
)
def test_a_changed_weight_is_packed_again(packed: list[nn.Module], change: Callable[[nn.Linear], object]) -> None:
    linear, inputs = nn.Linear(8, 4).requires_grad_(False), torch.randn(2, 8)
    with packed_once():
        with onednn_products(linear):
            pass
        change(linear)
        with onednn_products(linear):
            output = linear(inputs)
    torch.testing.assert_close(output, linear(inputs))
    assert packed == [linear] * 2


def test_a_weight_that_counts_no_changes_is_laid_out_each_time(packed: list[nn.Module]) -> None:
    with torch.inference_mode():
        linear = nn.Linear(8, 4).requires_grad_(False)
    with packed_once():
        for _ in range(2):
            with onednn_products(linear):
                pass
    assert packed == [linear] * 2


def test_a_training_lays_each_weight_out_once(
    make_model: ModelFactory, packed: list[nn.Module], onednn_everywhere: None, tmp_path: Path
) -> None:
    model = make_model()
    args = RobustnessTokenTrainingArguments(
        output_dir=str(tmp_path), max_steps=3, num_attack_steps=2, disable_tqdm=True, save_steps=1
    )
    images = [{"images": (torch.rand(3, 16, 16) * 255).round() / 255} for _ in range(4)]
    RobustnessTokenTrainer(model, args, images).train()
    layers = [one for one in model.get_base_model().modules() if isinstance(one, nn.Linear | nn.Conv2d)]
    assert packed == layers


def test_onednn_gives_bfloat16_what_autocast_gives(make_model: ModelFactory, pixel_values: Tensor) -> None:
    model = make_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model.get_features(pixel_values)
        with onednn_products(model.get_base_model(), dtype=torch.bfloat16):
            output = model.get_features(pixel_values)
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("padding", [0, "valid"])
def test_patches_as_a_product(padding: Any) -> None:
    convolution = nn.Conv2d(3, 8, (4, 2), stride=(4, 2), padding=padding).requires_grad_(False)
    pixels = torch.randn(2, 3, 13, 9, requires_grad=True)  # a row and a column are left over
    expected = convolution(pixels)
    with onednn_products(convolution):
        assert type(convolution) is not nn.Conv2d
        output = convolution(pixels)
    torch.testing.assert_close(output, expected)
    gradients = [torch.autograd.grad(value.square().sum(), pixels)[0] for value in (output, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(4, 4),  # trained
        nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False),
        nn.Conv2d(3, 8, 4, stride=2).requires_grad_(False),
        nn.Conv2d(4, 8, 2, stride=2, groups=2).requires_grad_(False),
        nn.Conv2d(3, 8, 2, stride=2, dilation=2).requires_grad_(False),
        type("Other", (nn.Linear,), {})(4, 4).requires_grad_(False),
    ],
)
def test_other_layers_are_left_alone(module: nn.Module) -> None:
    before = type(module)
    with onednn_products(module):
        assert type(module) is before
