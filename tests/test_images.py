import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from utilized_rank.base.sections import StudyError
from utilized_rank.datasets.images import Files, Split, array, decoded, part, stream

COLOURS = np.array([[(200, 30, 40), (30, 180, 60)], [(40, 60, 200), (250, 220, 40)]], dtype=np.uint8)
GREYS = np.asarray(Image.fromarray(COLOURS).convert("L"))[..., None].repeat(3, 2)
WHITE = np.full(3, 255)


@pytest.fixture
def files(image_folder) -> Files:
    """24 images of every kind and size, 32 pixels on a side once decoded."""
    root = image_folder(apple=9, pear=8, plum=7) / "train"
    return Files(root, sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*")), side=32)


def quarters(pixels: np.ndarray) -> np.ndarray:
    """The colours in the middle of each quarter of an image, (2, 2, 3)."""
    at = np.array([1, 3]) * pixels.shape[0] // 4
    return pixels[np.ix_(at, at)]


def expected(name: str) -> np.ndarray:
    """The colours of the four quarters, by the file's kind."""
    if name.startswith(("grey", "deep")):
        return GREYS
    if name.startswith("palette"):  # its last colour is transparent
        return np.stack([COLOURS[0], [COLOURS[1, 0], WHITE]])
    if name.startswith("faded"):  # from nothing at the top to opaque at the bottom
        alpha = np.array([0.25, 0.75])[:, None, None]
        return alpha * COLOURS + (1 - alpha) * WHITE
    return COLOURS


KINDS = ["colour.png", "colour.jpg", "grey.png", "grey.jpg", "deep.png", "palette.png", "faded.png", "turned.jpg"]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_is_upright_colour_on_white(kinds, tmp_path, name):
    image, how = kinds(Image.fromarray(COLOURS).resize((96, 96), Image.Resampling.NEAREST))[name]
    image.save(tmp_path / name, **how)
    result = decoded(tmp_path / name, 32, crop=1.0)
    assert (result.dtype, result.shape) == (torch.uint8, (3, 32, 32))
    pixels = result.permute(1, 2, 0).numpy()
    np.testing.assert_allclose(quarters(pixels), expected(name), atol=8 if name == "faded.png" else 3)
    if name.startswith(("grey", "deep")):
        assert (pixels == pixels[..., :1]).all()


def test_sixteen_bits_of_grey_are_scaled_to_eight(tmp_path):
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(eight.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(decoded(tmp_path / "deep.png", 16, 1.0), np.broadcast_to(eight, (3, 16, 16)))


def test_floating_point_pixels_are_refused_by_name_since_their_range_is_unknown(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "a.tiff")
    with pytest.raises(StudyError, match=r"a\.tiff .*floating-point pixels"):
        decoded(tmp_path / "a.tiff", 8, 1.0)


def test_the_kinds_that_are_tested_are_all_kinds(kinds):
    made = kinds(Image.fromarray(COLOURS))
    assert [*made] == KINDS
    modes = {name: image.mode for name, (image, _) in made.items()}
    assert set(modes.values()) == {"RGB", "L", "I;16", "P", "RGBA"}


STORED = {
    1: lambda image: image,
    2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda image: image.transpose(Image.Transpose.ROTATE_180),
    4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_90),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_270),
}


@pytest.mark.parametrize("orientation", STORED)
def test_an_image_lies_as_its_exif_orientation_says(tmp_path, orientation):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    STORED[orientation](Image.fromarray(pixels)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(decoded(tmp_path / "a.png", 20, 1.0).permute(1, 2, 0), pixels)


def test_an_image_is_resized_as_it_is_said(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for name in ("bicubic", "bilinear", "lanczos"):
        expected = Image.fromarray(pixels).resize((10, 10), Image.Resampling[name.upper()])
        found = decoded(tmp_path / "a.png", 10, 1.0, name).permute(1, 2, 0)
        np.testing.assert_array_equal(found, np.asarray(expected))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(side=st.integers(8, 24), around=st.integers(0, 5), longer=st.integers(0, 9), wide=st.booleans())
def test_the_centre_of_the_shorter_side_is_kept_to_the_bit_where_it_has_the_wanted_size(
    tmp_path, side, around, longer, wide
):
    """The rest of an image of (side + 2 around) by (side + 2 around + 2 longer) pixels is cut away."""
    short, long = side + 2 * around, side + 2 * around + 2 * longer
    height, width = (short, long) if wide else (long, short)
    pixels = np.random.default_rng(side).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    top, left = (height - side) // 2, (width - side) // 2
    result = decoded(tmp_path / "a.png", side, crop=side / short).permute(1, 2, 0)
    np.testing.assert_array_equal(result, pixels[top : top + side, left : left + side])


def test_files_are_as_an_array_of_what_they_decode_to(files):
    whole = array(files)
    assert (len(files), files.shape, whole.shape, whole.dtype) == (24, (24, 3, 32, 32), files.shape, torch.uint8)
    assert whole.flatten(1).double().std(1).min() > 10  # no image is blank
    for i, name in enumerate(files.names):
        assert torch.equal(whole[i], decoded(files.root / name, 32, 1.0))
    which = torch.tensor([20, 3, 3, 11])
    assert torch.equal(files[which], whole[which])
    assert torch.equal(files[5:9], whole[5:9])
    assert torch.equal(files[7:7], whole[7:7])
    assert torch.equal(array(part(files, which)), part(whole, which))
    assert array(whole) is whole
    assert torch.equal(array(files, batch_size=5), whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_gives_the_batches_of_an_array_in_their_order_and_draws_no_number(files, workers):
    ahead = Files(files.root, files.names, files.side, workers=workers)
    batches = [torch.tensor(rows) for rows in ([5, 2, 23], [0], [7, 7, 1, 19, 3], [23, 22])]
    whole, labels = array(files), torch.arange(24)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    streamed = list(Split(ahead, labels).batches(batches))
    assert torch.equal(torch.get_rng_state(), before)
    for rows, (images, its) in zip(batches, streamed, strict=True):
        assert torch.equal(images, whole[rows])
        assert torch.equal(its, rows)
    for (images, its), (from_array, same) in zip(streamed, Split(whole, labels).batches(batches), strict=True):
        assert torch.equal(images, from_array)
        assert torch.equal(its, same)


def broken(files: Files, name: str) -> Files:
    """The same, the last file being half a JPEG, half a PNG, or text."""
    path = files.root / name
    if name == "text.png":
        path.write_text("an image, it is said")
    else:
        Image.effect_noise((200, 200), 50).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return Files(files.root, [*files.names, name], files.side, workers=files.workers)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["half.jpg", "half.png", "text.png"])
def test_a_file_that_is_no_whole_image_is_named_in_one_line(files, name, workers):
    damaged = broken(Files(files.root, files.names, files.side, workers=workers), name)
    with pytest.raises(StudyError, match=re.escape(f"{files.root / name} is not a whole image")) as caught:
        array(damaged, batch_size=10)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("replace it or take it away")
    batches = stream(damaged, torch.arange(25).split(10))
    assert torch.equal(next(batches), files[0:10])  # what comes before it is whole
