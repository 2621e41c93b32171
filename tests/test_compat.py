"""The table of supported releases says what `make compat` found."""

import json
from xml.etree import ElementTree

import compat
import pytest

from hico_kernels.patch.families import FAMILIES

RESULTS = json.loads(compat.RESULTS.read_text())


def test_the_table_is_that_of_the_results():
    page = compat.PAGE.read_text()
    assert compat.START + compat.table(RESULTS) + compat.END in page


def test_every_family_and_release_is_there_and_nothing_failed():
    assert {FAMILIES[name].name for name in compat.FAMILIES} == {
        family.name for family in FAMILIES.values()
    }
    assert set(RESULTS) == set(compat.RELEASES)
    newest = set(RESULTS["newest"]["families"])
    assert newest == set(compat.FAMILIES)
    assert not any(result["all"].get("failed") for result in RESULTS.values())


CASES = ElementTree.fromstring(
    """<suite>
    <testcase name="test_a[qwen2_5_vl-one]"/>
    <testcase name="test_b[from-0-internvl-qwen3]"><failure/></testcase>
    <testcase name="test_c"><skipped/></testcase>
    <testcase name="test_d[glm4v]"><system-out/></testcase>
    </suite>"""
)


def test_outcomes_are_counted_by_family():
    cases = list(CASES)
    families = [compat.family(case.get("name")) for case in cases]
    assert families == ["qwen2_5_vl", "internvl", None, "glm4v"]
    assert compat.count(cases) == {"passed": 2, "failed": 1, "skipped": 1}
    assert compat.count([]) == {}


@pytest.mark.parametrize(
    ("found", "text"),
    [({"passed": 3}, "3"), ({"passed": 3, "failed": 1}, "3, 1 failed"), (None, "not in this ver")],
)
def test_a_cell_says_what_happened(found, text):
    assert compat.cell(found).startswith(text)
