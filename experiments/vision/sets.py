"""Image sets: from packages, from one's own folders, from the hub; each image once, split by its content, of one size."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from experiments import assets
from experiments.files import write_json
from experiments.rows import CARD
from experiments.tasks.sentiment import MIN_PER_SPLIT, SPLITS, split_of

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


def read_folder(folder: Path) -> Images:
    """One's own images: `*-images-idx3-ubyte.gz` with `*-labels-idx1-ubyte.gz` (as MNIST's), or one `.npz` with x and y."""
    images, arrays = sorted(folder.glob("*images-idx3-ubyte.gz")), sorted(folder.glob("*.npz"))
    if images:
        pairs = [(_idx(path), _idx(path.with_name(_label_file(path.name)))) for path in images]
        return np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs]).astype(np.int64)
    if not arrays:
        raise FileNotFoundError(
            f"no images in {folder}: neither *-images-idx3-ubyte.gz nor an .npz with x and y"
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


def read_hub(name: str) -> Images:
    """A data set of the hub (`owner/name`, or `owner/name:subset`) with columns image and label: all its splits."""
    from datasets import concatenate_datasets, load_dataset

    source, _, subset = name.partition(":")
    try:
        rows = concatenate_datasets(list(load_dataset(source, subset or None).values()))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"cannot load images from {name}: no folder, and no hub that has it is within reach; "
            f"{', '.join(PACKAGED)} stand in for it (from packages, which need only PyPI)"
        ) from error
    missing = [key for key in ("image", "label") if key not in rows.column_names]
    if missing:
        raise ValueError(
            f"{name}: no column {' and no '.join(missing)} (found {', '.join(rows.column_names)})"
        )
    images = [np.asarray(image.convert("RGB").resize((224, 224))) for image in rows["image"]]
    return np.stack(images), np.asarray(rows["label"])


def read(name: str, where: str | None) -> Images:
    """A set by its name among `PACKAGED`, or where it lies: a folder, or a hub name."""
    if where is None:
        return PACKAGED[name]()
    return read_folder(Path(where)) if Path(where).is_dir() else read_hub(where)


def in_splits(name: str, images: Images, seed: int) -> dict[str, NDArray[np.int64]]:
    """Indices of each split: a hash of the pixels decides, so equal images lie on one side; each is kept once."""
    pixels, _ = images
    found: dict[str, dict[bytes, int]] = {split: {} for split in SPLITS}
    for index, image in enumerate(pixels):
        digest = hashlib.sha256(image.tobytes() + str(seed).encode()).digest()
        found[split_of(name, digest.hex(), seed)].setdefault(digest, index)
    for split, members in found.items():
        if len(members) < MIN_PER_SPLIT:
            raise ValueError(
                f"set {name!r} leaves {len(members)} images for {split}; {MIN_PER_SPLIT} are needed"
            )
    return {
        split: np.asarray([members[digest] for digest in sorted(members)]) for split, members in found.items()
    }


def resized(images: NDArray[np.uint8], pixels: int) -> torch.Tensor:
    """(n, H, W) or (n, H, W, 3) -> (n, 1 or 3, pixels, pixels), uint8, bilinear."""
    wide = torch.tensor(images)
    wide = wide[:, None] if wide.ndim == 3 else wide.movedim(-1, 1)
    size = (pixels, pixels)
    scaled = torch.nn.functional.interpolate(wide.float(), size, mode="bilinear", antialias=True)
    return scaled.round().clamp(0, 255).to(torch.uint8)


def prepare(
    out: Path,
    *,
    domains: Sequence[str],
    sets: Mapping[str, str],
    pixels: int,
    limits: Mapping[str, int | None],
    split_seed: int,
) -> None:
    """Stage: `out/<set>/<split>.safetensors` (images, labels), and `out/sets.json`: each set's classes in the common head.

    limits: split -> at most so many images of a set, by an order that the seed decides.
    """
    card: dict[str, Any] = {}
    first = 0
    for name in domains:
        found = read(name, sets.get(name))
        classes = int(found[1].max()) + 1
        card[name] = {"first": first, "classes": classes}
        first += classes
        for split, indices in in_splits(name, found, split_seed).items():
            chosen = indices[: limits.get(split)]
            tensors = {"images": resized(found[0][chosen], pixels), "labels": torch.tensor(found[1][chosen])}
            (out / name).mkdir(exist_ok=True)
            save_file(tensors, out / name / f"{split}.safetensors")
            card[name][split] = len(chosen)
    write_json(out / CARD, card)
