"""Adapters to the Hub of the tests and back, as users move them: each step in a process of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from robustness_tokens.hub import ADAPTER_FILES, EVALUATION_FILE, write_tokens
from robustness_tokens.report import Result, RobustnessReport
from tests.conftest import HIDDEN_SIZE, NUM_TOKENS
from tests.hub_client import ClientError, HubClient
from tests.hub_server import card_data
from tests.hub_state import Hub, Repo


BACKBONE = Path(__file__).parent.parent / "examples" / "quickstart" / "backbone"
ADAPTER = "alice/adapter"
FILES = set(ADAPTER_FILES) - {EVALUATION_FILE}

AdapterFactory = Callable[[int], Path]


@pytest.fixture
def base(hub: Hub, base_folders: dict[str, Path]) -> Repo:
    """The base of the adapters below, as a private repo."""
    return hub.add_repo("alice/base", base_folders["dinov2"])


@pytest.fixture
def make_adapter(saved_adapter: Path, tmp_path: Path, base: Repo) -> AdapterFactory:
    """`make_adapter(seed)`: an adapter folder with tokens of its own."""

    def make(seed: int) -> Path:
        folder = Path(shutil.copytree(saved_adapter, tmp_path / f"adapter-{seed}"))
        write_tokens(folder, torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed)))
        return folder

    return make


def tokens_of(folder: Path) -> str:
    """As the client shows them."""
    return load_file(folder / "model.safetensors")["robustness_tokens"].numpy().tobytes().hex()


def push(client: HubClient, folder: Path, repo_id: str = ADAPTER, **kwargs: Any) -> Any:
    return client("push", folder=str(folder), repo_id=repo_id, base_model_id="alice/base", **kwargs)


def committed(hub: Hub) -> list[set[str]]:
    """The files that each commit request named."""
    requests = [request.json_lines() for request in hub.received("POST .*/commit/")]
    return [{line["value"]["path"] for line in lines if line["key"] != "header"} for lines in requests]


# The whole way


def test_round_trip(hub: Hub, client: HubClient, upload_mode: str, tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"token": "hf_alice", "xet": upload_mode == "xet"}
    client("api", method="create_repo", repo_id="alice/backbone", private=True, **kwargs)
    client("api", method="upload_folder", repo_id="alice/backbone", folder_path=str(BACKBONE), **kwargs)
    client.wipe_cache()
    hub.requests.clear()
    output_dir = str(tmp_path / "run")
    trained = client("train_and_push", base="alice/backbone", repo_id=ADAPTER, output_dir=output_dir, **kwargs)
    client.wipe_cache()
    assert client("load", adapter=ADAPTER, **kwargs) == trained
    assert client("load", adapter=ADAPTER, auto=True, **kwargs) == trained
    assert trained["base"] == f"alice/backbone@{hub.repos['alice/backbone'].commit().oid}"

    repo = hub.repos[ADAPTER]
    assert repo.private
    (creation,) = hub.received("POST /api/repos/create")
    assert json.loads(creation.body)["visibility"] == "private"
    assert repo.files() == FILES
    assert len(repo.history()) == 1
    assert committed(hub) == [FILES]
    stored = repo.commit().files["model.safetensors"]
    assert (stored.sha256 is not None, stored.xet_hash is not None) == (upload_mode != "regular", upload_mode == "xet")
    uploads = [request.path for request in hub.received("PUT ")]
    assert uploads == ([f"/_storage/{stored.sha256}"] if upload_mode == "lfs" else [])
    for request in hub.received(r"\w+ /_storage/"):
        assert (request.token, request.host.split(":")[0]) == (None, "localhost")
    for request in hub.requests:
        assert "hf_alice" not in request.path + request.body.decode("latin-1")


def test_the_same_push_again_makes_no_commit(
    hub: Hub, client: HubClient, upload_mode: str, make_adapter: AdapterFactory
) -> None:
    folder = make_adapter(1)
    kwargs: dict[str, Any] = {"xet": upload_mode == "xet"}
    first = push(client, folder, **kwargs)
    client.wipe_cache()
    assert push(client, folder, **kwargs)["oid"] == first["oid"]
    assert len(hub.repos[ADAPTER].history()) == 1
    second = push(client, make_adapter(2), **kwargs)
    assert [commit.oid for commit in hub.repos[ADAPTER].history()] == [second["oid"], first["oid"]]
    assert committed(hub)[1:] == [{"model.safetensors"}]


# Where in a repo


def test_revisions(hub: Hub, client: HubClient, make_adapter: AdapterFactory, base_folders: dict[str, Path]) -> None:
    def loaded(**kwargs: Any) -> str:
        result = client("load", adapter=ADAPTER, token="hf_alice", base_model=str(base_folders["dinov2"]), **kwargs)
        return str(result["tokens"])

    folders = [make_adapter(seed) for seed in range(6)]
    first = push(client, folders[0])["oid"]
    client("api", method="create_tag", repo_id=ADAPTER, tag="v1", token="hf_alice")
    push(client, folders[1])
    pull_request = push(client, folders[2], create_pr=True)
    push(client, folders[3], revision="next")
    push(client, folders[4], subfolder="small")
    push(client, folders[5], subfolder="small", revision="refs/pr/1", commit_message="More", tags=["my-tag"])
    assert pull_request["pr_url"] == f"{hub.endpoint}/{ADAPTER}/discussions/1"

    expected = [tokens_of(folder) for folder in folders]
    client.wipe_cache()
    assert loaded() == expected[1]
    assert loaded(revision="v1") == loaded(revision=first) == expected[0]
    assert loaded(revision="refs/pr/1") == expected[2]
    assert loaded(revision="next") == expected[3]
    assert loaded(subfolder="small") == expected[4]
    assert loaded(subfolder="small", revision="refs/pr/1") == expected[5]
    repo = hub.repos[ADAPTER]
    assert [len(repo.history(name)) for name in ("main", "refs/pr/1", "next")] == [3, 4, 3]
    assert repo.files() == FILES | {f"small/{name}" for name in FILES}
    last = repo.commit("refs/pr/1")
    assert last.title == "More"
    assert "my-tag" in card_data(last.files["small/README.md"].data.decode())["tags"]
    for name in ("v2", "refs/pr/9", "0" * 40):
        with pytest.raises(ClientError) as caught:
            loaded(revision=name)
        assert "RevisionNotFoundError" in caught.value.classes
    with pytest.raises(ClientError, match=r"alice/adapter.*no config\.json") as caught:
        loaded(subfolder="large")
    assert caught.value.classes[0] == "ValueError"


def test_the_cache_alone(hub: Hub, client: HubClient, make_adapter: AdapterFactory) -> None:
    push(client, make_adapter(1))
    client.wipe_cache()
    online = client("load", adapter=ADAPTER, token="hf_alice")
    hub.requests.clear()
    assert client("load", adapter=ADAPTER, local_files_only=True) == online
    client.wipe_cache()
    with pytest.raises(ClientError, match=r"alice/adapter.*not in the cache"):
        client("load", adapter=ADAPTER, local_files_only=True)
    assert not hub.requests


@pytest.mark.slow
def test_offline(hub: Hub, client: HubClient, make_adapter: AdapterFactory) -> None:
    """As `local_files_only`, but by the environment, so in a client of its own."""
    push(client, make_adapter(1))
    online = client("load", adapter=ADAPTER, token="hf_alice")
    hub.requests.clear()
    offline = HubClient(hub.endpoint, client.home, HF_HUB_OFFLINE="1")
    try:
        assert offline("load", adapter=ADAPTER) == online
        client.wipe_cache()
        with pytest.raises(ClientError, match=r"alice/adapter.*not in the cache"):
            offline("load", adapter=ADAPTER)
    finally:
        offline.close()
    assert not hub.requests


# Who may


@pytest.mark.parametrize(
    ("token", "error", "message"),
    [
        (None, "RepositoryNotFoundError", "401 Client Error"),
        ("hf_bob", "RepositoryNotFoundError", "404 Client Error"),
        ("hf_nobody", "HfHubHTTPError", "Invalid credentials in Authorization header"),
    ],
)
def test_others_neither_read_nor_write(
    hub: Hub, client: HubClient, make_adapter: AdapterFactory, token: str | None, error: str, message: str
) -> None:
    folder = make_adapter(1)
    push(client, folder)
    client.wipe_cache()
    before = len(hub.received("POST .*/commit/"))
    with pytest.raises(ClientError, match=message) as caught:
        client("load", adapter=ADAPTER, token=token)
    assert error in caught.value.classes
    with pytest.raises(ClientError) as caught:
        push(client, folder, token=token or False)
    assert "HfHubHTTPError" in caught.value.classes
    assert len(hub.received("POST .*/commit/")) == before


def test_a_public_repo_gets_no_secrets(hub: Hub, client: HubClient, make_adapter: AdapterFactory) -> None:
    repo = hub.repos[ADAPTER] = Repo(ADAPTER, private=False)
    folder = make_adapter(1)
    with pytest.raises(ClientError, match="exists and is public: tokens are secrets") as caught:
        push(client, folder)
    assert caught.value.classes[0] == "ValueError"
    assert not hub.received("(POST .*/(commit|preupload)/|PUT )")
    push(client, folder, private=False)
    assert repo.files() == FILES
    push(client, folder, "alice/new", private=False)
    assert not hub.repos["alice/new"].private


def test_a_pull_request_to_another(hub: Hub, client: HubClient, base: Repo, make_adapter: AdapterFactory) -> None:
    repo = hub.repos[ADAPTER] = Repo(ADAPTER, private=False)
    base.private = False
    commit = push(client, make_adapter(1), token="hf_bob", create_pr=True, private=False)
    assert commit["pr_url"] == f"{hub.endpoint}/{ADAPTER}/discussions/1"
    assert (repo.files(), repo.files("refs/pr/1")) == (set(), FILES)


def test_a_base_that_nobody_has(hub: Hub, client: HubClient, make_adapter: AdapterFactory) -> None:
    with pytest.raises(ClientError, match="pass base_model_id="):
        client("push", folder=str(make_adapter(1)), repo_id=ADAPTER)
    assert ADAPTER not in hub.repos


# What is pushed


def test_nothing_but_the_listed_files(hub: Hub, client: HubClient, make_adapter: AdapterFactory) -> None:
    folder = make_adapter(1)
    for name in ("notes.txt", ".env", "training_log.csv", "checkpoint-5/model.safetensors", "logs/a.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret notes")
    push(client, folder)
    assert hub.repos[ADAPTER].files() == FILES
    assert all(b"secret notes" not in request.body for request in hub.requests)


def test_the_report_goes_with_its_tokens(hub: Hub, client: HubClient, make_adapter: AdapterFactory) -> None:
    measured, other = make_adapter(1), make_adapter(2)
    make_report().save(measured)
    push(client, measured)
    assert hub.repos[ADAPTER].files() == FILES | {EVALUATION_FILE}
    assert committed(hub) == [FILES | {EVALUATION_FILE}]
    card = card_data(hub.repos[ADAPTER].commit().files["README.md"].data.decode())
    assert card["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.25
    push(client, other)
    assert hub.repos[ADAPTER].files() == FILES
    assert len(hub.repos[ADAPTER].history()) == 2


def make_report() -> RobustnessReport:
    result = Result(task="features", metric="cosine", value=0.25, tokens="trained", num_images=8, seed=0)
    return RobustnessReport(
        package_version="0",
        adapter=ADAPTER,
        base_model="alice/base",
        base_model_revision=None,
        dataset={"name": "noise", "split": "test", "num_images": 8},
        budget="quick",
        seed=0,
        results=[result],
        checks=[],
        series={},
        seconds=1.0,
    )


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_the_card_of_a_person_is_kept(
    hub: Hub, client: HubClient, make_adapter: AdapterFactory, newline: str, tmp_path: Path
) -> None:
    (tmp_path / "card").mkdir()
    text = newline.join(["---", "license: mit", "---", "# Mine", "", "Words of a person: ü.", ""])
    (tmp_path / "card" / "README.md").write_bytes(text.encode())
    repo = hub.add_repo(ADAPTER, tmp_path / "card")
    push(client, make_adapter(1))
    first = repo.commit().files["README.md"].data.decode()
    assert newline.join(["# Mine", "", "Words of a person: ü.", ""]) in first
    metadata = card_data(first.replace("\r\n", "\n"))
    assert (metadata["license"], metadata["base_model"]) == ("mit", "alice/base")
    push(client, make_adapter(2))
    assert repo.commit().files["README.md"].data.decode() == first
    assert len(repo.history()) == 3


# The command line


def test_command_line(hub: Hub, client: HubClient, make_adapter: AdapterFactory) -> None:
    folder = str(make_adapter(1))
    arguments = ["push", folder, ADAPTER, "--base-model-id", "alice/base", "--commit-message", "By hand"]
    status, output = client("robtok", arguments=arguments, token="hf_alice")
    commit = hub.repos[ADAPTER].commit()
    assert (status, output.strip()) == (0, f"{hub.endpoint}/{ADAPTER}/commit/{commit.oid}")
    assert (commit.title, hub.repos[ADAPTER].private) == ("By hand", True)
    status, output = client("robtok", arguments=["info", ADAPTER], token="hf_alice")
    assert status == 0
    assert f"commit {commit.oid}" in output
    assert hub.repos["alice/base"].commit().oid in output
    client.wipe_cache()
    status, output = client("robtok", arguments=["info", ADAPTER], token="hf_bob")
    assert (status, output[:24], "Traceback" in output) == (1, "robtok: 404 Client Error", False)
    hub.repos[ADAPTER].private = False
    status, output = client("robtok", arguments=arguments, token="hf_alice")
    assert status == 1
    assert "robtok: alice/adapter exists and is public" in output
