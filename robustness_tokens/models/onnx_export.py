"""Exports a model with its tokens to ONNX: the file needs neither this package nor PyTorch (extra `onnx`)."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import height_and_width
from ..utils import local_path
from .heads import base_of
from .injection import TokenInjector, active_injector
from .layer_stack import find_layer_stack, vision_config
from .speedups import attention_implementation


logger = logging.getLogger(__name__)

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_TOLERANCE = 1e-4
_MAX_INLINE_BYTES = 1_900_000_000  # protobuf ends at 2 GiB


def export_onnx(
    model: PreTrainedModel, file: str | os.PathLike[str], *, image_size: int | Sequence[int] | None = None
) -> list[str]:
    """Writes a model with its tokens as ONNX, and checks the file with ONNX Runtime.

    The file holds the tokens, the secret of the defence; it gets mode 0600, and a warning is logged.

    Args:
        model: A `RobustnessTokenModel`, or a model that `inject_tokens` was called on; float32, in eval mode.
        file: Path of the file. Weights above 1.9 GB go beside it, into `<file>.data`.
        image_size: Side of the images, or height and width, in pixels; by default the model's own. The batch size
            stays free.

    Returns:
        Names of the outputs. The input is `pixel_values`, (B, C, H, W) float32, normalised.

    Raises:
        ImportError: If packages of the extra `onnx` are missing.
        ValueError: If the model has no tokens or they are off; if it isn't float32 in eval mode; if it takes more
            than images, names no image size, or returns no tensors or random ones.
        RuntimeError: If ONNX Runtime's outputs differ by more than 1e-4 (absolute and relative).
    """
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ImportError(f"ONNX export needs {', '.join(missing)}: pip install 'robustness-tokens[onnx]'")
    base: Any = base_of(model)
    injector = active_injector(base, to="export")
    if base.dtype != torch.float32 or base.training:
        raise ValueError(
            f"the model is in {base.dtype} and {'training' if base.training else 'eval'} mode, expected torch.float32 "
            "and eval mode: load it with dtype='float32', and call model.eval()"
        )
    _check_takes_images(base)
    size = image_size if image_size is not None else _own_image_size(base)
    if size is None:
        raise ValueError(f"{type(base).__name__} names no image_size: pass image_size= in pixels")

    shape = (getattr(base.config, "num_channels", 3), *height_and_width(size))
    # The exporter would take the batch sizes 0 and 1 for constants.
    example, check = (torch.randn(batch, *shape, device=base.device) for batch in (2, 3))
    with torch.no_grad():
        first = {key: value for key, value in base(pixel_values=check).items() if isinstance(value, Tensor)}
    names = list(first)
    if not names:
        raise ValueError(f"{type(base).__name__} returns no tensors that ONNX could name: export the model inside it")
    exported = _NamedOutputs(base, injector, names).eval()
    with torch.no_grad():
        expected = exported(check)
        if not all(map(_are_close, expected, first.values())):
            raise ValueError(
                f"{type(base).__name__} gives other outputs at each call (ViT-MAE shuffles its patches), which can't "
                "be exported: load the weights of a ViT-MAE as ViTModel, inject_tokens into that, and export it"
            )
        # When exporting with sdpa, transformers adds BEiT's position bias to a boolean mask, so it is 1 too high. The
        # softmax ignores a constant, but the tokens' bias stays 0: they would get less attention than the patches.
        with attention_implementation(base, None if find_layer_stack(base).is_timm else "eager"):
            program = torch.onnx.export(
                exported,
                (example,),
                dynamo=True,
                input_names=["pixel_values"],
                output_names=names,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    assert program is not None
    path = Path(local_path(file))
    size_in_bytes = sum(tensor.nbytes for tensor in exported.state_dict(keep_vars=True).values())
    # Written to a scratch folder and moved after the check, so that no wrong file is left behind.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        unchecked = Path(scratch) / path.name
        program.save(unchecked, external_data=size_in_bytes > _MAX_INLINE_BYTES)
        _check_file(unchecked, check, dict(zip(names, expected, strict=True)))
        for written in Path(scratch).iterdir():
            written.chmod(0o600)
            written.replace(path.parent / written.name)
    logger.warning(
        "%s holds the robustness tokens, the secret of the defence: whoever has the file can attack through them.",
        path,
    )
    return names


class _NamedOutputs(nn.Module):
    """Returns the base's tensor outputs as a tuple; holds the injector, so that tokens are exported as weights."""

    def __init__(self, base: nn.Module, injector: TokenInjector, names: list[str]) -> None:
        super().__init__()
        self.base, self.injector, self.names = base, injector, names

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        output = self.base(pixel_values=pixel_values)
        return tuple(output[name] for name in self.names)


def _check_takes_images(base: Any) -> None:
    name = type(base).__name__
    if hasattr(base, "get_image_features"):
        raise ValueError(
            f"{name} has two towers, and ONNX export takes images only: inject_tokens into its vision model, and "
            "export that"
        )
    if "spatial_shapes" in inspect.signature(base.forward).parameters:
        raise ValueError(
            f"{name} takes patches, their mask and their grid (SigLIP 2), and ONNX export takes images only: ship "
            "the adapter instead"
        )


def _own_image_size(base: Any) -> int | Sequence[int] | None:
    if hasattr(base, "timm_model"):
        size: Any = base.timm_model.patch_embed.img_size
    else:
        size = getattr(vision_config(base), "image_size", None)
    return size


def _check_file(path: Path, pixel_values: Tensor, expected: dict[str, Tensor]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = session.run(list(expected), {"pixel_values": pixel_values.cpu().numpy()})
    for (name, tensor), output in zip(expected.items(), outputs, strict=True):
        found = torch.from_numpy(output)
        if not _are_close(found, tensor.cpu()):
            difference = (found - tensor.cpu()).abs().max().item()
            raise RuntimeError(
                f"the export's {name} differs from the model's by {difference:.2g}, expected at most {_TOLERANCE}, so "
                "the file was deleted: report this with the model's class and your versions of torch and onnx"
            )


def _are_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=_TOLERANCE, atol=_TOLERANCE)
