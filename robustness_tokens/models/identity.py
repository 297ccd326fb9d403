"""The identity of a model, to which numbers, caches and resumed runs are bound."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration import RobustnessTokenConfig
from ..utils import digest, digest_json


# Where a model lies and how it was loaded; the dtype of the weights counts.
_NOT_COMPUTED = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
# What attacks, training and tokens change on timm's modules for a while.
_CHANGING = {"training", "fused_attn", "grad_checkpointing", "num_prefix_tokens"}


def model_digest(model: nn.Module) -> str:
    """Returns a sha256 of all weights and buffers of a model, and of the configs that it was built by.

    It changes with any weight, where [`base_fingerprint`] reads the first and the last layer alone. Modules without a
    config, such as timm's and a user's, count by their settings. The config of an adapter does not count.
    `ValueError` if weights are on the meta device.
    """
    weights: dict[str, Tensor] = {}
    for name, value in {**model.state_dict(keep_vars=True), **dict(model.named_buffers())}.items():
        # A quantised layer packs its weight and its bias into a tuple.
        for index, part in enumerate(value if isinstance(value, tuple) else [value]):
            if isinstance(part, Tensor):
                weights[f"{name}.{index}"] = part.dequantize() if part.is_quantized else part
    if missing := sorted(name for name, tensor in weights.items() if tensor.is_meta):
        raise ValueError(
            f"{len(missing)} weights of {type(model).__name__} are on the meta device, such as {missing[0]}: load it "
            "without offloading"
        )
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(one): one for one in found if isinstance(one, PreTrainedConfig)}.values()
    built_by = [_strip(one.to_dict()) for one in configs if not isinstance(one, RobustnessTokenConfig)]
    of_transformers = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    described = {id(inner) for module in of_transformers for inner in module.modules()}
    built_by += [(repr(module), _settings(module)) for module in model.modules() if id(module) not in described]
    return digest_json([type(model).__name__, built_by, digest(weights)], default=str)


def _settings(module: nn.Module) -> dict[str, Any]:
    """Returns a module's own values, such as its number of heads; of tensors the digest."""
    values = {name: value for name, value in vars(module).items() if name[0] != "_" and name not in _CHANGING}
    tensors = {name: digest([value]) for name, value in values.items() if isinstance(value, Tensor)}
    plain = int | float | str | list | tuple | dict
    return tensors | {name: repr(value) for name, value in values.items() if isinstance(value, plain)}


def _strip(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _strip(value) for key, value in values.items() if key not in _NOT_COMPUTED}
    return values
