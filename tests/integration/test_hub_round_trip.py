"""Adapters to the Hub of the tests and back, as users move them: each step in a process of its own."""

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from robustness_tokens.configuration import TOKENS
from robustness_tokens.hub.adapter_folder import ADAPTER_FILES, CONFIG_FILE, write_adapter
from robustness_tokens.models.modeling import RobustnessTokenForImageClassification
from robustness_tokens.report.writing import REPORT_FILE
from tests.support.bases import HIDDEN_SIZE, NUM_LABELS, NUM_TOKENS
from tests.support.hub_client import ClientError, HubClient
from tests.support.hub_server import card_data
from tests.support.hub_state import File, Hub, Repo, Request
from tests.support.reports import make_report, report_on


BASE = Path(__file__).parents[2] / "examples" / "quickstart" / "base"
ADAPTER = "alice/adapter"
FILES = set(ADAPTER_FILES) - {REPORT_FILE}

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
        tokens = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))
        write_adapter(folder, {TOKENS: tokens}, {CONFIG_FILE: (folder / CONFIG_FILE).read_bytes()})
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
    client("api", method="create_repo", repo_id="alice/base", private=True, **kwargs)
    client("api", method="upload_folder", repo_id="alice/base", folder_path=str(BASE), **kwargs)
    client.wipe_cache()
    hub.requests.clear()
    output_dir = str(tmp_path / "run")
    trained = client("train_and_push", base="alice/base", repo_id=ADAPTER, output_dir=output_dir, **kwargs)
    client.wipe_cache()
    assert client("load", adapter=ADAPTER, **kwargs) == trained
    assert client("load", adapter=ADAPTER, auto=True, **kwargs) == trained
    assert trained["base"] == f"alice/base@{hub.repos['alice/base'].commit().oid}"

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


@pytest.mark.parametrize("subfolder", ["small/", "./small"])
def test_a_subfolder_is_the_same_however_it_is_written(
    hub: Hub, client: HubClient, make_adapter: AdapterFactory, subfolder: str
) -> None:
    folder = make_adapter(1)
    push(client, folder, subfolder=subfolder)
    assert hub.repos[ADAPTER].files() == {f"small/{name}" for name in FILES}
    assert b'subfolder="small")' in hub.repos[ADAPTER].commit().files["small/README.md"].data
    assert client("fetch", repo_id=ADAPTER, subfolder=subfolder)["tokens"] == tokens_of(folder)


def test_a_pull_request_makes_no_branch(hub: Hub, client: HubClient, make_adapter: AdapterFactory) -> None:
    push(client, make_adapter(1))
    with pytest.raises(ClientError, match="Invalid rev id: next"):
        push(client, make_adapter(2), create_pr=True, revision="next")
    assert list(hub.repos[ADAPTER].branches) == ["main"]


def test_another_model_is_not_downloaded(hub: Hub, client: HubClient, base: Repo) -> None:
    with pytest.raises(ClientError, match=r"model_type 'dinov2'.*RobustnessTokenModel\.from_base"):
        client("fetch", repo_id="alice/base")
    assert {request.path.rpartition("/")[2] for request in hub.received("GET /alice/base/")} == {"config.json"}


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
    push(client, folder, "alice/private")
    cards = {name: hub.repos[name].commit().files["README.md"].data.decode() for name in (ADAPTER, "alice/private")}
    assert "Keep the repository private" in cards["alice/private"]
    assert "Keep the repository private" not in cards[ADAPTER]
    assert "these are published: anyone can read them" in cards[ADAPTER]


def test_a_pull_request_to_another(hub: Hub, client: HubClient, base: Repo, make_adapter: AdapterFactory) -> None:
    repo = hub.repos[ADAPTER] = Repo(ADAPTER, private=False)
    base.private = False
    commit = push(client, make_adapter(1), token="hf_bob", create_pr=True, private=False)
    assert commit["pr_url"] == f"{hub.endpoint}/{ADAPTER}/discussions/1"
    assert (repo.files(), repo.files("refs/pr/1")) == (set(), FILES)


@pytest.mark.parametrize("fault", ["missing folder", "missing processor", "damaged processor"])
def test_what_is_no_whole_adapter_makes_no_repo(
    hub: Hub, client: HubClient, make_adapter: AdapterFactory, fault: str
) -> None:
    folder = make_adapter(1)
    processor = folder / "preprocessor_config.json"
    message = "preprocessor_config.json"
    if fault == "missing folder":
        folder, message = folder / "typo", "folder must be an adapter"
    elif fault == "missing processor":
        processor.unlink()
    else:
        processor.write_text("{}")
    with pytest.raises(ClientError, match=message) as caught:
        push(client, folder)
    assert caught.value.classes[0] == "ValueError"
    assert ADAPTER not in hub.repos


def test_a_base_that_nobody_has(hub: Hub, client: HubClient, make_adapter: AdapterFactory) -> None:
    with pytest.raises(ClientError, match="pass base_model_id="):
        client("push", folder=str(make_adapter(1)), repo_id=ADAPTER)
    assert ADAPTER not in hub.repos


# The base


def pinned_base(repo: Repo) -> str:
    config = json.loads(repo.commit().files["config.json"].data)
    return f"{config['base_model_name_or_path']}@{config['base_model_revision']}"


def test_the_base_stays_at_its_commit(
    hub: Hub, client: HubClient, base: Repo, make_adapter: AdapterFactory, tmp_path: Path
) -> None:
    """Whoever pulls an adapter and pushes it, with whatever else, does not move it to a base that nobody measured."""
    push(client, make_adapter(1))
    pin = f"alice/base@{base.commit().oid}"
    base.add_commit("main", {**base.commit().files, "new.txt": File.regular(b"")}, "later", "alice")
    copy: dict[str, Any] = {"adapter": ADAPTER, "token": "hf_alice", "push_to_hub": True}
    client("load_and_save", **copy, folder=str(tmp_path / "copy"))
    client("load_and_save", **copy, folder=str(tmp_path / "b"), repo_id="alice/named", base_model_id="alice/base")
    assert [pinned_base(hub.repos[f"alice/{name}"]) for name in ("adapter", "copy", "named")] == [pin] * 3
    assert json.loads((tmp_path / "b" / "config.json").read_text())["base_model_revision"] == pin.split("@")[1]


def test_every_base_on_the_hub_is_pinned(
    hub: Hub, client: HubClient, base: Repo, saved_adapter: Path, tmp_path: Path
) -> None:
    save: dict[str, Any] = {"adapter": str(saved_adapter), "token": "hf_alice", "base_model_id": "alice/base"}
    client("load_and_save", **save, folder=str(tmp_path / "now"), push_to_hub=True)
    client("load_and_save", **save, folder=str(tmp_path / "later"))
    client("push", folder=str(tmp_path / "later"), repo_id="alice/later")
    assert [pinned_base(hub.repos[name]) for name in ("alice/now", "alice/later")] == [
        f"alice/base@{base.commit().oid}"
    ] * 2


# What is pushed


def test_nothing_but_the_listed_files(hub: Hub, client: HubClient, make_adapter: AdapterFactory) -> None:
    folder = make_adapter(1)
    for name in ("notes.txt", ".env", "training_log.csv", "checkpoint-5/model.safetensors", "logs/a.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret notes")
    push(client, folder)
    assert hub.repos[ADAPTER].files() == FILES
    assert all(b"secret notes" not in request.body for request in hub.requests)


def test_the_report_goes_with_its_tokens(
    hub: Hub, client: HubClient, make_adapter: AdapterFactory, tmp_path: Path
) -> None:
    measured, other = make_adapter(1), make_adapter(2)
    report_on(measured).save(measured)
    push(client, measured)
    assert hub.repos[ADAPTER].files() == FILES | {REPORT_FILE}
    assert committed(hub) == [FILES | {REPORT_FILE}]
    card = card_data(hub.repos[ADAPTER].commit().files["README.md"].data.decode())
    assert [metric["value"] for metric in card["model-index"][0]["results"][0]["metrics"]] == [0.9, 0.25]
    # Pulled and pushed again, from a folder without the report.
    again = tmp_path / "again"
    client("load_and_save", adapter=ADAPTER, folder=str(again), token="hf_alice")
    assert REPORT_FILE not in {path.name for path in again.iterdir()}
    assert push(client, again, tags=["mine"])["oid"] == hub.repos[ADAPTER].commit().oid
    assert committed(hub)[1:] == [{"README.md"}]
    renewed = card_data(hub.repos[ADAPTER].commit().files["README.md"].data.decode())
    assert (renewed["model-index"], renewed["tags"]) == (card["model-index"], [*card["tags"], "mine"])
    push(client, other)
    assert hub.repos[ADAPTER].files() == FILES
    assert "model-index" not in card_data(hub.repos[ADAPTER].commit().files["README.md"].data.decode())
    assert len(hub.repos[ADAPTER].history()) == 3


@pytest.mark.parametrize("measured", ["another adapter", "by an older package"])
def test_a_report_on_something_else_is_not_pushed(
    hub: Hub, client: HubClient, make_adapter: AdapterFactory, measured: str
) -> None:
    folder = make_adapter(1)
    report = report_on(make_adapter(2)) if measured == "another adapter" else make_report()
    report.save(folder)
    push(client, folder)
    assert hub.repos[ADAPTER].files() == FILES
    assert "model-index" not in card_data(hub.repos[ADAPTER].commit().files["README.md"].data.decode())
    report_on(folder).save(folder)
    push(client, folder)
    assert hub.repos[ADAPTER].files() == FILES | {REPORT_FILE}


def test_no_folder_of_this_machine_is_told(
    hub: Hub, client: HubClient, base: Repo, make_adapter: AdapterFactory, base_folders: dict[str, Path]
) -> None:
    folder, base_folder = make_adapter(1), base_folders["dinov2"]
    report_on(folder, adapter=str(folder), base_model=str(base_folder)).save(folder)
    push(client, folder)
    report = json.loads(hub.repos[ADAPTER].commit().files[REPORT_FILE].data)
    assert [report[name] for name in ("adapter", "base_model", "base_model_revision")] == [
        *(ADAPTER, "alice/base", base.commit().oid)
    ]
    for request in hub.requests:
        assert not [path for path in (folder, base_folder) if str(path).encode() in decoded(request)]


def decoded(request: Request) -> bytes:
    """A request's body, with the files in it as they are."""
    if "/commit/" not in request.path:
        return request.body
    contents = [line["value"].get("content", "") for line in request.json_lines()]
    return request.body + b"".join(map(base64.b64decode, contents))


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


# Without naming our classes


def test_a_classifier_by_its_id(
    hub: Hub, client: HubClient, classifier_folders: dict[str, Path], tmp_path: Path
) -> None:
    hub.add_repo("alice/base", classifier_folders["dinov2"])
    model = RobustnessTokenForImageClassification.from_base(
        classifier_folders["dinov2"], num_robustness_tokens=NUM_TOKENS, initializer_range=1.0
    )
    model.save_pretrained(tmp_path / "adapter")
    push(client, tmp_path / "adapter")
    by_hand, by_pipeline = client("classify", repo_id=ADAPTER, token="hf_alice")
    assert len(by_hand) == NUM_LABELS
    assert [score["label"] for score in by_pipeline] == [score["label"] for score in by_hand]
    expected = [score["score"] for score in by_hand]
    assert [score["score"] for score in by_pipeline] == pytest.approx(expected, rel=1e-5)  # processors round otherwise


# The command line


def test_command_line(hub: Hub, client: HubClient, make_adapter: AdapterFactory) -> None:
    folder = make_adapter(1)
    report_on(folder).save(folder)
    arguments = ["push", str(folder), ADAPTER, "--base-model-id", "alice/base", "--commit-message", "By hand"]
    status, output = client("robtok", arguments=arguments, token="hf_alice")
    commit = hub.repos[ADAPTER].commit()
    assert (status, output.strip()) == (0, f"{hub.endpoint}/{ADAPTER}/commit/{commit.oid}")
    assert (commit.title, hub.repos[ADAPTER].private) == ("By hand", True)
    status, output = client("robtok", arguments=["info", ADAPTER], token="hf_alice")
    assert status == 0
    assert f"commit {commit.oid}" in output
    assert hub.repos["alice/base"].commit().oid in output
    assert "the attacker knows everything, tokens included: 0.25" in output
    assert "accuracy on clean images: 0.9" in output
    assert "white box: passed, 25% <= 40%" in output
    client.wipe_cache()
    status, output = client("robtok", arguments=["info", ADAPTER], token="hf_bob")
    assert (status, output[:24], "Traceback" in output) == (1, "robtok: 404 Client Error", False)
    hub.repos[ADAPTER].private = False
    status, output = client("robtok", arguments=arguments, token="hf_alice")
    assert status == 1
    assert "robtok: alice/adapter exists and is public" in output
