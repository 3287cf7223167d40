"""The Debian packages that the corpora are made of: pinned, verified, unpacked without installing anything."""

import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """One .deb of Debian 12."""

    name: str
    version: str
    sha256: str

    @property
    def file(self) -> str:
        return f"{self.name}_{self.version}_all.deb"


LINUX = Package("linux-doc-6.1", "6.1.176-1", "0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f")
PYTHON = Package("python3.11-doc", "3.11.2-6+deb12u8", "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b")
DICTIONARY = Package("dict-gcide", "0.48.5+nmu2", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f")
ANARCHISM = Package("anarchism", "15.3-3", "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948")
HANDBOOK = Package("debian-handbook", "11.20220922", "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa")
SNOWBALL = Package("snowball-data", "0+20210120-1", "19a28c928c0573fbd6f42798252a7d8ac63f3a83299c87cae40b9b9fc897ad6d")


class MissingPackageError(FileNotFoundError):
    """A package is not there, or is not the pinned one."""


def check(packages: Iterable[Package], folder: Path) -> None:
    """Every package lies in `folder` and is the pinned one.

    Raises:
        MissingPackageError: some do not, with the command that fetches them.
    """
    packages = list(packages)
    missing = [package for package in packages if not (folder / package.file).exists()]
    if missing:
        names = " ".join(f"{package.name}={package.version}" for package in missing)
        raise MissingPackageError(
            f"{', '.join(package.file for package in missing)} not in {folder}: "
            f"mkdir -p {folder} && cd {folder} && apt-get download {names}"
            "    (on Debian 12; versions that its mirrors no longer have are on snapshot.debian.org)"
        )
    for package in packages:
        if (found := hashlib.sha256((folder / package.file).read_bytes()).hexdigest()) != package.sha256:
            raise MissingPackageError(f"{package.file} in {folder} has sha256 {found}; expected {package.sha256}")


def unpacked(package: Package, packages: Path, target: Path) -> Path:
    """The files of a package, laid out as it would install them, below `target`."""
    root = target / package.name
    if not root.exists():
        subprocess.run(["dpkg-deb", "-x", packages / package.file, root], check=True)
    return root
