"""Checkpoints by name: folders and ids of the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

from olmo import checkpoint


def test_a_folder_resolves_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.resolve(str(tmp_path)) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "allenai/OLMo-1B").mkdir(parents=True)
    assert checkpoint.resolve("allenai/OLMo-1B") == Path("allenai/OLMo-1B")
    with pytest.raises(FileNotFoundError, match="allenai/OLMo-7B: no such checkpoint folder"):
        checkpoint.resolve("allenai/OLMo-7B")  # its folder is there, so it is no hub id


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "a/b/c", "runs/x/step5-unsharded"])
def test_a_path_that_is_no_hub_id_is_not_looked_up(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        checkpoint.resolve(name)


@pytest.mark.parametrize("name", ["owner/name", "owner/name@step738020-tokens3095B"])
def test_a_hub_id_offline_is_one_clear_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        checkpoint.resolve(name)
    said = str(caught.value)
    assert said.startswith(f"{name}: no such folder, ") and "\n" not in said
