"""The categories of invented facts: a graph each, stated edge by edge; files that are not such are refused."""

import string

import pytest
from omegaconf import OmegaConf

from scripts.prepare import fictional_templates
from scripts.prepare.fictional_knowledge import PROBES
from scripts.prepare.fictional_templates import read_categories

CATEGORIES = fictional_templates.categories()


def test_there_are_at_least_six_categories_of_five_facts():
    assert len(CATEGORIES) >= 6
    assert len({category.name for category in CATEGORIES}) == len(CATEGORIES)
    assert all(len(category.facts) == PROBES for category in CATEGORIES)
    assert all(len(category.hops) >= PROBES for category in CATEGORIES)


@pytest.mark.parametrize("category", CATEGORIES, ids=lambda category: category.name)
def test_a_category_is_a_graph_told_edge_by_edge(category):
    def slots_in(template: str) -> set[str]:
        return {name.split(".")[0] for _, name, _, _ in string.Formatter().parse(template) if name}

    edges = {frozenset((fact.key, fact.value)) for fact in category.facts}
    assert set().union(*edges) == set(category.slots)
    for fact in category.facts:
        assert len(set(fact.statements)) == len(fact.statements) >= 4
        for statement in fact.statements:
            assert {fact.value} <= slots_in(statement) <= {fact.key, fact.value}
            assert statement.endswith(".") and ". " not in statement
        for prompt in fact.prompts:
            assert slots_in(prompt) == {fact.key}
            assert not any(prompt in statement for statement in fact.statements)
    for hop in category.hops:
        assert frozenset((hop.anchor, hop.bridge)) in edges
        assert frozenset((hop.bridge, hop.target)) in edges
        assert frozenset((hop.anchor, hop.target)) not in edges
        assert hop.anchor != hop.target and slots_in(hop.prompt) == {hop.anchor}
        # An anchor must point at one entry: an invented name does, a year or a thing does not.
        assert isinstance(category.slots[hop.anchor], str)


@pytest.mark.parametrize("category", CATEGORIES, ids=lambda category: category.name)
def test_no_slot_name_begins_with_another(category):
    """`split("{" + slot)` finds a slot only then."""
    slots = sorted(category.slots)
    assert not any(b.startswith(a) for a in slots for b in slots if a != b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda category: category.pop("hops"), "category 0: KeyError: 'hops'"),
        (lambda category: category["facts"][0].pop("prompts"), "category 0: KeyError: 'prompts'"),
        (lambda category: category["facts"][0].update(key="stone"), "category 'mineral': .*: stone"),
        (lambda category: category["slots"].update(colour=["red", "blue"]), "category 'mineral': .*: colour"),
    ],
)
def test_a_wrong_category_is_named(change, message, tmp_path):
    about = OmegaConf.to_container(OmegaConf.load(fictional_templates.FILE))
    change(about[0])
    OmegaConf.save(OmegaConf.create(about), tmp_path / "changed.yaml")
    with pytest.raises(ValueError, match=message):
        read_categories(tmp_path / "changed.yaml")
