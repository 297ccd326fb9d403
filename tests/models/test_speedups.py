import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch import Tensor, nn

from robustness_tokens.models import speedups
from robustness_tokens.models.modeling import RobustnessTokenModel
from robustness_tokens.models.onednn import onednn_products
from robustness_tokens.models.speedups import (
    attention_implementation,
    choose_attention,
    has_bfloat16,
    run_compiled,
    runs_in_half,
)
from robustness_tokens.training.arguments import RobustnessTokenTrainingArguments
from robustness_tokens.training.trainer import RobustnessTokenTrainer
from tests.support.bases import input_gradient
from tests.support.command_line import parse_arguments
from tests.support.families import BASES


QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

BaseFactory = Callable[..., Any]
ModelFactory = Callable[..., RobustnessTokenModel]


# Attention


@pytest.mark.parametrize(
    ("asked", "device", "half_precision", "expected"),
    [
        ("auto", CPU, True, "eager"),
        ("auto", CPU, False, None),
        ("auto", CUDA, True, None),
        ("base", CPU, True, None),
        ("sdpa", CPU, True, "sdpa"),
        ("flash_attention_2", CUDA, False, "flash_attention_2"),
    ],
)
def test_attention_is_chosen_per_device(
    asked: str, device: torch.device, half_precision: bool, expected: str | None
) -> None:
    assert choose_attention(asked, device=device, half_precision=half_precision) == expected


@pytest.mark.parametrize("name", [name for name in BASES if not name.startswith("timm")])
def test_attention_is_set_and_put_back(name: str) -> None:
    base = BASES[name].build()
    before = base.config._attn_implementation
    other = "sdpa" if before == "eager" else "eager"
    if other not in BASES[name].implementations:
        pytest.skip("has one implementation only")
    expected = base(**BASES[name].inputs())[0]
    with attention_implementation(base, other):
        changed = {m.config._attn_implementation for m in base.modules() if hasattr(m, "config")}
        output = base(**BASES[name].inputs())[0]
    assert other in changed
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert {m.config._attn_implementation for m in base.modules() if hasattr(m, "config")} == {before}


@pytest.mark.parametrize(("asked", "fused"), [("eager", False), ("sdpa", True)])
def test_attention_of_timm(asked: str, fused: bool) -> None:
    name = next(name for name in BASES if name.startswith("timm"))
    base = BASES[name].build()
    modules = [module for module in base.modules() if hasattr(module, "fused_attn")]
    before = [module.fused_attn for module in modules]
    with attention_implementation(base, asked):
        assert {module.fused_attn for module in modules} == {fused}
    assert [module.fused_attn for module in modules] == before
    with pytest.raises(ValueError, match='"eager" or "sdpa"'), attention_implementation(base, "flex_attention"):
        pass


def test_attention_is_put_back_after_an_error_and_nonsense_is_refused(make_base: BaseFactory) -> None:
    base = make_base("vit")
    with pytest.raises(KeyError), attention_implementation(base, "eager"):
        raise KeyError
    assert base.config._attn_implementation == "sdpa"
    with (
        pytest.raises(ValueError, match="can't take attention 'nonsense'"),
        attention_implementation(base, "nonsense"),
    ):
        pass
    assert base.config._attn_implementation == "sdpa"


# torch.compile


@pytest.fixture
def compile_with_aot_eager(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Replaces torch.compile's backend by one without a C++ compiler; lists what it compiles."""
    asked: list[object] = []
    real = torch.compile

    def compile_(function: Any, **kwargs: Any) -> Any:
        asked.append(function)
        return real(function, backend="aot_eager", **kwargs)

    monkeypatch.setattr(torch, "compile", compile_)
    return asked


@pytest.mark.parametrize("products", [nullcontext, onednn_products], ids=["plain", "onednn"])
def test_compiled_layers_compute_the_same_and_leave_nothing_behind(
    make_model: ModelFactory,
    pixel_values: Tensor,
    compile_with_aot_eager: list[object],
    products: Callable[[Any], AbstractContextManager[None]],
) -> None:
    model = make_model()
    base = model.get_base_model()
    expected = input_gradient(model, pixel_values)
    with warnings.catch_warnings(), products(base):
        warnings.simplefilter("error", RuntimeWarning)
        gradient = run_compiled(base, lambda: input_gradient(model, pixel_values))
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert len(compile_with_aot_eager) == 2  # its two layers
    assert not any("forward" in module.__dict__ for module in base.modules())


def test_layers_share_one_compilation(make_base: BaseFactory, pixel_values: Tensor) -> None:
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = RobustnessTokenModel.from_base(make_base("dinov2", num_hidden_layers=5), num_robustness_tokens=3)
    real = torch.compile
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **kwargs: real(function, backend=backend, **kwargs))
        for _ in range(3):  # attacks
            run_compiled(model.get_base_model(), lambda: input_gradient(model, pixel_values))
    assert len(graphs) == 1


def test_a_forward_set_by_others_is_put_back(
    make_model: ModelFactory, pixel_values: Tensor, compile_with_aot_eager: list[object]
) -> None:
    model = make_model()
    layer: Any = model.get_base_model().get_submodule("encoder.layer.0")
    calls: list[int] = []

    def others(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = others
    run_compiled(model.get_base_model(), lambda: model.get_features(pixel_values).detach())
    assert layer.forward is others


@pytest.fixture
def broken_compiler(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces the backend by one that fails, as inductor does without a C++ compiler; lists its failures."""
    failures: list[int] = []
    real = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        failures.append(1)
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: real(function, backend=backend, **kwargs))
    torch._dynamo.reset()
    return failures


def test_without_a_compiler_the_attack_goes_on_and_says_so_once(
    make_model: ModelFactory, pixel_values: Tensor, broken_compiler: list[int]
) -> None:
    model = make_model()
    base = model.get_base_model()
    expected = input_gradient(model, pixel_values)
    with pytest.warns(RuntimeWarning, match=r"(?s)torch.compile failed.*no C\+\+ compiler found.*torch_compile=False"):
        gradient = run_compiled(base, lambda: input_gradient(model, pixel_values))
    assert torch.equal(gradient, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        run_compiled(base, lambda: input_gradient(model, pixel_values))
    assert broken_compiler == [1]


def test_errors_of_the_attack_itself_are_not_taken_for_a_failed_compilation(make_model: ModelFactory) -> None:
    model = make_model()

    def attack() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run_compiled(model.get_base_model(), attack)
    assert model.get_base_model() not in speedups._not_compilable


# In a training run


def random_images(count: int, side: int = 16) -> list[dict[str, Tensor]]:
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(11)) / 255
    return [{"images": image} for image in pixels]


def run(model: RobustnessTokenModel, folder: Path, dataset: Any = None, **kwargs: Any) -> RobustnessTokenTrainer:
    defaults: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "num_attack_steps": 3}
    args = RobustnessTokenTrainingArguments(output_dir=str(folder), disable_tqdm=True, **{**defaults, **kwargs})
    trainer = RobustnessTokenTrainer(model, args, random_images(4) if dataset is None else dataset)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "settings",
    [{"onednn": False}, {"train_attn_implementation": "eager"}, {"torch_compile": True}],
    ids=["no onednn", "eager", "compiled"],
)
@pytest.mark.parametrize("attack", ["paper", "pgd"])
def test_speedups_change_rounding_alone(
    make_model: ModelFactory,
    tmp_path: Path,
    compile_with_aot_eager: list[object],
    onednn_everywhere: None,
    settings: dict[str, Any],
    attack: str,
) -> None:
    histories = []
    for name, extra in (("plain", {}), ("other", settings)):
        torch.manual_seed(3)
        histories.append(run(make_model(), tmp_path / name, attack=attack, **extra).log_history)
    for row, expected in zip(*histories, strict=True):
        for key in ("loss", "invariance_cosine", "adversarial_cosine", "baseline_cosine"):
            assert row[key] == pytest.approx(expected[key], abs=1e-3)
    assert bool(compile_with_aot_eager) == ("torch_compile" in settings)


def test_attention_is_eager_in_bf16_while_training_and_the_bases_own_after(
    make_model: ModelFactory, tmp_path: Path
) -> None:
    model = make_model()
    seen: set[str] = set()
    config = model.get_base_model().config
    model.get_base_model().register_forward_pre_hook(lambda *_: seen.add(config._attn_implementation))
    run(model, tmp_path / "auto", mixed_precision="bf16")
    assert seen == {"eager"}
    assert config._attn_implementation == "sdpa"
    seen.clear()
    run(model, tmp_path / "base", mixed_precision="bf16", train_attn_implementation="base")
    assert seen == {"sdpa"}


@pytest.mark.parametrize("available", [True, False])
def test_bf16_asks_the_processor_and_says_once_that_it_has_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, available: bool
) -> None:
    speedups._say_that_float32_is_used.cache_clear()
    monkeypatch.setattr(speedups, "has_bfloat16", has_bfloat16.__wrapped__)  # the real one, of this module's import
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: available)
    assert not runs_in_half("no", device=CPU)
    assert not caplog.messages
    assert [runs_in_half("bf16", device=CPU) for _ in range(2)] == [available] * 2
    assert len(caplog.messages) == (0 if available else 1)
    assert all("this cpu has no bfloat16 instructions: float32 is used" in one for one in caplog.messages)


def test_without_bfloat16_a_training_in_it_is_one_in_float32(
    make_model: ModelFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speedups, "has_bfloat16", lambda device_type: False)
    histories, dtypes = [], set()
    for precision in ("no", "bf16"):
        torch.manual_seed(3)
        model = make_model()
        linear = next(module for module in model.get_base_model().modules() if isinstance(module, nn.Linear))
        linear.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
        history = run(model, tmp_path / precision, mixed_precision=precision).log_history
        histories.append([{name: value for name, value in row.items() if name != "seconds"} for row in history])
    assert histories[0] == histories[1]
    assert dtypes == {torch.float32}


def test_speedups_are_no_part_of_the_recipe(tmp_path: Path) -> None:
    plain = RobustnessTokenTrainingArguments(output_dir=str(tmp_path))
    other = RobustnessTokenTrainingArguments(
        output_dir=str(tmp_path), torch_compile=True, onednn=False, train_attn_implementation="eager"
    )
    assert plain.recipe() == other.recipe()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "auto"),
        (["--attn_implementation", "sdpa"], "base"),
        (["--attn_implementation", "sdpa", "--train_attn_implementation", "eager"], "eager"),
    ],
)
def test_an_attention_asked_for_on_the_command_line_stays(words: list[str], expected: str) -> None:
    required = ["--base_model", "base", "--dataset", "data", "--output_dir", "out"]
    assert parse_arguments(required + words)[2].train_attn_implementation == expected


@pytest.mark.slow
def test_bf16_and_compiled_follow_the_fp32_curves_over_50_steps(tmp_path: Path) -> None:
    dataset = datasets.load_dataset("parquet", data_dir=str(QUICKSTART / "data"), split="train").select(range(400))
    histories = {}
    variants: dict[str, dict[str, Any]] = {
        "fp32": {"onednn": False},
        "bf16": {"mixed_precision": "bf16"},
        "bf16, compiled": {"mixed_precision": "bf16", "torch_compile": True},
    }
    for name, variant in variants.items():
        torch.manual_seed(0)
        model = RobustnessTokenModel.from_base(QUICKSTART / "base", num_robustness_tokens=10)
        settings = {"max_steps": 50, "per_device_train_batch_size": 8, "num_attack_steps": 10, **variant}
        histories[name] = run(model, tmp_path / name, dataset, **settings).log_history
    for name in ("bf16", "bf16, compiled"):
        for row, expected in zip(histories[name], histories["fp32"], strict=True):
            for key in ("invariance_cosine", "adversarial_cosine"):
                assert row[key] == pytest.approx(expected[key], abs=0.01), (name, row["step"], key)
