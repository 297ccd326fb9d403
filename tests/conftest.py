import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from transformers import (
    PreTrainedModel,
)

from robustness_tokens.models import onednn, speedups
from robustness_tokens.models.modeling import RobustnessTokenModel
from tests.support.bases import FAMILIES, HIDDEN_SIZE, IMAGE_SIZE, NUM_TOKENS, build_base
from tests.support.hub_client import HubClient
from tests.support.hub_server import run_hub
from tests.support.hub_state import Hub


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def bfloat16_everywhere() -> Iterator[None]:
    """Tests in bfloat16 compute in it on every machine, however slowly."""
    with pytest.MonkeyPatch.context() as patch:  # a test may undo its own
        patch.setattr(speedups, "has_bfloat16", lambda device_type: True)
        yield


@pytest.fixture
def onednn_everywhere() -> Iterator[None]:
    """A test in float32 computes by oneDNN on every machine, also where that is slower; not its child processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "has_avx512", lambda: True)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # workers of pytest-xdist share the cores; tiny models gain nothing from more
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_base() -> Callable[..., Any]:
    """`make_base(family, classifier=False, **config)`: a tiny random base in memory, equal weights at each call."""
    return build_base


@pytest.fixture
def make_model(make_base: Callable[..., Any]) -> Callable[..., RobustnessTokenModel]:
    """`make_model(family="dinov2")`: such a base with three tokens."""
    return lambda family="dinov2": RobustnessTokenModel.from_base(make_base(family), num_robustness_tokens=3)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each of the families in turn."""
    return str(request.param)


@pytest.fixture
def base(family: str) -> PreTrainedModel:
    """A tiny headless base of each family, in memory."""
    return build_base(family)


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of a tiny headless base, by family. Read only."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        build_base(family).save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def classifier_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of a tiny classifier on each family. Read only."""
    folders = {family: tmp_path_factory.mktemp(f"{family}_classifier") for family in FAMILIES}
    for family, folder in folders.items():
        build_base(family, classifier=True).save_pretrained(folder)
    return folders


@pytest.fixture
def pixel_values() -> Tensor:
    """(2, 3, 16, 16) normalised images."""
    return torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def saved_adapter(base_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = RobustnessTokenModel.from_base(base_folders["dinov2"], num_robustness_tokens=NUM_TOKENS)
    with torch.no_grad():
        tokens = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(7))
        model.robustness_tokens.copy_(tokens)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def adapter_folder(saved_adapter: Path, tmp_path: Path) -> Path:
    """A saved adapter of the tiny DINOv2, with three tokens that matter; the test's own copy, to damage at will."""
    return Path(shutil.copytree(saved_adapter, tmp_path / "adapter"))


# A folder in the place of Xet's server is a feature of its tests, so of these versions.
needs_xet = pytest.mark.skipif(
    not (find_spec("hf_xet") and Version("1.8") <= Version(version("hf_xet")) < Version("2")),
    reason="the Hub of the tests knows hf_xet 1.8",
)


@pytest.fixture(scope="session")
def running_hub() -> Iterator[Hub]:
    with run_hub() as hub:
        yield hub


@pytest.fixture
def hub(running_hub: Hub) -> Hub:
    """A Hub on this machine, empty."""
    running_hub.reset()
    return running_hub


@pytest.fixture(scope="session")
def running_client(running_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClient]:
    client = HubClient(running_hub.endpoint, tmp_path_factory.mktemp("client") / "home")
    yield client
    client.close()


@pytest.fixture
def client(running_client: HubClient) -> HubClient:
    """Calls what `tests/support/hub_tasks.py` offers in new processes, whose Hub is the test's; its cache is empty."""
    running_client.wipe_cache()
    return running_client


@pytest.fixture(params=["regular", "lfs", pytest.param("xet", marks=needs_xet)])
def upload_mode(request: pytest.FixtureRequest, hub: Hub) -> str:
    """Each way in which the Hub takes the weights; the client is told by `xet=`."""
    hub.upload_mode = request.param
    return str(request.param)
