"""The artefact on a Hub: pushed, pulled, pinned and read again offline, over the real protocol.

What talks to the server runs in a process of its own, see `tests.hub_child`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_child import (
    ARTEFACT,
    BASE,
    Child,
    in_child_auto_class,
    in_child_load,
    in_child_load_and_push,
    in_child_load_error,
    in_child_pipeline,
    in_child_push,
    in_child_push_uncertified,
    in_child_save,
    in_child_save_and_push,
    in_child_save_base,
    in_child_validate_card,
)
from tests.hub_server import HubServer, Repository

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="module")
def child(hub: HubServer, home: Path) -> Iterator[Child]:
    process = Child(hub.environment(home))
    yield process
    process.close()


@pytest.fixture(scope="module")
def base_commit(hub: HubServer, child: Child, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The commit of the base on the Hub."""
    folder = tmp_path_factory.mktemp("base")
    child(in_child_save_base, str(folder), 0)
    return hub.add_folder(BASE, folder)


@pytest.fixture(scope="module")
def pushed(hub: HubServer, child: Child, base_commit: str) -> list[int]:
    """The artefact on the Hub; what its model writes."""
    return child(in_child_push, ARTEFACT, {})


def test_what_is_pushed_is_an_artefact_with_its_own_card(
    hub: HubServer, pushed: list[int], base_commit: str
) -> None:
    files = hub.files(ARTEFACT)
    expected = {"config.json", "sedac.safetensors", "certificate.json", "tokenizer.json"}
    assert expected <= files.keys()
    assert "model.safetensors" not in files
    card = files["README.md"].decode()
    assert "library_name: sedac_hf" in card
    assert f"base_model: {BASE}" in card
    assert "base_model_relation: adapter" in card
    assert f'name = "{ARTEFACT}"' in card
    assert "Model Card for" not in card
    config = json.loads(files["config.json"])
    assert config["base_model_name_or_path"] == BASE
    assert config["base_model_revision"] == base_commit


def test_weights_travel_by_lfs_and_the_rest_in_the_commit(
    hub: HubServer, pushed: list[int]
) -> None:
    assert hub.files(ARTEFACT)["sedac.safetensors"] in hub.lfs_objects.values()
    assert len(hub.repositories[ARTEFACT].commits) == 2  # made, and one upload


def test_the_card_passes_the_hubs_own_check(
    hub: HubServer, child: Child, pushed: list[int]
) -> None:
    before = len(hub.paths("POST"))
    child(in_child_validate_card, ARTEFACT)
    assert "/api/validate-yaml" in hub.paths("POST")[before:]


def test_a_model_comes_back_by_name(child: Child, pushed: list[int], base_commit: str) -> None:
    found = child(in_child_load, ARTEFACT, {})
    assert found["tokens"] == pushed
    assert found["exit_share"] > 0
    assert (found["base"], found["revision"]) == (BASE, base_commit)


def test_the_pinned_commit_of_the_base_is_loaded_when_the_base_has_moved_on(
    hub: HubServer, child: Child, pushed: list[int], base_commit: str, tmp_path: Path
) -> None:
    child(in_child_save_base, str(tmp_path / "second"), 1)
    second = hub.add_folder(BASE, tmp_path / "second")
    try:
        assert second != base_commit
        assert child(in_child_load, ARTEFACT, {})["tokens"] == pushed
        kinds, message = child(in_child_load_error, ARTEFACT, {"base_revision": "main"})
        assert "FingerprintError" in kinds
        assert "other weights" in message
        found = child(in_child_load, ARTEFACT, {"base_revision": second, "mode": "exact"})
        assert found["mode"] == "exact"
    finally:
        hub.repositories[BASE].branches["main"] = base_commit


def test_a_commit_of_the_base_is_pinned_only_when_it_is_sure_which(
    hub: HubServer, child: Child, base_commit: str, tmp_path: Path
) -> None:
    base = "org/moving-base"
    hub.repositories[base] = Repository()
    first = hub.repositories[base].add_commit(hub.files(BASE))
    assert child(in_child_save, base, str(tmp_path / "one")) == first
    child(in_child_save_base, str(tmp_path / "second"), 1)
    hub.add_folder(base, tmp_path / "second")
    assert child(in_child_save, base, str(tmp_path / "two")) is None


def test_everything_of_one_load_comes_from_one_commit(
    hub: HubServer, child: Child, pushed: list[int], tmp_path: Path
) -> None:
    start = len(hub.requests)
    assert child(in_child_load, ARTEFACT, {"cache_dir": str(tmp_path)})["tokens"] == pushed
    sha = hub.repositories[ARTEFACT].branches["main"]
    asked = [request.path for request in hub.requests[start:]]
    weights = [path for path in asked if path.endswith("/sedac.safetensors")]
    base = [path for path in asked if path.startswith(f"/{BASE}/resolve/")]
    assert weights
    assert base
    assert all(path == f"/{ARTEFACT}/resolve/{sha}/sedac.safetensors" for path in weights)
    pinned = hub.repositories[BASE].branches["main"]
    assert all(path.startswith(f"/{BASE}/resolve/{pinned}/") for path in base)


def test_it_loads_again_without_a_network(
    hub: HubServer, home: Path, child: Child, pushed: list[int]
) -> None:
    child(in_child_pipeline, ARTEFACT)  # fetches the tokenizer as well
    offline = Child(hub.environment(home, offline=True))
    try:
        start = len(hub.requests)
        assert offline(in_child_load, ARTEFACT, {})["tokens"] == pushed
        assert offline(in_child_pipeline, ARTEFACT)[0] == "SedacForCausalLM"
        assert hub.requests[start:] == []
        kinds, message = offline(in_child_load_error, "user/never-seen", {})
        assert "ArtefactError" in kinds
        assert "user/never-seen" in message
    finally:
        offline.close()


def test_local_files_only_asks_for_nothing(hub: HubServer, child: Child, pushed: list[int]) -> None:
    child(in_child_load, ARTEFACT, {})
    start = len(hub.requests)
    assert child(in_child_load, ARTEFACT, {"local_files_only": True})["tokens"] == pushed
    assert hub.requests[start:] == []


def test_a_branch_can_be_pushed_and_pulled(hub: HubServer, child: Child, pushed: list[int]) -> None:
    main = hub.repositories[ARTEFACT].branches["main"]
    child(
        in_child_load_and_push,
        ARTEFACT,
        ARTEFACT,
        {"revision": "trial", "tags": ["trial-tag"], "commit_message": "A trial"},
    )
    assert hub.repositories[ARTEFACT].branches["main"] == main
    assert b"trial-tag" in hub.files(ARTEFACT, "trial")["README.md"]
    assert b"trial-tag" not in hub.files(ARTEFACT)["README.md"]
    assert child(in_child_load, ARTEFACT, {"revision": "trial"})["tokens"] == pushed


def test_a_push_replaces_the_card_of_the_hub_and_the_stale_certificate(
    hub: HubServer, child: Child, pushed: list[int]
) -> None:
    repo = "user/replaced"
    hub.repositories[repo] = Repository()
    hub.repositories[repo].add_commit(
        {"README.md": b"# Model Card for Model ID", "certificate.json": b"{}", "notes.txt": b"mine"}
    )
    child(in_child_push_uncertified, repo)
    files = hub.files(repo)
    assert b"library_name: sedac_hf" in files["README.md"]
    assert "certificate.json" not in files
    assert files["notes.txt"] == b"mine"


def test_saving_can_push_as_well(
    hub: HubServer, child: Child, pushed: list[int], tmp_path: Path
) -> None:
    child(in_child_save_and_push, str(tmp_path / "out"), "user/saved-and-pushed")
    local = (tmp_path / "out" / "sedac.safetensors").stat().st_size
    assert len(hub.files("user/saved-and-pushed")["sedac.safetensors"]) == local


def test_an_artefact_in_a_subfolder(hub: HubServer, child: Child, pushed: list[int]) -> None:
    files = {f"exits/{path}": content for path, content in hub.files(ARTEFACT).items()}
    hub.repositories["user/collection"] = Repository()
    hub.repositories["user/collection"].add_commit(files)
    assert child(in_child_load, "user/collection", {"subfolder": "exits"})["tokens"] == pushed


def test_a_base_inside_the_repository(hub: HubServer, child: Child, pushed: list[int]) -> None:
    child(in_child_load_and_push, ARTEFACT, "user/whole", {"save_base_model": True})
    assert "base/model.safetensors" in hub.files("user/whole")
    found = child(in_child_load, "user/whole", {})
    assert (found["tokens"], found["base"]) == (pushed, "./base")


def test_a_private_artefact_and_its_private_base_want_the_token(
    hub: HubServer, child: Child, pushed: list[int]
) -> None:
    for name in (ARTEFACT, BASE):
        files = dict(hub.files(name))
        config = json.loads(files["config.json"])
        if config["model_type"] == "sedac":
            config |= {"base_model_name_or_path": f"{BASE}-private", "base_model_revision": None}
            files["config.json"] = json.dumps(config).encode()
        hub.repositories[f"{name}-private"] = Repository(token="hf_secret")
        hub.repositories[f"{name}-private"].add_commit(files)
    kinds, message = child(in_child_load_error, f"{ARTEFACT}-private", {})
    assert "ArtefactError" in kinds
    assert f"{ARTEFACT}-private" in message
    found = child(in_child_load, f"{ARTEFACT}-private", {"token": "hf_secret"})
    assert found["tokens"] == pushed


def test_a_base_that_is_gone_is_named(hub: HubServer, child: Child, pushed: list[int]) -> None:
    files = dict(hub.files(ARTEFACT))
    config = json.loads(files["config.json"])
    config |= {"base_model_name_or_path": "org/gone", "base_model_revision": None}
    hub.repositories["user/orphan"] = Repository()
    hub.repositories["user/orphan"].add_commit(files | {"config.json": json.dumps(config).encode()})
    kinds, message = child(in_child_load_error, "user/orphan", {})
    assert "BaseNotFoundError" in kinds
    assert "org/gone" in message
    assert "base_model=" in message


def test_an_upload_that_lacks_the_weights_is_no_artefact(
    hub: HubServer, child: Child, pushed: list[int]
) -> None:
    files = {k: v for k, v in hub.files(ARTEFACT).items() if k != "sedac.safetensors"}
    hub.repositories["user/half"] = Repository()
    hub.repositories["user/half"].add_commit(files)
    kinds, message = child(in_child_load_error, "user/half", {})
    assert "ArtefactError" in kinds
    assert "sedac.safetensors" in message


def test_a_plain_base_on_the_hub_is_wrapped_and_pinned(child: Child, base_commit: str) -> None:
    found = child(in_child_load, BASE, {})
    assert found["heads"] == 0
    assert (found["mode"], found["base"], found["revision"]) == ("off", BASE, base_commit)


def test_the_pipeline_takes_the_name(child: Child, pushed: list[int]) -> None:
    kind, text = child(in_child_pipeline, ARTEFACT)
    assert kind == "SedacForCausalLM"
    assert text.startswith("w05 w09 w11w")


def test_transformers_alone_finds_the_package_by_the_file_of_code(
    hub: HubServer, home: Path, pushed: list[int]
) -> None:
    bare = Child(hub.environment(home))
    try:
        assert bare(in_child_auto_class, ARTEFACT, True) == (False, "SedacForCausalLM")
    finally:
        bare.close()
