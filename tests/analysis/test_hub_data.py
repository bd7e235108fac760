"""Names of datasets on the hub: what they stand for, and what is said of those that stand for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.hub_data import find
from tests.hub import Hub
from tests.hub_texts import add_c4, made_texts, parquet, texts_serving

TEXTS = made_texts(40)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with pytest.MonkeyPatch.context() as patch, texts_serving(tmp_path_factory.mktemp("cache"), patch) as hub:
        add_c4(hub, TEXTS)
        ids = {"input_ids": [[1, 2, 3]] * 4, "attention_mask": [[1, 1, 0]] * 4}
        scores = {"score": [0.5] * 4, "image": [b"png"] * 4}
        for name, columns in (("ids", ids), ("two", {"title": TEXTS[:4], "body": TEXTS[:4], **scores, **ids})):
            hub.add(f"owner/{name}", {"data/train-0.parquet": parquet(**columns)}, kind="datasets")
        hub.add("owner/one", {"test.csv": b"url,n\nhttp://a,1\n", "odd.csv": b"url,n\nhttp://b,2\n"}, kind="datasets")
        hub.add("owner/gated", {"train.parquet": parquet(text=TEXTS)}, kind="datasets", gated=True)
        hub.add("owner/script", {"script.py": b"raise SystemExit('executed')"}, kind="datasets")
        hub.add("owner/zst", {"a.jsonl.zst": b"\x28\xb5\x2f\xfd"}, kind="datasets")
        hub.add("owner/images", {"train/a.png": b"png"}, kind="datasets")
        hub.add("owner/bare", {"weights.xyz": b"x"}, kind="datasets")
        hub.add("owner/damaged", {"train.parquet": b"PAR1 and no more"}, kind="datasets")
        yield hub


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("owner/c4:en:validation:text", "en:validation:text"),
        ("owner/c4:en", "en:train:text"),
        ("owner/c4:en::url", "en:train:url"),
        ("owner/c4@main:de:text", "de:train:text"),
        ("owner/ids", "default:train:input_ids"),
        ("owner/ids::train", "default:train:input_ids"),
        ("owner/two:title", "default:train:title"),
    ],
)
def test_what_a_name_leaves_open_is_the_datasets_own_default(hub: Hub, name: str, place: str) -> None:
    column = find(f"hub:{name}")
    dataset = name.partition(":")[0].partition("@")[0]
    commit = hub.repositories["datasets", dataset].branches["main"]
    assert str(column) == f"hub:{dataset}@{commit}:{place}"
    assert (column.is_text, column.is_masked) == ((False, True) if place.endswith("ids") else (True, False))
    assert find(str(column)) == column


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner", "expected hub:owner/name[@revision][:config][:split][:column]"),
        ("owner/c4:en:train:text:more", "expected hub:owner/name"),
        ("owner/none", "the hub has no dataset owner/none, or it is private"),
        ("owner/c4@mian:en", "'mian' is no revision (main), did you mean 'main'?"),
        ("owner/c4", "name one of its configurations: en, de"),
        ("owner/c4:eng:train:text", "'eng' is no configuration (en, de), did you mean 'en'?"),
        ("owner/c4:en:valid:text", "'valid' is no split (train, validation)"),
        ("owner/c4:en:train:txt", "'txt' is no column (text, url), did you mean 'text'?"),
        ("owner/ids:txt", "'txt' is no configuration (default) or split (train) or column (input_ids, attention_mask)"),
        ("owner/two:image", "column 'image' holds binary, neither text nor token ids; text is in title, body"),
        ("owner/two:score", "column 'score' holds float64, neither"),
        ("owner/images", "holds imagefolder files; readable are parquet, json, csv, text, arrow"),
        ("owner/bare", "No (supported) data files found in owner/bare"),
        ("owner/script", "its rows are made by a program, script.py, which is not executed"),
        (
            "owner/gated",
            "access needs its owner's consent: ask at https://huggingface.co/datasets/owner/gated, then log",
        ),
        ("owner/zst", "its files are compressed with zstd; install what reads them: pip install zstandard"),
        ("owner/damaged", "Parquet"),
    ],
)
def test_a_name_of_nothing_that_can_be_read_is_one_line(hub: Hub, name: str, message: str) -> None:
    with pytest.raises((ValueError, PermissionError, ImportError)) as raised:
        find(f"hub:{name}")
    assert str(raised.value).startswith(f"hub:{name}: ") and message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_login_opens_a_gated_dataset(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert find("hub:owner/gated").split == "train"


def test_a_name_is_resolved_anew_when_its_branch_has_moved_and_needs_no_hub_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with texts_serving(tmp_path, monkeypatch) as hub:
        first = hub.add("owner/texts", {"train.parquet": parquet(text=TEXTS)}, kind="datasets")
        assert find("hub:owner/texts").commit == first
        hub.asked.clear()
        find("hub:owner/texts")
        assert len(hub.asked) == 1  # for the commit
        second = hub.add("owner/texts", {"train.parquet": parquet(text=TEXTS[:5])}, kind="datasets")
        moved = find("hub:owner/texts")
        assert moved.commit == second != first
        find(str(moved))
        hub.asked.clear()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert find("hub:owner/texts") == moved
        assert f"HF_HUB_OFFLINE is set: unset it, or name a file; continuing with commit {second} of" in caplog.text
        caplog.clear()
        assert find(str(moved)) == moved and not caplog.text and not hub.asked
        with pytest.raises(OSError, match="hub:owner/other: not read yet, and HF_HUB_OFFLINE is set"):
            find("hub:owner/other")


def test_without_an_answer_the_last_commit_is_used_or_the_reason_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with texts_serving(tmp_path, monkeypatch) as hub:
        commit = hub.add("owner/texts", {"train.parquet": parquet(text=TEXTS)}, kind="datasets")
        find("hub:owner/texts")
        hub.add("owner/other", {"train.parquet": parquet(text=TEXTS)}, kind="datasets")
        hub.failures = {f"/api/datasets/owner/{name}?expand=sha": [503] * 9 for name in ("texts", "other")}
        assert find("hub:owner/texts").commit == commit
        assert "503" in caplog.text and f"continuing with commit {commit} of earlier" in caplog.text
        with pytest.raises(OSError, match=r"hub:owner/other: 503 .*\(5 attempts\)"):
            find("hub:owner/other")
