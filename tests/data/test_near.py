"""Near-duplicates: the same picture is found whatever was done to it, look-alikes are not."""

import io
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from crosspatch.data import near
from crosspatch.data.near import fingerprint, near_groups, near_pairs
from crosspatch.data.opening import open_source
from crosspatch.data.prepare import prepare
from crosspatch.data.preprocess import Preprocess
from crosspatch.data.split import SPLITS, make_split
from support.hostile import saved

PREPROCESS = Preprocess((16, 16), (16, 16))


def scene(seed: int, size: tuple[int, int] = (120, 160)) -> Image.Image:
    """A picture (height, width) with the spectrum of photographs: noise of all sizes, the coarsest
    strongest."""
    rng, height, width = np.random.default_rng(seed), *size
    pixels = np.full((height, width, 3), 128.0)
    for side in (3, 6, 12, 24, 48):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
        layer = coarse.resize((width, height), Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer, np.float64) - 128) * 2 / side**0.5
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def again(image: Image.Image, quality: int) -> Image.Image:
    return Image.open(io.BytesIO(saved(image, "JPEG", quality=quality))).convert("RGB")


def cropped(image: Image.Image, share: float) -> Image.Image:
    across, down = (round(side * share / 2) for side in image.size)
    return image.crop((across, down, image.width - across, image.height - down))


CHANGES = {
    "jpeg 70": lambda image: again(image, 70),
    "jpeg 30": lambda image: again(image, 30),
    "half as large": lambda image: image.resize((image.width // 2, image.height // 2)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.2),
    "cropped": lambda image: cropped(image, 0.03),
    "cropped on every side": lambda image: cropped(image, 0.1),
    "cropped at a corner": lambda image: image.crop((0, 0, image.width - 8, image.height - 6)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "squashed": lambda image: image.resize((100, 100)),
}
OTHERS = [fingerprint(scene(10_000 + seed)) for seed in range(120)]


def stacked(prints) -> np.ndarray:
    return np.frombuffer(b"".join(prints), np.uint8).reshape(len(prints), -1)


@settings(max_examples=8)
@given(st.integers(0, 9_999))
def test_a_changed_picture_is_found_among_others_and_no_other(seed):
    image = scene(seed)
    copies = [fingerprint(image), *(fingerprint(change(image)) for change in CHANGES.values())]
    (found,) = near_groups(dict(enumerate([*OTHERS, *copies])))
    assert found == tuple(range(len(OTHERS), len(OTHERS) + len(copies)))


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_alone_is_found(change):
    prints = [fingerprint(scene(seed)) for seed in range(60)]
    changed = [fingerprint(CHANGES[change](scene(seed))) for seed in range(60)]
    expected = [[at, at + 60] for at in range(60)]
    assert near_pairs(stacked([*prints, *changed])).tolist() == expected


def noise(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, (24, 24, 3))


def plain(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 256, 3) + rng.integers(-2, 3, (24, 24, 3))


def horizon(rng: np.random.Generator) -> np.ndarray:
    rows = np.where(np.arange(24) < rng.integers(8, 16), *rng.integers(0, 256, 2))
    return rows[:, None, None] + rng.integers(-2, 3, (24, 24, 3))


@settings(max_examples=20)
@given(st.sampled_from([noise, plain, horizon]), st.integers(0, 9_999), st.integers(2, 200))
def test_random_plain_and_empty_pictures_are_never_near(kind, seed, count):
    rng = np.random.default_rng(seed)
    pictures = [np.clip(kind(rng), 0, 255).astype(np.uint8) for _ in range(count)]
    assert not len(near_pairs(stacked([fingerprint(Image.fromarray(one)) for one in pictures])))


def test_look_alikes_are_not_near():
    """Written digits, made large enough to have a fingerprint."""
    source = open_source("digits")
    pictures = (source.image(index).resize((32, 32)) for index in range(len(source)))
    assert not len(near_pairs(stacked([fingerprint(picture) for picture in pictures])))


def test_small_pictures_have_no_fingerprint_and_digits_no_near_duplicates():
    assert fingerprint(Image.new("RGB", (15, 400))) is None
    assert len(fingerprint(Image.new("RGB", (16, 400)))) == 288
    prepared = prepare(open_source("digits"), PREPROCESS)
    assert (prepared.near, prepared.remarks) == ((), ())


def test_another_colour_is_another_picture():
    red, green, blue = (np.asarray(channel) for channel in scene(3).split())
    turned = Image.fromarray(np.stack([green, red, blue], 2))
    luma = Image.fromarray(np.asarray(turned.convert("YCbCr"))[..., 0])
    pale = Image.merge("YCbCr", [luma, *scene(3).convert("YCbCr").split()[1:]]).convert("RGB")
    strong = ImageEnhance.Color(pale).enhance(4)
    prints = [*OTHERS, fingerprint(turned), fingerprint(strong)]
    assert not len(near_pairs(stacked(prints)))
    assert len(near_pairs(stacked([*prints, fingerprint(luma.convert("RGB"))])))


@settings(max_examples=3)
@given(st.integers(0, 9_999))
def test_sorting_finds_what_comparing_all_finds(seed):
    images = [scene(seed + at, (60, 80)) for at in range(10)]
    changed = [change(image) for image in images for change in CHANGES.values()]
    prints = stacked([fingerprint(image) for image in (*images, *changed)])
    one, other = np.array(list(itertools.combinations(range(len(prints)), 2))).T
    keys = [near._keys(one, other, np.full(len(one), turned), len(prints)) for turned in (0, 1)]
    every = np.sort(np.concatenate(keys))
    true = every[near._same(prints, every, near._limit(prints))]
    found = set(map(tuple, near_pairs(prints).tolist()))
    there = set(zip(*(part.tolist() for part in near._parts(true, len(prints))[:2]), strict=True))
    assert found <= there
    assert len(found) >= 0.9 * len(there)


def test_a_film_is_cut_into_sets_of_neighbours():
    wide = scene(5, (64, 1000))
    frames = [fingerprint(wide.crop((step, 0, step + 96, 64))) for step in range(300)]
    groups = near_groups(dict(enumerate([*frames, *OTHERS])))
    assert max(map(len, groups)) == near._FEW
    assert sum(map(len, groups)) > 270
    assert max(group[-1] - group[0] for group in groups) < 3 * near._FEW
    members = [item for group in groups for item in group]
    assert len(members) == len(set(members))
    assert max(members) < 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 30 scenes, and changed copies of every third in the same class; one scene
    stands in both."""
    root = tmp_path_factory.mktemp("near") / "photos"
    for number in range(60):
        place = root / ("day" if number < 30 else "night")
        place.mkdir(parents=True, exist_ok=True)
        scene(number).save(place / f"{number:02d}.png")
        if number % 3 == 0:
            for name, change in list(CHANGES.items())[: 1 + number % 4]:
                change(scene(number)).save(place / f"{number:02d} {name}.png")
    CHANGES["mirrored"](scene(1)).save(root / "night" / "01.jpg", quality=60)
    return root


@pytest.fixture(scope="module")
def prepared(folder):
    return prepare(open_source(folder), PREPROCESS, workers=2)


@given(st.integers(0, 10_000))
def test_near_duplicates_never_lie_in_two_splits(folder, prepared, seed):
    source = open_source(folder)
    split = make_split(source, prepared.kept, seed, twins=prepared.near)
    where = {int(item): name for name in SPLITS for item in getattr(split, name)}
    assert len(where) == len(source)
    for alike in prepared.near:
        assert len({where[item] for item in alike}) == 1
    assert min(len(getattr(split, name)) for name in SPLITS) > 5


def test_near_duplicates_are_found_and_said(folder, prepared):
    keys = [item.key for item in open_source(folder).items]
    number = lambda key: int(key.split("/")[1][:2])
    expected = {}
    for at, key in enumerate(keys):
        expected.setdefault(number(key), []).append(at)
    assert prepared.near == tuple(sorted(tuple(e) for e in expected.values() if len(e) > 1))
    first, second = prepared.remarks
    assert first.endswith(
        "pictures are near-duplicates of another (resized, mirrored or the like), such as "
        "day/00 jpeg 70.png and day/00.png: they stay in one split."
    )
    assert second == (
        "1 set of near-duplicates lies in different classes, such as day/01.png and night/01.jpg."
    )


def test_across_given_splits_they_stay_and_are_said(tmp_path):
    for split, number in (("train", 0), ("train", 1), ("test", 2)):
        for name in ("day", "night"):
            place = tmp_path / split / name
            place.mkdir(parents=True, exist_ok=True)
            for at in range(5):
                scene(100 * number + at + 50 * (name == "night")).save(place / f"{number}{at}.png")
    CHANGES["jpeg 30"](scene(3)).save(tmp_path / "test" / "day" / "again.png")
    prepared = prepare(open_source(tmp_path), PREPROCESS)
    assert (len(prepared.kept), prepared.skipped) == (31, [])
    assert prepared.remarks[1:] == (
        "1 set of near-duplicates lies across the given splits, such as test/day/again.png and "
        "train/day/03.png. They stay there, so the figures on val and test are a little too good: "
        "remove one of each.",
    )
    split = make_split(open_source(tmp_path), prepared.kept, twins=prepared.near)
    assert len(split.test) == 11


def test_exact_copies_are_not_counted_again(tmp_path):
    for at in range(20):
        place = tmp_path / "ab"[at % 2]
        place.mkdir(exist_ok=True)
        scene(at).save(place / f"{at}.png")
    for name in ("x", "y"):
        (tmp_path / "a" / f"{name}.png").write_bytes((tmp_path / "a" / "0.png").read_bytes())
    CHANGES["mirrored"](scene(0)).save(tmp_path / "a" / "z.png")
    source = open_source(tmp_path)
    prepared = prepare(source, PREPROCESS)
    keys = lambda sets: [[source.items[item].key for item in one] for one in sets]
    assert keys(prepared.twins) == [["a/0.png", "a/x.png", "a/y.png"]]
    assert keys(prepared.near) == [["a/0.png", "a/z.png"]]
    assert "1 picture is a near-duplicate" in prepared.remarks[1]
