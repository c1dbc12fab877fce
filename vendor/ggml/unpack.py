"""Unpack ggml's source from the pinned release into `upstream/`.

Run by CMake at configure time, with the Python of the build environment.  Does nothing when `upstream/` already
holds the pinned release.  Source of the pin: pin.txt beside this file.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIN = HERE / "pin.txt"
UPSTREAM = HERE / "upstream"
STAMP = "PIN"  # upstream/PIN holds the pin that upstream/ was made from
INSIDE = "vendor/llama.cpp/"  # where the release keeps llama.cpp
GGML_FILES = (INSIDE + "ggml/", INSIDE + "LICENSE")


def download(destination: Path) -> Path:
    """Return the path of the pinned source release, fetched by pip (which checks its sha256) into `destination`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", "--no-build-isolation", "--require-hashes", "-r", str(PIN)]
    subprocess.run([*command, "-d", str(destination)], check=True)
    (archive,) = destination.glob("*.tar.gz")
    return archive


def extract(archive: Path, destination: Path, prefixes: tuple[str, ...]) -> None:
    """Extract the regular files below `prefixes` (relative to llama_cpp_python-X/), named relative to llama.cpp."""
    with tarfile.open(archive) as tar:
        for member in tar:
            inner = member.name.partition("/")[2]
            if not (member.isfile() and inner.startswith(prefixes)):
                continue
            target = destination / inner.removeprefix(INSIDE)
            if ".." in target.parts:
                raise ValueError(f"{archive.name}: unexpected path {member.name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            source = tar.extractfile(member)
            assert source is not None  # isfile() was true
            with source, target.open("wb") as out:
                shutil.copyfileobj(source, out)


def main() -> int:
    """Return 0 when `upstream/` holds the pinned release."""
    pin = PIN.read_text()
    stamp = UPSTREAM / STAMP
    if stamp.is_file() and stamp.read_text() == pin:
        return 0
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".unpack-") as scratch:
        try:
            archive = download(Path(scratch))
        except subprocess.CalledProcessError as error:
            print(f"pip could not fetch the release pinned in {PIN} (status {error.returncode})", file=sys.stderr)
            return 1
        tree = Path(scratch) / "upstream"
        extract(archive, tree, GGML_FILES)
        (tree / STAMP).write_text(pin)
        shutil.rmtree(UPSTREAM, ignore_errors=True)
        tree.rename(UPSTREAM)
    return 0


if __name__ == "__main__":
    sys.exit(main())
