"""Make an environment that has what pip would install with mpscale's wheel, and nothing else.

    python .ci/environment.py WHEEL FOLDER [EXTRA or package ...]

TensorFlow takes 2 GB and minutes to install. So what the wheel requires is not installed a second time: the packages of
this interpreter's environment are linked, those that the requirements lead to and no others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def required(lines: list[str], extras: set[str], found: dict[str, set[str]]) -> None:
    """Add the packages that the requirements lead to, each with the extras for which it has been looked up."""
    for requirement in map(Requirement, lines):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            continue
        name = canonicalize_name(requirement.name)
        if name in found and requirement.extras <= found[name]:
            continue
        found[name] = found.get(name, set()) | requirement.extras
        distribution = metadata.distribution(name)
        if not requirement.specifier.contains(distribution.version, prereleases=True):
            sys.exit(f"{requirement} is required, and {distribution.version} is installed")
        required(distribution.requires or [], found[name], found)


def main(wheel: str, folder: str, *wanted: str) -> None:
    """Make the environment, and check that its mpscale is the one of the wheel."""
    venv.create(folder, with_pip=True)
    python = Path(folder, "bin", "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check", wheel]
    subprocess.run(pip, check=True)
    ask = "import json, sysconfig; from importlib import metadata; print(sysconfig.get_path('purelib')); "
    ask += "print(json.dumps([metadata.requires('mpscale'), metadata.metadata('mpscale').get_all('Provides-Extra')]))"
    told = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.splitlines()
    site = Path(told[0])
    lines, extras = json.loads(told[1])
    packages: dict[str, set[str]] = {}
    required(lines, set(wanted) & set(extras), packages)
    required([name for name in wanted if name not in extras], set(), packages)
    for name in packages:
        for top in {file.parts[0] for file in metadata.distribution(name).files or () if file.parts[0] != ".."}:
            here, there = site / top, Path(metadata.distribution(name).locate_file(top))
            if top != "__pycache__" and not here.exists():
                here.symlink_to(there)
    where = "import mpscale; print(mpscale.__version__, mpscale.__file__)"
    said = subprocess.run([python, "-P", "-c", where], check=True, capture_output=True, text=True, cwd=folder).stdout
    if str(site) not in said:
        sys.exit(f"not the mpscale of the wheel: {said}")
    print(f"{folder}: mpscale {said.split()[0]} with {', '.join(sorted(packages))}")


if __name__ == "__main__":
    main(*sys.argv[1:])
