"""Print what is locked as CycloneDX: one component a release, the same bytes each time.

Hashes are left to the lock: a release is many files, one a platform.
"""

import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKED = ("requirements.lock", "constraints.txt")


def component(name: str, version: str) -> dict[str, str]:
    """One release of a package."""
    purl = f"pkg:pypi/{name}@{version}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def bill() -> dict[str, object]:
    """Of the project and all that is locked for it, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = "".join((ROOT / file).read_text() for file in LOCKED)
    releases = sorted(re.findall(r"^([a-z0-9-]+)==([^\s;]+)", text, re.MULTILINE))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "application", "name": project["name"], "version": project["version"]}},
        "components": [component(*release) for release in releases],
    }


if __name__ == "__main__":
    print(json.dumps(bill(), indent=1))
