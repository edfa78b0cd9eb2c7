"""Image sets: from packages, one's own folders and tables, the hub; each image once (by its content), of one size."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments import assets
from experiments.files import CARD, write_json
from experiments.tasks.classes import class_name
from gradmatch.measure.tables import Table, kind_of

if TYPE_CHECKING:
    from torch import Tensor

Images = tuple[NDArray[np.uint8], NDArray[np.int64]]  # (n, H, W) or (n, H, W, 3), and (n,) classes from 0 on


def read_animals() -> Images:
    """10,000 silhouettes of ten animals, 28 x 28."""
    folder = assets.folder("animals")
    images, labels = (
        ArraysOnly(io.BytesIO(gzip.decompress((folder / f"animal_{kind}_version_3.gz").read_bytes()))).load()
        for kind in ("data", "label")
    )
    return images, labels.reshape(-1)


class ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse whatever is not needed to make an array."""
        if (module.split(".")[0], name) not in {
            ("numpy", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }:
            raise ValueError(f"a pickle of images asks for {module}.{name}: refused")
        return super().find_class(module, name)


def read_mnist() -> Images:
    """5,000 digits of MNIST, 28 x 28."""
    text = gzip.decompress((assets.folder("mnist") / "mnist_5k.csv.gz").read_bytes())
    rows = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.int64)
    return rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8), rows[:, -1]


def read_clean() -> Images:
    """The even half of the packaged MNIST, as it is."""
    images, labels = read_mnist()
    return images[::2], labels[::2]


def read_photos() -> Images:
    """The odd half of the packaged MNIST on grey photographs: |patch - digit|, as MNIST-M (Ganin et al. 2016) was made."""
    from sklearn.datasets import load_sample_images

    images, labels = (part[1::2] for part in read_mnist())
    photos = [photo.mean(-1) for photo in load_sample_images().images]
    generator = np.random.default_rng(0)
    made = []
    for image in images:
        photo = photos[generator.integers(len(photos))]
        top, left = (generator.integers(0, side - 28) for side in photo.shape)
        made.append(np.abs(photo[top : top + 28, left : left + 28] - image))
    return np.stack(made).astype(np.uint8), labels


def read_digits() -> Images:
    """scikit-learn's 1,797 handwritten digits, 8 x 8."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return np.round(found.images * (255 / 16)).astype(np.uint8), found.target.astype(np.int64)


PACKAGED = {"animals": read_animals, "mnist": read_clean, "photos": read_photos, "digits": read_digits}


def read_arrays(folder: Path) -> Images:
    """One's own images: `*-images-idx3-ubyte.gz` with `*-labels-idx1-ubyte.gz` (as MNIST's), or one `.npz` with x and y."""
    images, arrays = sorted(folder.glob("*images-idx3-ubyte.gz")), sorted(folder.glob("*.npz"))
    if images:
        pairs = [(_idx(path), _idx(path.with_name(_label_file(path.name)))) for path in images]
        return np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs]).astype(np.int64)
    if not arrays:
        raise FileNotFoundError(
            f"no images in {folder}: no *-images-idx3-ubyte.gz, no .npz with x and y, no folder a class"
        )
    with np.load(arrays[0]) as saved:
        missing = [key for key in ("x", "y") if key not in saved]
        if missing:
            raise ValueError(f"{arrays[0]}: no {' and no '.join(missing)} (found {', '.join(saved)})")
        return saved["x"], saved["y"].astype(np.int64)


def _label_file(images: str) -> str:
    return images.replace("images-idx3", "labels-idx1")


def _idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of bytes: two zeros, the type, the number of axes, each axis's length, then the values."""
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">u4", content[3], 4).astype(int)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


class Found(NamedTuple):
    """A set: images and labels as in `Images`, names of the classes, the split that each was given in."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    names: list[str]
    split: list[str]


def read(name: str, spec: Mapping[str, Any] | None, pixels: int) -> Found:
    """A set by its name among `PACKAGED`, or where `spec` (an `ImageSet`) says that it lies."""
    if spec is None or (Path(spec["path"]).is_dir() and _holds_arrays(Path(spec["path"]))):
        images, labels = PACKAGED[name]() if spec is None else read_arrays(Path(spec["path"]))
        names = [str(number) for number in range(int(labels.max()) + 1)]
        return Found(images, labels, names, ["train"] * len(labels))
    given = [(split, spec[split]) for split in ("train", "validation", "test") if spec.get(split)]
    pictures: list[NDArray[np.uint8]] = []
    labels_: list[str] = []
    splits: list[str] = []
    order: list[str] = []
    for split, part in given:
        table = _table(spec["path"], part)
        missing = [column for column in (spec["image"], spec["label"]) if column not in table.columns]
        if missing:
            raise ValueError(
                f"{table.name}: no column {' and no '.join(missing)} (found {', '.join(table.columns)}): name them by "
                f"data.sets.{name}.image and data.sets.{name}.label"
            )
        order = order or [class_name(own) for own in table.classes.get(spec["label"], ())]
        for number, row in enumerate(table):
            pictures.append(_picture(row[spec["image"]], pixels, f"{table.name}, row {number + 1}"))
            label = row[spec["label"]]
            if label is None or label == "":
                raise ValueError(f"{table.name}, row {number + 1}: no label")
            labels_.append(order[label] if order and isinstance(label, int) else class_name(label))
            splits.append(split)
    names = order or sorted(set(labels_), key=lambda own: (len(own), own) if own.isdigit() else (0, own))
    numbers = {own: number for number, own in enumerate(names)}
    return Found(np.stack(pictures), np.asarray([numbers[own] for own in labels_]), names, splits)


def once(
    name: str, spec: Mapping[str, Any] | None, pixels: int, seed: int, notes: list[str]
) -> tuple[Found, list[str]]:
    """A set whose images each stand there once, and a hash of each; what was left out is added to `notes`.

    Of equal images the first is kept, of a given test split before others.

    Raises:
        ValueError: all images are of one class.
    """
    found = read(name, spec, pixels)
    if len(set(found.labels.tolist())) < 2:
        raise ValueError(f"{name}: all its images are of one class, {found.names[int(found.labels[0])]!r}")
    marks = digests(found.images, seed)
    order = sorted(range(len(marks)), key=lambda row: found.split[row] == "train")
    kept = sorted({marks[row]: row for row in reversed(order)}.values())
    if len(kept) < len(marks):
        notes.append(f"{name}: {len(marks) - len(kept)} images that stand twice are left out")
    split = [found.split[row] for row in kept]
    own = Found(found.images[kept], found.labels[kept], found.names, split)
    return own, [marks[row] for row in kept]


def _holds_arrays(folder: Path) -> bool:
    return any(folder.glob("*images-idx3-ubyte.gz")) or any(folder.glob("*.npz"))


def _table(path: str, split: str) -> Table:
    """A split of a folder (a folder a class, or tables), of a table, or of a hub set; or a table of its own."""
    try:
        return Table(split) if kind_of(split) else Table(path, split=split)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"cannot load images from {path}: {error}; {', '.join(PACKAGED)} stand in for it (from packages, which need only PyPI)"
        ) from error


def _picture(value: Any, pixels: int, where: str) -> NDArray[np.uint8]:
    """(pixels, pixels, 3) of a picture, or of the bytes of its file."""
    from PIL import Image

    try:
        if isinstance(value, Mapping):
            value = value.get("bytes")
        picture = Image.open(io.BytesIO(value)) if isinstance(value, bytes) else value
        return np.asarray(picture.convert("RGB").resize((pixels, pixels), Image.Resampling.BILINEAR))
    except (AttributeError, TypeError, OSError) as error:
        raise ValueError(f"{where}: no picture but {value!r:.60}") from error


def digests(images: NDArray[np.uint8], seed: int) -> list[str]:
    """A hash of each image's pixels: equal images have one."""
    return [hashlib.sha256(image.tobytes() + str(seed).encode()).hexdigest() for image in images]


def resized(images: NDArray[np.uint8], pixels: int) -> Tensor:
    """(n, H, W) or (n, H, W, 3) -> (n, 1 or 3, pixels, pixels), uint8, bilinear."""
    import torch  # not where images are only counted

    wide = torch.tensor(images)
    wide = wide[:, None] if wide.ndim == 3 else wide.movedim(-1, 1)
    size = (pixels, pixels)
    scaled = torch.nn.functional.interpolate(wide.float(), size, mode="bilinear", antialias=True)
    return scaled.round().clamp(0, 255).to(torch.uint8)


def prepare(
    out: Path, *, domains: Sequence[str], sets: Mapping[str, Mapping[str, Any]], pixels: int, split_seed: int
) -> None:
    """Stage: `out/<set>/images.safetensors` (images, labels) with their groups, and `out/data.json`.

    Each set has classes of its own in the common head.
    """
    import torch
    from safetensors.torch import save_file

    card: dict[str, Any] = {}
    first = 0
    notes: list[str] = []
    for name in domains:
        found, groups = once(name, sets.get(name), pixels, split_seed, notes)
        (out / name).mkdir()
        content = {"images": resized(found.images, pixels), "labels": torch.tensor(found.labels)}
        save_file(content, out / name / "images.safetensors")
        (out / name / "groups.txt").write_text("\n".join(groups), encoding="utf-8")
        (out / name / "splits.txt").write_text("\n".join(found.split), encoding="utf-8")
        card[name] = {"first": first, "classes": found.names, "packaged": False}
        first += len(found.names)
    write_json(out / CARD, {"domains": card, "notes": notes})
