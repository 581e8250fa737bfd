"""The client beside a bundle, run as a stranger would: a copied file, crosspatch out of reach."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crosspatch.data.preprocess import FITS, Preprocess
from crosspatch.deploy import client
from crosspatch.deploy.bundle import read_bundle
from crosspatch.deploy.engines import open_engine
from crosspatch.deploy.predictor import Predictor
from support.bundles import info, write_bundle

BARE = """
import json, sys
sys.modules.update({"crosspatch": None, "torch": None, "onnx": None})
import numpy, runpy
client = runpy.run_path("client.py")
for bundle in sys.argv[1].split(","):
    one = client["Client"](bundle)
    for name in sys.argv[2:]:
        numpy.save(f"{bundle}-{name}.npy", one.pixels(name))
        print(json.dumps([bundle, name, one.predict(name, top=3)]))
"""


def photo(seed: int, height: int, width: int) -> np.ndarray:
    """A picture with large and fine structure: (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([y * 255 // height, x * 255 // width, (x + y) % 256], axis=-1)
    return np.clip(waves + rng.integers(-30, 30, waves.shape), 0, 255).astype(np.uint8)


def write_pictures(folder: Path) -> list[str]:
    """One file for each way in which a picture file can be odd; their names."""
    upright = Image.fromarray(photo(0, 90, 130))
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        upright.save(folder / f"exif{turn}.jpg", exif=exif, quality=90)
    Image.fromarray(photo(1, 900, 700)).save(folder / "large.jpg", quality=90)
    Image.fromarray(photo(2, 20, 300)).save(folder / "wide.png")
    Image.fromarray(photo(3, 300, 21)).save(folder / "tall.webp", lossless=True)
    Image.fromarray(photo(4, 24, 32)).save(folder / "exact.bmp")
    grey = photo(5, 60, 50)[..., 0]
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(grey.astype(np.uint16) * 16).save(folder / "twelve.png")
    Image.fromarray(grey.astype(np.float32) / 510).save(folder / "float.tiff")
    Image.fromarray(grey.clip(50, 200).astype(np.float32) - 99).save(folder / "below.tiff")
    upright.convert("CMYK").save(folder / "cmyk.jpg", quality=90)
    palette = upright.quantize(40)
    palette.save(folder / "palette.gif")
    palette.save(folder / "clear.png", transparency=bytes(range(0, 240, 6)))
    alpha = Image.fromarray(photo(6, 130, 90)[..., 0].T)
    upright.putalpha(alpha)
    upright.save(folder / "alpha.png")
    Image.fromarray(photo(7, 70, 70)).save(folder / "key.png", transparency=(0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(8, 40, 70)).save(folder / "turned.tiff", exif=exif)
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list]]:
    """The folder, and [bundle, picture, top 3] as the client printed them."""
    folder = tmp_path_factory.mktemp("stranger")
    names = write_pictures(folder)
    shutil.copy(client.__file__, folder / "client.py")
    for fit in FITS:
        store = (28, 36) if fit == "crop" else (24, 32)
        write_bundle(folder / f"{fit}.onnx", info(preprocess=Preprocess((24, 32), store, fit)))
    bundles = ",".join(f"{fit}.onnx" for fit in FITS)
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", BARE, bundles, *names],
        capture_output=True, text=True, cwd=folder, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, [json.loads(line) for line in done.stdout.splitlines()]


def test_pixels_are_equal_bit_for_bit_and_probabilities_too(answers) -> None:
    folder, rows = answers
    assert len(rows) == 3 * len({picture for _, picture, _ in rows}) >= 60
    for name in (f"{fit}.onnx" for fit in FITS):
        bundle = read_bundle(folder / name)
        ours = Predictor(open_engine(bundle), bundle.info.classes, bundle.info.preprocess)
        for _, picture, top in (row for row in rows if row[0] == name):
            np.testing.assert_array_equal(
                np.load(folder / f"{name}-{picture}.npy"), ours.pixels(folder / picture), picture
            )
            (expected,) = ours.predict(folder / picture).top(3)
            assert [one for one, _ in top] == [one for one, _ in expected], picture
            assert [p for _, p in top] == pytest.approx([p for _, p in expected], abs=1e-6)


def test_the_pictures_of_this_test_differ_where_they_should(answers) -> None:
    """A client that left out a step would be found: no two kinds of oddity give equal pixels."""
    folder, _ = answers
    crop = {path.name: np.load(path).tobytes() for path in folder.glob("crop.onnx-*.npy")}
    assert len(set(crop.values())) == len(crop) - 1  # grey.png and sixteen.png are one picture
    for picture in ("large.jpg", "wide.png", "tall.webp"):
        fits = {np.load(folder / f"{fit}.onnx-{picture}.npy").tobytes() for fit in FITS}
        assert len(fits) == 3


def test_the_command_prints_one_line_per_picture(answers) -> None:
    folder, rows = answers
    done = subprocess.run(
        [sys.executable, "-I", "client.py", "pad.onnx", "grey.png", "wide.png"],
        capture_output=True, text=True, cwd=folder, timeout=60,
    )  # fmt: skip
    top = {row[1]: row[2][0] for row in rows if row[0] == "pad.onnx"}
    lines = [f"{name}: {top[name][0]} {top[name][1]:.4f}" for name in ("grey.png", "wide.png")]
    assert done.stdout.splitlines() == lines


def test_open_files_are_read_and_newer_schemas_refused(tmp_path) -> None:
    import onnx

    path = write_bundle(tmp_path / "b.onnx")
    buffer = io.BytesIO()
    Image.fromarray(photo(9, 30, 30)).save(buffer, "PNG")
    buffer.seek(0)
    assert len(client.Client(path).predict(buffer)) == 3
    model = onnx.load(path)
    text = model.metadata_props[0].value.replace('"schema": 1', '"schema": 3')
    onnx.helper.set_model_props(model, {"crosspatch": text})
    onnx.save(model, path)
    with pytest.raises(ValueError, match="schema 1 and 2"):
        client.Client(path)
