"""A decoding process gives what `Predictor.pixels` gives, and keeps to its limits."""

from __future__ import annotations

import json
import resource
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crosspatch.data.preprocess import FITS, Preprocess
from crosspatch.deploy.predictor import Predictor
from crosspatch.deploy.server.decoder import MB, READY, REPLY, REQUEST, Limits, Unfit, as_png, fit
from support.hostile import BAD, GOOD, oriented, png_claiming, saved

PREPROCESS = Preprocess((24, 32), (28, 36))
ALL = Limits(formats=("JPEG", "PNG", "WebP", "BMP", "GIF", "TIFF"))


def expected(body: bytes, preprocess: Preprocess = PREPROCESS) -> np.ndarray:
    return Predictor(None, ("a",), preprocess).pixels(body)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", GOOD)
def test_what_predict_reads_is_fitted_alike(name: str) -> None:
    body = GOOD[name]()
    np.testing.assert_array_equal(fit(body, PREPROCESS, ALL).pixels, expected(body))


@given(
    st.tuples(*[st.integers(1, 300)] * 2),
    st.tuples(*[st.integers(1, 40)] * 2),
    st.sampled_from(FITS),
    st.sampled_from(["JPEG", "PNG", "WEBP", "BMP"]),
    st.integers(0, 99),
)
def test_pictures_of_any_size_are_fitted_as_predict_does(size, wanted, way, kind, seed) -> None:
    rng = np.random.default_rng(seed)
    body = saved(Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)), kind)
    preprocess = Preprocess(wanted, wanted, way)
    found = fit(body, preprocess, Limits())
    np.testing.assert_array_equal(found.pixels, expected(body, preprocess))
    assert (found.height, found.width) == size


@pytest.mark.parametrize("turn", range(1, 9))
def test_width_and_height_are_those_of_the_upright_picture(turn: int) -> None:
    assert fit(oriented(turn), PREPROCESS, Limits())[1:3] == (32, 24)


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture_is_refused_in_words(name: str) -> None:
    make, _ = BAD[name]
    with pytest.raises(Unfit) as refused:
        fit(make(), PREPROCESS, ALL)
    assert refused.value.code in ("not_supported", "unreadable", "too_many_pixels")
    assert refused.value.message.isprintable()
    assert refused.value.hint


@pytest.mark.parametrize(
    ("width", "height"), [(60000, 60000), (12001, 1), (1, 12001), (6400, 6251), (13500, 13500)]
)
def test_too_many_pixels_are_refused_by_the_header_with_their_number(width, height) -> None:
    with pytest.raises(Unfit, match=f"{width}x{height} pixels") as refused:
        fit(png_claiming(width, height), PREPROCESS, Limits())
    assert refused.value.code == "too_many_pixels"
    assert "40,000,000" in refused.value.hint


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("animated", [False, True])
def test_the_size_of_a_webp_is_known_before_it_is_opened(lossless, animated) -> None:
    image = Image.new("RGB", (300, 200), "red")
    more = {"save_all": True, "append_images": [Image.new("RGB", (300, 200))]} if animated else {}
    body = saved(image, "WEBP", lossless=lossless, **more)
    assert fit(body, PREPROCESS, Limits())[1:3] == (300, 200)
    for limits in (Limits(pixels=59_999), Limits(side=299)):
        with pytest.raises(Unfit, match="300x200 pixels"):
            fit(body, PREPROCESS, limits)
    with pytest.raises(Unfit, match="memory") as refused:
        fit(body, PREPROCESS, Limits(memory=300 * 200 * 16 - 1))
    assert refused.value.code == "too_many_pixels"
    assert fit(body, PREPROCESS, Limits(pixels=60_000, side=300))[1:3] == (300, 200)


def test_seventeen_megapixels_of_webp_fit_into_the_memory() -> None:
    """The most that are let through, so that none fails for want of it."""
    body = saved(Image.new("RGB", (4100, 4100), "red"), "WEBP")
    larger = saved(Image.new("RGB", (4300, 4300), "red"), "WEBP")
    answers, status = talk([body, larger], Limits(seconds=30.0))
    assert [place for place, _, _ in answers] == [0, 3]
    assert status == 0


def test_formats_are_those_allowed() -> None:
    for name, kind in (("animated.gif", "GIF"), ("int32.tif", "TIFF")):
        with pytest.raises(Unfit, match=f"this is {kind}") as refused:
            fit(GOOD[name](), PREPROCESS, Limits())
        assert refused.value.code == "not_supported"
    with pytest.raises(Unfit, match="this is PNG"):
        fit(GOOD["1x1.png"](), PREPROCESS, replace(ALL, formats=("JPEG",)))


def talk(bodies: list[bytes], limits: Limits, preprocess=PREPROCESS) -> tuple[list, int]:
    """(place in OUTCOMES, first, second) of each answer from a process, and how it ended."""
    ours, theirs = socket.socketpair()
    told = {"preprocess": preprocess.to_dict(), "limits": asdict(limits)}
    with ours, theirs:
        module, place = "crosspatch.deploy.server.decoder", theirs.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(place), json.dumps(told)], pass_fds=[place]
        )
        theirs.close()
        stream, answers = ours.makefile("rb"), []
        assert stream.read(1) == READY
        for body in bodies:
            ours.sendall(REQUEST.pack(len(body), 1) + body)
            head = stream.read(REPLY.size)
            if len(head) < REPLY.size:
                break
            place, *_, first, second = REPLY.unpack(head)
            answers.append((place, stream.read(first), stream.read(second)))
        stream.close()
        ours.close()
        return answers, process.wait(20)


def test_a_process_answers_one_after_the_other_and_ends_with_its_socket() -> None:
    good, bad = GOOD["progressive.jpg"](), BAD["cut50.jpg"][0]()
    answers, status = talk([good, bad, good], Limits())
    assert [place for place, _, _ in answers] == [0, 2, 0]
    assert answers[0] == answers[2] == (0, expected(good).tobytes(), as_png(expected(good)))
    assert answers[1][1].decode() == "the picture cannot be read: the file is cut short"
    assert status == 0


def test_a_picture_beyond_the_memory_is_refused_and_the_next_one_is_right() -> None:
    giant, good = saved(Image.new("RGB", (4000, 4000)), "PNG"), GOOD["1x1.png"]()
    answers, status = talk([giant, good], Limits(memory=32 * MB))
    assert [place for place, _, _ in answers] == [2, 0]
    assert "memory" in answers[0][1].decode()
    assert answers[1][1] == expected(good).tobytes()
    assert status == 0
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY  # ours is as it was


def test_a_picture_that_takes_too_long_ends_the_process() -> None:
    giant = saved(Image.new("RGB", (6000, 6000)), "PNG")
    answers, status = talk([giant], Limits(seconds=0.05))
    assert answers == []
    assert status == -signal.SIGPROF


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_forty_megapixels_of_every_kind_are_read_or_refused_within_the_memory(mode: str) -> None:
    """Those with transparency take more than there is; the process lives either way."""
    size, kind = (7300, 5470), "JPEG" if mode == "CMYK" else "PNG"
    body = saved(Image.new(mode, size), kind)
    answers, status = talk([body, GOOD["1x1.png"]()], Limits(seconds=20.0))
    assert [place for place, _, _ in answers] == [2 if mode in ("LA", "RGBA") else 0, 0]
    assert status == 0
