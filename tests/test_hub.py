"""The artefact on a Hub: pushed, pulled, pinned and read again offline, over the real protocol.

`huggingface_hub` reads its settings when it is imported, so what talks to the server runs in a
process of its own. The functions `in_child_*` are what that process does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import HubServer, Repository

pytestmark = pytest.mark.slow

ARTEFACT = "user/tiny-sedac"
BASE = "org/tiny-base"


class Child:
    """A process that knows the server as the Hub."""

    def __init__(self, environment: dict[str, str]) -> None:
        """Start it with the given environment variables added to ours."""
        self._saved = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            self._pool.submit(os.getpid).result()  # the process starts with the first task
        finally:
            for name, value in self._saved.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function of this module there; its exceptions arrive here."""
        return self._pool.submit(function, *arguments).result()

    def close(self) -> None:
        """End it."""
        self._pool.shutdown()


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


# -- what the other process does ------------------------------------------------------------------


def in_child_save_base(folder: str, seed: int) -> None:
    from tests.artefacts import save_base

    save_base(Path(folder), seed)


def in_child_push(repo: str, options: dict[str, Any]) -> list[int]:
    from tests.artefacts import issue, load_base, wrap_base

    model = wrap_base(load_base(BASE))
    model.push_to_hub(repo, certificate=issue(), **options)
    return write(model)


def in_child_load(repo: str, options: dict[str, Any]) -> dict[str, Any]:
    from sedac_hf import SedacForCausalLM

    model = SedacForCausalLM.from_pretrained(repo, **options)
    return {
        "tokens": write(model),
        "exit_share": model.exit_stats.exit_share,
        "base": model.config.base_model_name_or_path,
        "revision": model.config.base_model_revision,
        "heads": len(model.exit_heads),
        "mode": model.config.mode,
    }


def in_child_load_error(repo: str, options: dict[str, Any]) -> tuple[list[str], str]:
    try:
        in_child_load(repo, options)
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__], str(error)
    return [], ""


def in_child_load_and_push(source: str, repo: str, options: dict[str, Any]) -> None:
    from sedac_hf import SedacForCausalLM

    SedacForCausalLM.from_pretrained(source).push_to_hub(repo, **options)


def in_child_pipeline(repo: str) -> tuple[str, str]:
    from transformers import pipeline

    import sedac_hf  # noqa: F401  (registers the model with transformers)

    generator = pipeline("text-generation", model=repo, device="cpu")
    text = generator("w05 w09 w11", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    return type(generator.model).__name__, text


def in_child_auto_class(repo: str, trust_remote_code: bool) -> tuple[bool, str]:
    import sys

    from transformers import AutoModelForCausalLM

    before = "sedac_hf" in sys.modules
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=trust_remote_code)
    return before, type(model).__name__


def in_child_validate_card(repo: str) -> None:
    from huggingface_hub import ModelCard

    ModelCard.load(repo).validate()


def in_child_save(base: str, folder: str) -> str | None:
    """Wrap a loaded base and save: which commit of it is pinned?"""
    from tests.artefacts import load_base, wrap_base

    wrap_base(load_base(base)).save_pretrained(folder)
    revision: str | None = json.loads(Path(folder, "config.json").read_text())[
        "base_model_revision"
    ]
    return revision


def in_child_push_uncertified(repo: str) -> None:
    from tests.artefacts import load_base, wrap_base

    wrap_base(load_base(BASE)).push_to_hub(repo)


def in_child_save_and_push(folder: str, repo: str) -> None:
    from sedac_hf import SedacForCausalLM

    SedacForCausalLM.from_pretrained(ARTEFACT).save_pretrained(
        folder, push_to_hub=True, repo_id=repo, commit_message="Saved and pushed"
    )


def write(model: Any) -> list[int]:
    from tests.tiny_models import prompt

    tokens: list[int] = model.generate(prompt(1, 5), max_new_tokens=10, do_sample=False)[0].tolist()
    return tokens


# -- tests ----------------------------------------------------------------------------------------


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
