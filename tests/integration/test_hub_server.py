"""The Hub of the tests, against plain huggingface_hub: what the tests of the package stand on."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.hub_client import ClientError, HubClient
from tests.support.hub_state import Fault, File, Hub, Repo


FILES = {
    "config.json": b'{"a": 1}\n',
    "model.safetensors": bytes(range(256)) * 300,
    "README.md": b"---\ntags: [a]\n---\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def push(hub: Hub, client: HubClient, folder: Path, *, token: str = "hf_alice", **kwargs: Any) -> Any:
    return client(
        "api",
        method="upload_folder",
        token=token,
        repo_id="alice/model",
        folder_path=str(folder),
        xet=hub.upload_mode == "xet",
        **kwargs,
    )


@pytest.fixture
def repo(upload_mode: str, hub: Hub, client: HubClient, folder: Path) -> str:
    """A private repo of alice's with one commit, in each of the upload modes."""
    client("api", method="create_repo", token="hf_alice", repo_id="alice/model", private=True)
    push(hub, client, folder)
    return "alice/model"


@pytest.fixture
def small_repo(hub: Hub) -> Repo:
    """A public repo of alice's with one small file, made without a client."""
    repo = hub.repos["alice/model"] = Repo("alice/model", private=False)
    repo.add_commit("main", {"a.txt": File.regular(b"a" * 100)}, "first", "alice")
    return repo


def test_upload_and_download(repo: str, hub: Hub, client: HubClient) -> None:
    stored = hub.repos[repo].commit().files["model.safetensors"]
    expected = {"regular": (False, False), "lfs": (True, False), "xet": (True, True)}[hub.upload_mode]
    assert (stored.sha256 is not None, stored.xet_hash is not None) == expected
    assert bool(hub.received("PUT /_storage/")) is (hub.upload_mode == "lfs")
    assert len(hub.repos[repo].history()) == len(hub.received("POST .*/commit/")) == 1
    files = client("download", repo_id=repo, token="hf_alice", allow_patterns=list(FILES))
    assert {name: bytes.fromhex(content) for name, content in files.items()} == FILES
    for request in hub.received(r"\w+ /_storage/"):
        assert request.token is None
        assert request.host.startswith("localhost:")
    info = client("api", method="model_info", token="hf_alice", repo_id=repo)
    assert (info["private"], info["sha"]) == (True, hub.repos[repo].commit().oid)


def test_the_same_upload_again_commits_nothing(repo: str, hub: Hub, client: HubClient, folder: Path) -> None:
    push(hub, client, folder)
    assert len(hub.repos[repo].history()) == 1
    (folder / "config.json").write_text("{}")
    push(hub, client, folder)
    sent = hub.received("POST .*/commit/")[-1].json_lines()
    assert [line["value"].get("path") for line in sent] == [None, "config.json"]
    assert len(hub.repos[repo].history()) == 2


@pytest.mark.parametrize(
    ("token", "error", "message"),
    [
        (None, "RepositoryNotFoundError", "401 Client Error"),
        ("hf_bob", "RepositoryNotFoundError", "404 Client Error"),
        ("hf_nobody", "HfHubHTTPError", "Invalid credentials in Authorization header"),
    ],
)
def test_a_private_repo_of_another(
    small_repo: Repo, client: HubClient, token: str | None, error: str, message: str
) -> None:
    small_repo.private = True
    for call in ({"method": "model_info"}, {"method": "hf_hub_download", "filename": "a.txt"}):
        with pytest.raises(ClientError, match=message) as caught:
            client("api", token=token, repo_id="alice/model", **call)
        assert error in caught.value.classes


def test_only_the_owner_writes(small_repo: Repo, hub: Hub, client: HubClient, folder: Path) -> None:
    with pytest.raises(ClientError, match="403"):
        push(hub, client, folder, token="hf_bob")
    with pytest.raises(ClientError, match="403"):
        client("api", method="create_repo", token="hf_bob", repo_id="alice/other")
    commit = push(hub, client, folder, token="hf_bob", create_pr=True)
    assert commit["pr_url"] == f"{hub.endpoint}/alice/model/discussions/1"
    assert small_repo.files("refs/pr/1") == {*FILES, "a.txt"}
    assert small_repo.files() == {"a.txt"}
    assert small_repo.commit("refs/pr/1").author == "bob"


def test_repos_are_made_and_deleted(hub: Hub, client: HubClient) -> None:
    create: dict[str, Any] = {"method": "create_repo", "token": "hf_alice", "repo_id": "alice/model"}
    client("api", **create, private=True)
    assert [repo.private for repo in hub.repos.values()] == [True]
    with pytest.raises(ClientError, match="You already created this model repo"):
        client("api", **create)
    client("api", **create, exist_ok=True)
    client("api", method="delete_repo", token="hf_alice", repo_id="alice/model")
    assert not hub.repos
    client("api", **create, private=False)
    assert [repo.private for repo in hub.repos.values()] == [False]
    assert client("api", method="whoami", token="hf_bob")["name"] == "bob"


def test_names_of_commits(small_repo: Repo, client: HubClient) -> None:
    repo: dict[str, Any] = {"token": "hf_alice", "repo_id": "alice/model"}
    first = small_repo.commit().oid
    client("api", method="create_tag", tag="v1", **repo)
    client("api", method="create_branch", branch="next", **repo)
    second = small_repo.add_commit("next", {"b.txt": File.regular(b"b")}, "second", "alice").oid
    small_repo.add_commit("refs/pr/1", {"c.txt": File.regular(b"c")}, "third", "bob")
    refs = client("api", method="list_repo_refs", **repo)
    assert [(ref["name"], ref["target_commit"]) for ref in refs["branches"]] == [("main", first), ("next", second)]
    assert [(ref["name"], ref["target_commit"]) for ref in refs["tags"]] == [("v1", first)]
    for name, file in {"v1": "a.txt", "next": "b.txt", second: "b.txt", "refs/pr/1": "c.txt"}.items():
        assert list(client("download", repo_id="alice/model", revision=name)) == [file]
    titles = [commit["title"] for commit in client("api", method="list_repo_commits", revision="next", **repo)]
    assert titles == ["second", "first"]
    with pytest.raises(ClientError, match="409"):
        client("api", method="create_tag", tag="v1", **repo)
    with pytest.raises(ClientError, match="Invalid rev id: v2") as caught:
        client("download", repo_id="alice/model", revision="v2")
    assert "RevisionNotFoundError" in caught.value.classes
    client("api", method="delete_tag", tag="v1", **repo)
    client("api", method="delete_branch", branch="next", **repo)
    assert (small_repo.tags, list(small_repo.branches)) == ({}, ["main", "refs/pr/1"])


def test_files_in_folders(small_repo: Repo, client: HubClient) -> None:
    files = {name: File.regular(name.encode()) for name in ("a.txt", "b/c.txt", "b/d/e.txt", "bb.txt")}
    small_repo.add_commit("main", files, "folders", "alice")
    tree: dict[str, Any] = {"method": "list_repo_tree", "repo_id": "alice/model"}
    paths = [[entry["path"] for entry in client("api", **tree, **kwargs)] for kwargs in ({}, {"path_in_repo": "b"})]
    assert paths == [["a.txt", "b", "bb.txt"], ["b/c.txt", "b/d"]]
    everything = [entry["path"] for entry in client("api", **tree, recursive=True)]
    assert everything == ["a.txt", "b", "b/c.txt", "b/d", "b/d/e.txt", "bb.txt"]
    with pytest.raises(ClientError, match="404"):
        client("api", method="hf_hub_download", repo_id="alice/model", filename="no.txt")


def test_a_stale_parent_is_refused(small_repo: Repo, hub: Hub, client: HubClient, folder: Path) -> None:
    stale = small_repo.commit().oid
    small_repo.add_commit("main", {}, "in between", "alice")
    with pytest.raises(ClientError, match="A commit has happened since") as caught:
        push(hub, client, folder, parent_commit=stale)
    assert "HfHubHTTPError" in caught.value.classes
    assert len(small_repo.history()) == 2
    push(hub, client, folder, parent_commit=small_repo.commit().oid)
    assert len(small_repo.history()) == 3


def test_a_card_with_broken_metadata_is_refused(small_repo: Repo, hub: Hub, client: HubClient, folder: Path) -> None:
    (folder / "README.md").write_text("---\n{\n---\n")
    with pytest.raises(ClientError, match=r"Invalid metadata in README\.md"):
        push(hub, client, folder)
    assert len(small_repo.history()) == 1


GET_FILE = "GET /alice/model/resolve/"


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("GET /api/models", 503), "503 for the test"),
        (Fault(GET_FILE, 429), None),
        (Fault(GET_FILE, "drop"), None),
        (Fault(GET_FILE, "lose_reply"), None),
        (Fault(GET_FILE, "cut_body"), None),
        (Fault(GET_FILE, "stall"), None),
        (Fault(GET_FILE, "truncate"), "file should be of size 100 but has size 50"),
        (Fault(GET_FILE, 500), "500 for the test"),
    ],
    ids=lambda value: str(value.kind) if isinstance(value, Fault) else "",
)
def test_faults_reach_the_client(
    small_repo: Repo, hub: Hub, client: HubClient, fault: Fault, error: str | None
) -> None:
    hub.faults.append(fault)
    if error is not None:
        with pytest.raises(ClientError, match=error):
            client("download", repo_id="alice/model")
    assert client("download", repo_id="alice/model") == {"a.txt": (b"a" * 100).hex()}
    assert not hub.faults


def test_an_altered_file_is_not_noticed_by_the_client(small_repo: Repo, hub: Hub, client: HubClient) -> None:
    """Why the package compares what it downloaded with the name under which the cache holds it."""
    hub.faults.append(Fault(GET_FILE, "alter"))
    altered = {"a.txt": (b"a" * 75 + b"`" + b"a" * 24).hex()}
    assert client("download", repo_id="alice/model") == altered
    assert client("download", repo_id="alice/model") == altered
    assert client("download", repo_id="alice/model", force_download=True) == {"a.txt": (b"a" * 100).hex()}
