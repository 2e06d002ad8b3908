"""requirements.lock agrees with pyproject.toml for every Python that is supported, and names no host."""

import itertools
import re
import tomllib
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = (ROOT / "requirements.lock").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED = re.compile(r"^([a-z0-9.-]+)==(\S+)(?: ; (.*?))? \\$", re.MULTILINE)


def environment(python: str, platform: str) -> dict[str, str]:
    return {"python_full_version": f"{python}.0", "python_version": python, "sys_platform": platform}


def locked(where: dict[str, str]) -> dict[str, str]:
    """What the lock installs there."""
    return {
        name: version
        for name, version, marker in PINNED.findall(LOCK)
        if not marker or Marker(marker).evaluate(where)
    }


def test_all_that_the_project_requires_is_locked_in_a_version_that_it_allows() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    written = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"], "editables"]
    for extra in extras.values():
        written += [requirement for requirement in extra if not requirement.startswith("headrace[")]
    for python, platform in itertools.product(("3.11", "3.12", "3.13"), ("linux", "darwin")):
        where = environment(python, platform)
        pinned = locked(where)
        wanting = [
            str(requirement)
            for requirement in map(Requirement, written)
            if (requirement.marker is None or requirement.marker.evaluate(where))
            and not requirement.specifier.contains(pinned.get(canonicalize_name(requirement.name), "0"))
        ]
        assert wanting == [], "run `make lock`"


def test_every_package_has_its_hashes_and_comes_from_the_registry_in_use() -> None:
    blocks = re.split(r"\n(?=\S)", LOCK)
    assert [block.splitlines()[0] for block in blocks if "--hash=sha256:" not in block] == []
    assert len(blocks) == len(PINNED.findall(LOCK)) > 90
    assert "://" not in LOCK
    assert set(re.findall(r"^ *(--[a-z-]+)", LOCK, re.MULTILINE)) == {"--hash"}
