import pytest

from serve.errors import ConfigError
from serve.models.checkpoint import default_name, find
from serve.models.gguf.hub import chosen, fetch

NAMES = [
    *("README.md", "a-Q4_K_M.gguf", "a-Q8_0.gguf", "mmproj-a-Q8_0.gguf"),
    *(f"big/a-F16-0000{part}-of-00002.gguf" for part in (1, 2)),
]


@pytest.mark.parametrize(
    ("wanted", "files"),
    [
        ("Q4_K_M", ["a-Q4_K_M.gguf"]),
        ("q8_0", ["a-Q8_0.gguf"]),
        ("a-Q8_0.gguf", ["a-Q8_0.gguf"]),
        ("F16", ["big/a-F16-00001-of-00002.gguf", "big/a-F16-00002-of-00002.gguf"]),
    ],
)
def test_a_quantization_names_its_file_and_all_its_parts(wanted, files):
    assert chosen(NAMES, "org/a", wanted) == files


def test_what_is_not_there_is_said_with_what_is():
    with pytest.raises(ConfigError, match=r"org/a has no file of Q2_K; it has: a-Q4_K_M.gguf"):
        chosen(NAMES, "org/a", "Q2_K")
    with pytest.raises(ConfigError, match="no GGUF file at all"):
        chosen(["config.json"], "org/a", "Q4_K_M")


def test_the_hubs_own_name_is_the_models(tmp_path):
    assert default_name("hf://org/Tiny-Chat-GGUF:Q4_K_M") == "Tiny-Chat-GGUF"
    with pytest.raises(ConfigError, match="write hf://org/name:Q4_K_M"):
        find("hf://nothing", tmp_path)


def test_without_the_hub_what_an_earlier_start_fetched_is_served(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, local_files_only: str(tmp_path))
    said: list[str] = []
    with pytest.raises(ConfigError, match="could not be fetched: ConnectionError: no route"):
        fetch("hf://org/a:Q8_0", said.append)
    (tmp_path / "a-Q8_0.gguf").touch()
    assert fetch("hf://org/a:Q8_0", said.append) == tmp_path / "a-Q8_0.gguf"
    assert "the hub cannot be asked" in said[-1]
