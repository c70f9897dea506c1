"""Ranges and pins: what pyproject.toml, requirements.txt and constraints.txt say of versions."""

import re
from importlib.metadata import version

import pytest
from course import ROOT, project
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from try_versions import oldest, ranges


def requirements(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [Requirement(line) for line in lines if line]


def declared():
    """What pyproject.toml names, for the library and for every extra."""
    found = [*project()["dependencies"]]
    for extra in project()["optional-dependencies"].values():
        found += extra
    return {Requirement(need) for need in found}


def test_requirements_are_those_of_the_package_and_its_extras():
    assert {str(r) for r in requirements("requirements.txt")} == {str(r) for r in declared()}


def test_every_pin_lies_in_its_range():
    pins = {}
    for pin in requirements("constraints.txt"):
        pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    for need in requirements("requirements.txt"):
        for pin in pins.get(canonicalize_name(need.name), []):
            (exact,) = pin.specifier
            assert need.specifier.contains(exact.version), f"{pin} is not in {need}"


def test_the_oldest_versions_are_the_floors():
    floors = [Requirement(oldest(need)) for need in ranges()]
    assert {"torch", "numpy", "matplotlib", "transformers"} < {floor.name for floor in floors}
    for floor, need in zip(floors, map(Requirement, ranges()), strict=True):
        (exact,) = floor.specifier
        assert need.specifier.contains(exact.version)
        assert min(Version(part.version) for part in need.specifier) == Version(exact.version)
        assert need.specifier.contains(version(need.name).split("+")[0]), "not what runs here"


@pytest.mark.parametrize("given", ["torch", "torch<3", "torch==2.6", "torch>=2.6"])
def test_a_requirement_without_two_ends_is_refused(given):
    with pytest.raises(ValueError, match=re.escape(f"must be NAME>=LOWEST,<NEXT, got {given}")):
        oldest(given)
