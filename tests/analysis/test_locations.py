"""Which folders the flags name, and in which order."""

from pathlib import Path

import pytest
import torch

from analysis import locations
from analysis.locations import (
    add_checkpoint_flags,
    checkpoint_locations,
    label_of,
    step_of,
    tokens_of,
)
from olmo import checkpoint
from olmo.exceptions import ConfigurationError, Parser


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    """Paths on a command line are relative to the working directory."""
    monkeypatch.chdir(tmp_path)


def checkpoint_folders(step, model_size, named):
    places = checkpoint_locations(None if step is None else [step], model_size, named)
    return [place if isinstance(place, Path) else checkpoint.resolve(place) for place in places]


def make(*names: str) -> list[Path]:
    folders = [Path(name) for name in names]
    for folder in folders:
        folder.mkdir(parents=True)
    return folders


@pytest.mark.parametrize(("size", "place"), [("1B", "checkpoints/pretrained_1B"), ("7B", "checkpoints/pretrained")])
def test_a_step_is_the_published_folder(size, place):
    """formats.md, section 1."""
    [folder] = make(f"{place}/738020-unsharded")
    assert checkpoint_folders(738020, size, []) == [folder]


def test_a_step_that_is_not_there_says_where_it_should_be_and_what_else_to_do():
    make("checkpoints/pretrained/738020-unsharded")  # of the 7B model
    with pytest.raises(ConfigurationError) as error:
        checkpoint_folders(738020, "1B", [])
    assert "checkpoints/pretrained_1B/738020-unsharded" in str(error.value)
    assert "allenai/OLMo-1B@step738020" in str(error.value)


def test_step_0_is_a_step():
    [folder] = make("checkpoints/pretrained_1B/0-unsharded")
    assert checkpoint_folders(0, "1B", []) == [folder]


def test_a_pattern_is_expanded_in_order_of_the_steps():
    """90 before 720, which sorting by name would turn round; files are no checkpoints."""
    names = [f"run/step{step}-unsharded" for step in (720, 90, 1000, 135)]
    make(*names)
    Path("run/step5-unsharded").write_text("not a folder")
    found = checkpoint_folders(None, "1B", ["run/step*-unsharded"])
    assert [folder.name for folder in found] == [f"step{step}-unsharded" for step in (90, 135, 720, 1000)]


def test_folders_of_one_step_come_in_the_order_of_their_names(monkeypatch):
    """Not in the order in which a file system happens to list them."""
    make("b/step9-unsharded", "a/step9-unsharded", "c/step9-unsharded", "b/step8-unsharded")
    listed = ["c/step9-unsharded", "a/step9-unsharded", "b/step9-unsharded", "b/step8-unsharded"]
    monkeypatch.setattr(locations.glob, "glob", lambda pattern: listed)
    found = [str(folder) for folder in checkpoint_folders(None, "1B", ["*/step*"])]
    assert found == ["b/step8-unsharded", "a/step9-unsharded", "b/step9-unsharded", "c/step9-unsharded"]


def test_several_names_stay_in_the_order_given():
    first, second = make("run/step720-unsharded", "run/step90-unsharded")
    assert checkpoint_folders(None, "1B", [str(first), str(second)]) == [first, second]
    assert checkpoint_folders(None, "1B", [str(first), "run/step9?-*"]) == [first, second]


def test_a_pattern_that_matches_nothing_is_an_error_that_names_it():
    make("run")
    with pytest.raises(ConfigurationError, match=r"run/step\*-unsharded: no folder matches"):
        checkpoint_folders(None, "1B", ["run/step*-unsharded"])


@pytest.mark.parametrize("name", ["run/step5-unsharded", "/nowhere/at/all", "step5"])
def test_a_path_that_is_not_there_is_an_error_that_names_it(name):
    make("run")
    with pytest.raises(FileNotFoundError, match=f"{name}: no such checkpoint folder"):
        checkpoint_folders(None, "1B", [name])


def test_a_hub_id_is_looked_up_on_the_hub_with_its_revision(monkeypatch, tmp_path):
    """Which models of the hub there are is not asked here; a folder of that name comes first."""
    asked = []

    class Hub:
        def list_repo_files(self, name, revision):
            asked.append((name, revision))
            return ["config.json", "model.safetensors"]

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path / "snapshot"))
    named = ["allenai/OLMo-1B@step738020-tokens3095B", "allenai/OLMo-1B"]
    assert checkpoint_folders(None, "1B", named) == [tmp_path / "snapshot"] * 2
    assert asked == [("allenai/OLMo-1B", "step738020-tokens3095B"), ("allenai/OLMo-1B", None)]
    [folder] = make("allenai/OLMo-1B")
    assert checkpoint_folders(None, "1B", ["allenai/OLMo-1B"]) == [folder]
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step90-unsharded", 90),
        ("738020-unsharded", 738020),
        ("step720", 720),
        ("step0-unsharded", 0),
        ("12", 12),
        ("step738020-tokens3095B", 738020),
        ("latest", -1),
        ("unsharded-5", -1),
        ("OLMo-1B", -1),
        ("7B-hf", -1),
        # The folder of a model from the hub is named by a commit, whose first letters may be digits.
        ("73802cbdf3d0d0de9e6ba2c6a4b0ee56ee0b5cf3", -1),
    ],
)
def test_step_of_a_folder(name, step):
    assert step_of(Path("anywhere/step3") / name) == step


@pytest.mark.parametrize(
    ("location", "label", "step", "tokens"),
    [
        ("allenai/OLMo-1B@step738020-tokens3095B", "step738020-tokens3095B", 738020, 3095 * 10**9),
        ("allenai/OLMo-1B@main", "main", -1, None),
        ("allenai/OLMo-1B", "OLMo-1B", -1, None),
        (Path("runs/step90-unsharded"), "step90-unsharded", 90, None),
        (Path("kept/step20000-tokens84B"), "step20000-tokens84B", 20000, 84 * 10**9),
    ],
)
def test_what_a_name_tells(location, label, step, tokens):
    assert (label_of(location), step_of(location), tokens_of(location, Path("nowhere"))) == (label, step, tokens)


def test_the_trainers_state_knows_the_tokens(tmp_path):
    torch.save({"global_train_tokens_seen": 83886080000}, tmp_path / "train.pt")
    assert tokens_of("allenai/OLMo-1B@step20000-tokens84B", tmp_path) == 83886080000
    (tmp_path / "train.pt").write_bytes(b"no state")
    assert tokens_of("allenai/OLMo-1B@step20000-tokens84B", tmp_path) == 84 * 10**9


def test_all_steps_of_a_folder_and_several():
    """In order of their number; other folders are no steps."""
    make("checkpoints/pretrained_1B/latest-unsharded", "checkpoints/pretrained_1B/5-old")
    with pytest.raises(ConfigurationError, match="pretrained_1B: no checkpoints"):
        checkpoint_locations(["all"], "1B", [])
    folders = make(*(f"checkpoints/pretrained_1B/{step}-unsharded" for step in (90, 1000, 200)))
    assert checkpoint_locations(["all"], "1B", []) == [folders[0], folders[2], folders[1]]
    assert checkpoint_locations([1000, 90, 1000], "1B", []) == [folders[0], folders[1]]
    with pytest.raises(ConfigurationError, match="5-unsharded: no such checkpoint"):
        checkpoint_locations([90, 5], "1B", [])
    with pytest.raises(ConfigurationError, match="--step: `all`, or numbers"):
        checkpoint_locations(["all", 5], "1B", [])


def test_a_checkpoint_named_twice_is_one():
    [folder] = make("run/step90-unsharded")
    assert checkpoint_locations(None, "1B", ["run/step90-unsharded", "run/*", "a/b@c", "a/b@c"]) == [folder, "a/b@c"]


def parsed(several: bool, *arguments: str):
    parser = Parser(prog="test")
    add_checkpoint_flags(parser, several)
    return parser.parse_args(arguments)


def test_the_flags():
    assert (parsed(True, "--step", "5").step, parsed(True, "--step", "5").model_size) == ([5], "1B")
    assert parsed(True, "--step", "5", "90", "--model_size", "7B").model_size == "7B"
    assert parsed(True, "--step", "5", "90").step == [5, 90] and parsed(True, "--step", "all").step == ["all"]
    assert parsed(False, "--step", "5").step == 5
    assert parsed(True, "--checkpoint", "a", "b*").checkpoint == ["a", "b*"]
    assert parsed(False, "--checkpoint", "a").checkpoint == "a"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--step", "5", "--checkpoint", "a"],
        ["--step", "five"],
        ["--step"],
        ["--model_size", "2B", "--step", "5"],
        ["--checkpoint"],
    ],
)
def test_flags_that_name_nothing_or_two_things_are_refused(arguments):
    with pytest.raises(ConfigurationError):
        parsed(True, *arguments)
