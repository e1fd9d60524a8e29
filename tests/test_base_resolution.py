from __future__ import annotations

from pathlib import Path

import pytest

from sedac_hf.base_resolution import HubOptions, find_base, is_hub_name, portable_base_name
from sedac_hf.errors import BaseNotFoundError, ConfigError


def make_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that holds a base and an artefact; the current directory is elsewhere."""
    make_model(tmp_path / "repo" / ".models" / "base")
    make_model(tmp_path / "repo" / "examples" / "artefact")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return tmp_path / "repo"


def test_a_relative_base_is_found_from_the_artefact_upwards(repository: Path) -> None:
    found = find_base(".models/base", None, repository / "examples" / "artefact")
    assert Path(found) == repository / ".models" / "base"


def test_the_artefacts_own_folder_comes_before_its_parents(repository: Path) -> None:
    artefact = repository / "examples" / "artefact"
    make_model(artefact / ".models" / "base")
    assert Path(find_base(".models/base", None, artefact)) == artefact / ".models" / "base"


def test_a_relative_base_is_found_from_the_current_directory(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    assert find_base(".models/base", None, Path("/nonexistent/artefact")) == ".models/base"
    assert find_base(".models/base", None, None) == ".models/base"


def test_an_absolute_base_is_found(repository: Path) -> None:
    path = str(repository / ".models" / "base")
    assert find_base(path, None, None) == path


def test_a_folder_without_a_config_is_no_base(repository: Path) -> None:
    (repository / ".models" / "empty").mkdir()
    with pytest.raises(BaseNotFoundError, match=r"\.models/empty"):
        find_base(".models/empty", None, repository / "examples" / "artefact")


def test_a_missing_base_says_where_it_was_looked_for_and_what_to_do(repository: Path) -> None:
    artefact = repository / "examples" / "artefact"
    with pytest.raises(BaseNotFoundError) as caught:
        find_base(".models/other", None, artefact)
    message = str(caught.value)
    assert all(str(place) in message for place in (artefact, repository, Path.cwd()))
    assert "base_model=" in message
    assert "--base" in message
    assert "get_reference_model" not in message
    assert isinstance(caught.value, FileNotFoundError)


def test_a_missing_reference_model_says_which_script_makes_it(repository: Path) -> None:
    with pytest.raises(BaseNotFoundError, match="get_reference_model"):
        find_base(".models/smollm2-135m-instruct", None, repository / "examples" / "artefact")


def test_a_hub_name_stays_one(repository: Path) -> None:
    assert find_base("org/base-1b", None, repository / "examples" / "artefact") == "org/base-1b"


def test_a_pinned_hub_name_is_not_mistaken_for_a_folder(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model(repository / "org" / "base")
    monkeypatch.chdir(repository)
    assert find_base("org/base", None, None) == "org/base"
    artefact = repository / "examples" / "artefact"
    assert find_base("org/base", "0" * 40, artefact) == "org/base"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/base", True),
        ("gpt2", True),
        (".models/base", False),
        ("/models/base", False),
        ("a/b/c", False),
        ("../base", False),
    ],
)
def test_hub_names_are_told_from_paths(name: str, expected: bool) -> None:
    assert is_hub_name(name) == expected


def test_arguments_go_where_they_belong() -> None:
    options, rest = HubOptions.split(
        {
            "revision": "v1",
            "subfolder": "sedac",
            "token": "hf_x",
            "cache_dir": "/cache",
            "local_files_only": True,
            "dtype": "auto",
            "device_map": "auto",
            "attn_implementation": "eager",
            "quantization_config": {"q": 1},
            "trust_remote_code": None,
            "_from_auto": True,
            "_from_pipeline": "text-generation",
            "adapter_kwargs": {"token": "hf_x"},
        }
    )
    assert (options.revision, options.subfolder) == ("v1", "sedac")
    assert options.shared() == {"token": "hf_x", "cache_dir": "/cache", "local_files_only": True}
    assert rest == {
        "dtype": "auto",
        "device_map": "auto",
        "attn_implementation": "eager",
        "quantization_config": {"q": 1},
    }


def test_code_of_the_base_runs_only_when_the_user_says_so() -> None:
    assert HubOptions.split({"trust_remote_code": True})[1] == {"trust_remote_code": True}
    assert HubOptions.split({"trust_remote_code": None})[1] == {}


@pytest.mark.parametrize("name", ["state_dict", "output_loading_info"])
def test_arguments_without_a_meaning_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        HubOptions.split({name: {"a": 1}})


def test_a_base_beside_the_artefact_is_named_relative_to_both(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    base = repository / ".models" / "base"
    artefact = Path("examples/artefact")
    name = portable_base_name(str(base), artefact)
    assert name == ".models/base"
    assert find_base(name, None, artefact) == ".models/base"


def test_a_base_elsewhere_keeps_its_path(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository / "examples")
    base = str(repository / ".models" / "base")
    assert portable_base_name(base, Path("artefact")) == base
    assert portable_base_name("org/base", Path("artefact")) == "org/base"
