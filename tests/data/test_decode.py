"""One picture at a time: what is read, what is refused, and with which words."""

import io
import pickle
import subprocess
import sys
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from crosspatch.data.decode import UnreadableImage, decode, picture_size, sniff
from support import hostile


@contextmanager
def quiet():
    """Pillow remarks on broken metadata; here they are none of the test's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", hostile.GOOD)
def test_good_pictures_are_rgb(name):
    data = hostile.GOOD[name]()
    image = decode(data)
    assert image.mode == "RGB"
    assert picture_size(data) == (image.height, image.width)
    assert not image.info
    np.asarray(image)


@pytest.mark.parametrize("name", hostile.BAD)
def test_bad_files_are_refused_with_the_reason(name):
    make, reason = hostile.BAD[name]
    with pytest.raises(UnreadableImage) as caught:
        decode(make(), name=name)
    assert reason in caught.value.reason
    assert name in caught.value.got
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(orientation, kind):
    image = decode(hostile.oriented(orientation, kind))
    difference = np.asarray(image).astype(int) - np.asarray(hostile.corners())
    assert image.size == (32, 24)
    assert np.abs(difference).max() < 30


@given(st.binary(max_size=80), st.booleans(), st.integers(0, 300))
def test_orientation_agrees_with_pillow_or_is_ignored(junk, prefixed, orientation):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = orientation, junk.hex()
    block = exif.tobytes()
    plain = hostile.saved(hostile.corners(), "PNG", exif=block if prefixed else block[6:])
    with quiet():
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(plain)))
    np.testing.assert_array_equal(np.asarray(decode(plain)), np.asarray(expected))


@given(st.binary(max_size=200))
def test_a_broken_exif_block_never_costs_the_picture(junk):
    image = decode(hostile.saved(hostile.corners(), "PNG", exif=b"Exif\0\0II*\0" + junk))
    assert sorted(image.size) == [24, 32]


@given(
    st.binary(max_size=400), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0"])
)
def test_no_bytes_do_more_than_be_refused(junk, start):
    with quiet(), pytest.raises(UnreadableImage):
        decode(start + junk)


@pytest.mark.parametrize(
    ("mode", "kind"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I", "TIFF"), ("F", "TIFF")]
)
def test_deep_grey_is_scaled_not_clipped(mode, kind):
    grey = np.asarray(decode(hostile.saved(hostile.grey_ramp(mode), kind)))[0, :, 0]
    assert len(np.unique(grey)) == 64
    np.testing.assert_allclose(grey, np.linspace(0, 255, 64), atol=0.51)


def test_a_12_bit_picture_in_16_bits_is_not_black():
    levels = np.tile(np.arange(0, 4096, 64, dtype=np.uint16), (4, 1))
    grey = np.asarray(decode(hostile.saved(Image.fromarray(levels), "PNG")))
    assert grey.max() == round(4032 * 255 / 4095)


def test_negative_and_undefined_floats_are_stretched():
    values = np.array([[-3.0, 1.0, np.nan, np.inf]], np.float32)
    grey = np.asarray(decode(hostile.saved(Image.fromarray(values), "TIFF")))[0, :, 0]
    np.testing.assert_array_equal(grey, [0, 255, 191, 191])


def test_a_flat_deep_picture_is_read():
    assert decode(hostile.saved(Image.new("F", (3, 3), -7.0), "TIFF")).getpixel((1, 1)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_over_white(mode):
    image = Image.new("RGBA", (4, 1), (0, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 0, 255))
    corner, clear = (
        decode(hostile.saved(image.convert(mode), "PNG")).getpixel((x, 0)) for x in (0, 3)
    )
    assert corner == (0, 0, 0)
    assert clear == (255, 255, 255)


def test_half_transparent_is_half_white():
    image = Image.new("RGBA", (1, 1), (0, 0, 200, 128))
    r, g, b = decode(hostile.saved(image, "PNG")).getpixel((0, 0))
    assert abs(r - 127) <= 1
    assert abs(g - 127) <= 1
    assert abs(b - 227) <= 1


def test_cmyk_keeps_its_colours():
    red = decode(hostile.saved(Image.new("RGB", (8, 8), "red").convert("CMYK"), "JPEG"))
    assert red.getpixel((4, 4))[0] > 230
    assert max(red.getpixel((4, 4))[1:]) < 30


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "MPO"])
def test_the_first_of_several_frames_is_taken(kind):
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    image = decode(hostile.saved(first, kind, save_all=True, append_images=[second]))
    assert image.getpixel((4, 4))[0] > 200


@given(width=st.integers(1, 700), height=st.integers(1, 700), side=st.integers(1, 64))
def test_the_size_hint_keeps_twice_the_side(width, height, side):
    data = hostile.saved(Image.new("RGB", (width, height)), "JPEG")
    image = decode(data, side=side)
    assert min(image.size) >= min(2 * side, width, height)
    assert abs(image.width / width - image.height / height) <= 1 / min(width, height)


def test_a_large_jpeg_is_decoded_smaller():
    assert decode(hostile.saved(Image.new("RGB", (1600, 1200)), "JPEG"), side=100).size == (
        400,
        300,
    )


def test_the_pixel_limit_is_exact():
    data = hostile.saved(Image.new("1", (100, 50)), "PNG")
    assert decode(data, max_pixels=5000).size == (100, 50)
    with pytest.raises(UnreadableImage, match="100x50"):
        decode(data, max_pixels=4999)


def test_sources_of_every_kind(tmp_path):
    data = hostile.saved(hostile.corners(), "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with open(path, "rb") as file:
        pictures = [decode(source) for source in (path, str(path), data, io.BytesIO(data), file)]
    assert all(np.array_equal(pictures[0], other) for other in pictures[1:])


def test_what_is_no_file_is_named(tmp_path):
    for path, reason in (
        (tmp_path, "regular"),
        (tmp_path / "no", "no such file"),
        ("a\0b", "name"),
    ):
        with pytest.raises(UnreadableImage) as caught:
            decode(path)
        assert reason in caught.value.reason


def test_the_error_survives_a_process_boundary():
    error = pickle.loads(pickle.dumps(UnreadableImage("x.jpg", "cut")))
    assert (error.name, error.reason, error.exit_code) == ("x.jpg", "cut", 3)


def test_sniffing_goes_by_content():
    assert sniff(hostile.GOOD["png_named.jpg"]()[:64]) == "PNG"
    assert sniff(b"\x00\x01\x02\x03") is None


def test_decoding_never_imports_torch():
    code = (
        "import sys, crosspatch.data.decode, crosspatch.data.preprocess, crosspatch.data.sources\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", hostile.GOOD)
def test_large_pictures_are_converted_in_strips_to_the_same_pixels(name: str, monkeypatch) -> None:
    whole = np.asarray(decode(hostile.GOOD[name]()))
    monkeypatch.setattr("crosspatch.data.decode._STRIP", 4 * 50)
    np.testing.assert_array_equal(np.asarray(decode(hostile.GOOD[name]())), whole)
