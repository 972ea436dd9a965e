import gzip
import hashlib
import pickle
import re
import shutil
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from utilized_rank.base.sections import StudyError
from utilized_rank.datasets import sources
from utilized_rank.datasets.images import Files, Split, array, decoded
from utilized_rank.datasets.sections import Data
from utilized_rank.datasets.sources import RAW, SMALL, read

DIGITS = Data(source="sklearn", dataset="digits", image_size=16, test=0.2)
FRUIT = Data(source="folder", dataset="data/raw/fruit", image_size=24)
FASHION = Data(source="torchvision", dataset="FashionMNIST", image_size=28)
CIFARS = [Data(source="torchvision", dataset=name, image_size=32) for name in ("CIFAR10", "CIFAR100")]


def sized(data: Data, side: int, **changes: object) -> Data:
    return data.model_copy(update={"image_size": side, **changes})


def test_digits_keep_their_pixels_at_the_original_size(tmp_path):
    from sklearn.datasets import load_digits

    found, original = read(sized(DIGITS, 8), tmp_path), load_digits()
    np.testing.assert_allclose(found.images.images[:, 0].double() * 16 / 255, original.images, atol=0.04)
    np.testing.assert_array_equal(found.images.labels, original.target)
    assert (found.test, found.classes) == (None, [str(d) for d in range(10)])


def test_another_size_shows_the_same_digits_as_bright(tmp_path):
    small, large = (read(sized(DIGITS, side), tmp_path).images.images.double() for side in (8, 32))
    assert large.shape == (1797, 1, 32, 32)
    torch.testing.assert_close(large.mean((1, 2, 3)), small.mean((1, 2, 3)), rtol=0, atol=0.5)
    blocks = torch.nn.functional.avg_pool2d(large, 4)
    assert np.corrcoef(blocks.flatten(), small.flatten())[0, 1] > 0.97


def test_an_image_folder_has_its_classes_by_name_and_every_image_in_them(image_folder, tmp_path):
    root = image_folder(plum=4, apple=9, pear=8)
    image_folder("test", plum=2, apple=1, pear=3)
    (root / "train" / "pear" / "deeper").mkdir()
    Image.new("RGB", (30, 30), "green").save(root / "train" / "pear" / "deeper" / "last.JPEG")
    (root / "train" / "pear" / "notes.txt").write_text("conference")
    (root / "train" / ".cache").mkdir()
    found = read(FRUIT, tmp_path)
    assert found.classes == ["apple", "pear", "plum"]
    for split, counts in ((found.images, [9, 9, 4]), (found.test, [1, 3, 2])):
        assert split.images.shape == (sum(counts), 3, 24, 24)
        assert split.images.dtype == torch.uint8
        assert split.labels.tolist() == np.repeat(range(3), counts).tolist()
    for name, start in (("apple", 0), ("pear", 9), ("plum", 18)):
        paths = sorted((root / "train" / name).glob("0*"))
        for i, path in enumerate(paths, start):
            assert torch.equal(found.images.images[i], decoded(path, 24, 1.0)), path


def test_images_for_the_test_lie_in_test_or_else_in_val(image_folder, tmp_path):
    image_folder(apple=3, pear=3)
    assert read(FRUIT, tmp_path).test is None
    image_folder("val", apple=1, pear=2)
    assert read(FRUIT, tmp_path).test.labels.tolist() == [0, 1, 1]
    image_folder("test", apple=2, pear=1)
    assert read(FRUIT, tmp_path).test.labels.tolist() == [0, 0, 1]


def test_small_images_are_decoded_once_and_larger_ones_stay_files(image_folder, tmp_path):
    root = image_folder(apple=5, pear=4)
    small = read(sized(FRUIT, SMALL), tmp_path).images
    large = read(sized(FRUIT, SMALL + 1, crop=0.5, workers=3), tmp_path).images
    assert isinstance(small.images, torch.Tensor)
    assert isinstance(large.images, Files)
    files = large.images
    assert (files.root, files.side, files.crop, files.workers) == (root / "train", SMALL + 1, 0.5, 3)
    assert torch.equal(array(Files(files.root, files.names, SMALL)), small.images)
    assert torch.equal(large.labels, small.labels)


def no_train(root: Path) -> None:
    shutil.rmtree(root / "train")


def one_class(root: Path) -> None:
    shutil.rmtree(root / "train" / "pear")
    shutil.rmtree(root / "test" / "pear")


def class_missing_from_test(root: Path) -> None:
    shutil.rmtree(root / "test" / "pear")


def class_of_no_training_image(root: Path) -> None:
    (root / "test" / "quince").mkdir()


def empty_class(root: Path) -> None:
    for path in (root / "train" / "pear").iterdir():
        path.unlink()
    (root / "train" / "pear" / "list.csv").touch()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_train, r"data/raw/fruit is no image folder: it needs train/, with one directory of images for each class"),
        (one_class, r"data/raw/fruit/train has 1 directories: each is a class, and two are needed"),
        (class_missing_from_test, r"fruit/test and .*fruit/train do not have the same classes: only one .* has pear"),
        (class_of_no_training_image, r"do not have the same classes: only one of them has quince"),
        (empty_class, r"data/raw/fruit/train/pear has no image \(\.jpg, \.jpeg, \.png"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("side", [SMALL, SMALL + 1])
def test_what_is_no_image_folder_is_refused_with_its_place(image_folder, tmp_path, spoil, said, side):
    image_folder(apple=2, pear=2)
    spoil(image_folder("test", apple=1, pear=1))
    with pytest.raises(StudyError, match=said) as caught:
        read(sized(FRUIT, side), tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("side", [SMALL, SMALL + 1])
def test_the_size_of_a_source_is_what_reading_it_gives(image_folder, tmp_path, side):
    image_folder(apple=5, pear=4, plum=3)
    image_folder("val", apple=2, pear=1, plum=1)
    image_folder("train", "data/raw/FashionMNIST", shirt=3, bag=4)
    for data in (sized(FRUIT, side), sized(FASHION, side), DIGITS):
        found, size = read(data, tmp_path), sources.size(data, tmp_path)
        assert size.images == len(found.images), data.dataset
        assert size.test == (len(found.test) if found.test else 0), data.dataset
        assert size.channels == found.images.images.shape[1], data.dataset
        assert size.classes == len(found.classes), data.dataset


def idx(pixels: np.ndarray | None, labels: np.ndarray) -> bytes:
    """Images, or labels where there are none, in the format of MNIST's files."""
    if pixels is None:
        return struct.pack(">II", 2049, len(labels)) + labels.astype(np.uint8).tobytes()
    return struct.pack(">IIII", 2051, *pixels.shape) + pixels.astype(np.uint8).tobytes()


def fashion(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels, as torchvision names their files."""
    draw = np.random.default_rng(seed)
    counts = {"train": 30, "t10k": 20}
    return {part: (draw.integers(0, 256, (n, 28, 28)), draw.permutation(n) % 10) for part, n in counts.items()}


def write_fashion(folder: Path, seed: int, packed: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, (pixels, labels) in fashion(seed).items():
        for kind, content in (("images-idx3", idx(pixels, labels)), ("labels-idx1", idx(None, labels))):
            name = f"{part}-{kind}-ubyte"
            (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)


def is_fashion(found: sources.Source, seed: int) -> bool:
    """Whether it is that set, to the bit."""
    for part, split in zip(fashion(seed).values(), (found.images, found.test), strict=True):
        pixels, labels = part
        same = split.images.shape == (len(pixels), 1, 28, 28) and np.array_equal(split.images[:, 0], pixels)
        if not same or split.labels.tolist() != labels.tolist():
            return False
    return True


UNREACHABLE = URLError("Temporary failure in name resolution")


@pytest.fixture
def no_network(monkeypatch) -> None:
    """Downloads raise what they raise without a network, and Debian's package is not there."""

    def download(self: object) -> None:
        raise UNREACHABLE

    for kind in ("FashionMNIST", "CIFAR10", "CIFAR100"):
        monkeypatch.setattr(getattr(torchvision.datasets, kind), "download", download)
    monkeypatch.setattr(sources, "DEBIAN", Path("/nowhere/at/all"))


def test_fashion_mnist_is_taken_from_a_folder_then_raw_files_then_debian_then_a_download(
    image_folder, tmp_path, monkeypatch
):
    """Every place has other images; each is taken away in turn."""
    raw, debian = tmp_path / RAW / "FashionMNIST" / "raw", tmp_path / "debian"

    def download(self: torchvision.datasets.FashionMNIST) -> None:
        write_fashion(Path(self.raw_folder), seed=3)

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", download)
    monkeypatch.setattr(sources, "DEBIAN", debian)
    folder = image_folder("train", "data/raw/FashionMNIST", bag=3, shirt=3)
    write_fashion(raw, seed=1)
    write_fashion(debian, seed=2, packed=True)

    assert read(FASHION, tmp_path).classes == ["bag", "shirt"]
    shutil.rmtree(folder / "train")
    assert is_fashion(read(FASHION, tmp_path), seed=1)
    shutil.rmtree(raw)
    assert is_fashion(read(FASHION, tmp_path), seed=2)
    assert sorted(path.name for path in raw.iterdir()) == sorted(path.stem for path in debian.iterdir())
    shutil.rmtree(debian)
    assert is_fashion(read(FASHION, tmp_path), seed=2)  # unpacked, it is one of torchvision's files
    shutil.rmtree(raw)
    found = read(FASHION, tmp_path)
    assert is_fashion(found, seed=3)
    assert found.classes == torchvision.datasets.FashionMNIST.classes


@pytest.mark.parametrize("data", [FASHION, *CIFARS], ids=lambda data: data.dataset)
def test_where_nothing_is_reached_one_paragraph_says_what_was_tried_and_what_to_do(tmp_path, no_network, data):
    with pytest.raises(StudyError) as caught:
        read(data, tmp_path)
    said = str(caught.value)
    assert "\n" not in said
    tried = [
        rf"^{data.dataset} cannot be reached\. Tried, in this order: ",
        rf"an image folder data/raw/{data.dataset} \(it has no train/\); ",
        r"torchvision's files in data/raw \(.*not found.*\); ",
        *([r"Debian's package dataset-fashion-mnist \(it is not installed\); "] if data is FASHION else []),
        r"a download by torchvision \(.*Temporary failure in name resolution.*\)\. ",
        r"Connect to a network once, or put torchvision's files, or an image folder with train/ and test/, under data/",
    ]
    assert re.search(".*".join(tried), said, re.IGNORECASE), said


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_half_a_file_of_torchvisions_is_told_and_the_next_place_is_tried(tmp_path, no_network, monkeypatch, name):
    raw, debian = tmp_path / RAW / "FashionMNIST" / "raw", tmp_path / "debian"
    write_fashion(raw, seed=1)
    (raw / name).write_bytes((raw / name).read_bytes()[:-7])
    with pytest.raises(StudyError, match="FashionMNIST cannot be reached"):
        read(FASHION, tmp_path)
    write_fashion(debian, seed=2, packed=True)
    monkeypatch.setattr(sources, "DEBIAN", debian)
    assert is_fashion(read(FASHION, tmp_path), seed=2)


def test_a_package_that_is_cut_short_leaves_no_file_behind(tmp_path, no_network, monkeypatch):
    debian = tmp_path / "debian"
    write_fashion(debian, seed=2, packed=True)
    last = debian / "t10k-images-idx3-ubyte.gz"
    last.write_bytes(last.read_bytes()[:-100])
    monkeypatch.setattr(sources, "DEBIAN", debian)
    with pytest.raises(StudyError, match=r"Debian's package dataset-fashion-mnist \((?!it is not installed)"):
        read(FASHION, tmp_path)
    assert not (tmp_path / RAW / "FashionMNIST" / "raw" / last.stem).exists()


def write_cifar(root: Path, dataset: str, monkeypatch) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Pickles as torchvision reads them, and their checksums in its lists; the pixels and labels of each part."""
    kind, draw = getattr(torchvision.datasets, dataset), np.random.default_rng(0)
    classes = len(NAMES[dataset])
    key = "labels" if dataset == "CIFAR10" else "fine_labels"
    folder = root / RAW / kind.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    parts = {}
    for part in ("train_list", "test_list"):
        pixels, labels, listed = [], [], []
        for name, _ in getattr(kind, part):
            pixels.append(draw.integers(0, 256, (classes, 3072), dtype=np.uint8))
            labels.append(draw.permutation(classes).tolist())
            listed.append([name, write(name, {"data": pixels[-1], key: labels[-1]})])
        monkeypatch.setattr(kind, part, listed)
        parts[part] = np.concatenate(pixels).reshape(-1, 3, 32, 32), np.concatenate(labels).tolist()
    described = {kind.meta["key"]: NAMES[dataset]}
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": write(kind.meta["filename"], described)})
    return parts


NAMES = {"CIFAR10": [f"thing {i}" for i in range(10)], "CIFAR100": [f"kind {i}" for i in range(100)]}


@pytest.mark.parametrize("data", CIFARS, ids=lambda data: data.dataset)
def test_cifar_keeps_its_pixels_labels_and_names_to_the_bit(tmp_path, monkeypatch, no_network, data):
    parts = write_cifar(tmp_path, data.dataset, monkeypatch)
    found = read(data, tmp_path)
    assert found.classes == NAMES[data.dataset]
    for split, (pixels, labels) in zip((found.images, found.test), parts.values(), strict=True):
        assert isinstance(split, Split)
        assert split.images.dtype == torch.uint8
        np.testing.assert_array_equal(split.images, pixels)
        assert split.labels.tolist() == labels
    smaller = read(sized(data, 16), tmp_path).images.images
    blocks = torch.nn.functional.avg_pool2d(torch.from_numpy(parts["train_list"][0]).double(), 2)
    assert smaller.shape == (len(blocks), 3, 16, 16)
    assert np.corrcoef(smaller.flatten(), blocks.flatten())[0, 1] > 0.9
    assert float(smaller.double().mean() - blocks.mean()) == pytest.approx(0, abs=1)


@pytest.mark.parametrize("data", CIFARS, ids=lambda data: data.dataset)
def test_cifar_whose_checksum_is_another_is_not_taken(tmp_path, monkeypatch, no_network, data):
    write_cifar(tmp_path, data.dataset, monkeypatch)
    kind = getattr(torchvision.datasets, data.dataset)
    spoilt = tmp_path / RAW / kind.base_folder / kind.test_list[0][0]
    spoilt.write_bytes(spoilt.read_bytes() + b"0")
    with pytest.raises(StudyError, match=r"torchvision's files in data/raw \(Dataset not found or corrupted"):
        read(data, tmp_path)
