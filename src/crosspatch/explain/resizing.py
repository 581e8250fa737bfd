# SPDX-License-Identifier: Apache-2.0
"""Whether pictures reach a network as it was trained to see them: its size, its normalisation.

"Revisiting pre-trained remote sensing model benchmarks: resizing and normalization matters", Corley
et al., arXiv 2305.13456: of frozen features it matters more than the weights that small pictures
are brought to the size of the pre-training, and normalised as they were then. `expectations`
compares settings; `measure` counts: the 5 nearest neighbours and a linear layer, on the features at
either size, normalised rightly and not at all, beside those of the same network with random weights
(resizing helps them too: table 2) and of image statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from crosspatch.data.audit import Audit
from crosspatch.data.decode import UnreadableImage
from crosspatch.data.findings import Finding
from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.backbone import Backbone, of_run
from crosspatch.deploy.embedding import of_model
from crosspatch.deploy.predictor import Picture, Predictor
from crosspatch.deploy.torch_engine import TorchEngine
from crosspatch.errors import UsageError
from crosspatch.metrics.interval import paired, wilson
from crosspatch.metrics.neighbours import nearest
from crosspatch.metrics.ridge import fit_layers, one_hot
from crosspatch.training.image_features import image_statistics
from crosspatch.training.package import Trained
from crosspatch.training.sizes import at_size

KIND, NEIGHBOURS, PENALTY = "resizing", 5, 0.01
MOST = 1000  # pictures that `findings` takes
HALF = 0.5  # of the model's size: smaller pictures are named
APART = 1.0  # deviations, by which the data's mean may lie off the model's
SPREAD = 2.0  # times, by which their deviations may differ
BYTE = 255
RAW, DECODED = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # mean and std of no normalisation
FLOOR = 1e-6
MODEL, RANDOM, STATISTICS = "the model", "random weights", "image statistics"

Progress = Callable[[int, int], None]


class Seen(NamedTuple):
    """What is known of the pictures. side: median shorter side in pixels; channels: of most;
    largest: greatest value in any; mean, deviation: (C,) of each channel, in parts of 255."""

    side: int
    channels: int
    largest: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


class Score(NamedTuple):
    """A way to make features. features: whose; size: (height, width); normalised: as the model
    wants it; neighbours, linear: share of the held-out pictures named right (M,) bool each."""

    features: str
    size: tuple[int, int]
    normalised: bool
    neighbours: np.ndarray
    linear: np.ndarray


def look(pictures: Sequence[np.ndarray]) -> Seen:
    """What there is to know of decoded pictures, (H, W, C) or (H, W) of any number type.

    Raises ValueError without a picture.
    """
    if not len(pictures):
        raise ValueError("no picture")
    wide = [one[..., None] if one.ndim == 2 else one for one in pictures]
    counts = np.bincount([one.shape[2] for one in wide])
    channels = int(counts.argmax())
    alike = [one for one in wide if one.shape[2] == channels]
    means = np.stack([one.mean(axis=(0, 1), dtype=np.float64) for one in alike]) / BYTE
    squares = [np.square(one.astype(np.float64)).mean(axis=(0, 1)) for one in alike]
    middle = means.mean(axis=0)
    spread = np.sqrt(np.maximum(np.mean(squares, axis=0) / BYTE**2 - middle**2, 0))
    side = int(np.median([min(one.shape[:2]) for one in wide]))
    largest = max(float(one.max(initial=0)) for one in wide)
    return Seen(side, channels, largest, tuple(middle.tolist()), tuple(spread.tolist()))


def expectations(preprocess: Preprocess, seen: Seen) -> list[Finding]:
    """Where the pictures are not what a model was made for: their size, their channels, the range
    of their values, their mean and deviation. One "good" finding where all agrees."""
    found = [*_sizes(preprocess, seen), *_channels(preprocess, seen), *_range(seen)]
    if not found and seen.channels == len(preprocess.mean):
        found = list(_normalisation(preprocess, seen))
    if found:
        return found
    text = f"Size, channels, range and normalisation fit the model's {_size(preprocess.size)}."
    return [Finding("good", KIND, "The pictures are what the model expects", text, "", [])]


def _sizes(preprocess: Preprocess, seen: Seen) -> Iterator[Finding]:
    side = min(preprocess.size)
    if seen.side < HALF * side:
        text = (
            f"Half of the pictures are smaller than {seen.side} pixels, the model sees "
            f"{_size(preprocess.size)}: each is enlarged {side / seen.side:.1f} times. That is "
            "right for these weights, and helps, but shows nothing new: a network for small "
            "pictures is as good and much faster."
        )
        command = f"crosspatch train DATA --size {max(32, seen.side)}"
        yield Finding("warn", KIND, "Pictures are far smaller than the input", text, command, [])


def _channels(preprocess: Preprocess, seen: Seen) -> Iterator[Finding]:
    wanted = len(preprocess.mean)
    if seen.channels != wanted:
        text = (
            f"Most pictures have {seen.channels} channel{'s' * (seen.channels != 1)}, the model "
            f"takes {wanted}. Grey ones are repeated; of more than {wanted} some are dropped."
        )
        level = "warn" if seen.channels == 1 else "bad"
        yield Finding(level, KIND, "The number of channels differs", text, "", [])


def _range(seen: Seen) -> Iterator[Finding]:
    if seen.largest > BYTE:
        bits = max(9, int(np.ceil(np.log2(seen.largest + 1))))
        text = (
            f"Values reach {seen.largest:,.0f}, as of {bits} bits; models take 8. Cut off, not "
            "scaled, they would all be white."
        )
        title = "Values are larger than 8 bits hold"
        yield Finding("bad", KIND, title, text, "convert to 8 bits, by one rule for all", [])
    elif 0 < seen.largest <= 1:
        text = "No value is above 1: divided by 255 once more, every picture is black."
        yield Finding("bad", KIND, "Values are scaled already", text, "keep values 0 to 255", [])


def _normalisation(preprocess: Preprocess, seen: Seen) -> Iterator[Finding]:
    mean, std = np.array(preprocess.mean), np.array(preprocess.std)
    off = np.abs(np.array(seen.mean) - mean) / std
    ratio = np.maximum(np.array(seen.deviation), FLOOR) / std
    if off.max() > APART or ratio.max() > SPREAD or ratio.min() < 1 / SPREAD:
        text = (
            f"After the model's normalisation the pictures have means up to {off.max():.1f} from 0 "
            f"and deviations from {ratio.min():.2f} to {ratio.max():.2f}, where 1 is expected. "
            "Weights that were trained elsewhere should be fine-tuned, not probed."
        )
        command = "crosspatch train DATA --recipe finetune BEGIN"
        title = "Brightness or contrast is not what the model expects"
        yield Finding("warn", KIND, title, text, command, [])


def measure(
    trained: Trained,
    random: Trained,
    pictures: Sequence[Picture],
    labels: Sequence[int] | np.ndarray,
    *,
    side: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Score]:
    """Scores of the ways to make features, on the half of N pictures that is not fitted to.

    random: the control (`training.package.load_untrained`); labels: (N,) 0..K-1; side: the
    pictures' own, in pixels, at which the network is tried too where it takes that size. progress:
    called with (pictures done, all). Raises UsageError where fewer than four pictures can be read
    and for a network whose features are no vectors.
    """
    ways = list(_ways(trained, random, side))
    good, pixels = _readable(trained, pictures)
    if len(good) < 4:
        raise UsageError(f"{len(good)} pictures that can be read", "four and more", "give more")
    known = np.unique(np.asarray(labels)[good], return_inverse=True)[1]
    order = np.random.default_rng(seed).permutation(len(good))
    halves = np.sort(order[: len(good) // 2]), np.sort(order[len(good) // 2 :])
    chosen, every, scores = [pictures[at] for at in good], len(good) * len(ways), []
    statistics = image_statistics(torch.from_numpy(pixels).permute(0, 3, 1, 2) / BYTE).numpy()
    scores.append(_scored(STATISTICS, trained.preprocess.size, True, statistics, known,
                          halves))  # fmt: skip
    for number, (whose, model, right) in enumerate(ways):
        tell = _from(progress, number * len(good), every)
        features = of_model(model, whose).embed(chosen, progress=tell)
        size = model.preprocess.size
        scores.append(_scored(whose, size, right, features, known, halves))
    return scores


def _ways(trained: Trained, random: Trained, side: int) -> Iterator[tuple[str, Trained, bool]]:
    """(whose features, the model, whether normalised rightly), each at both sizes."""
    for whose, model in ((MODEL, trained), (RANDOM, random)):
        for size in dict.fromkeys([trained.preprocess.size, (side, side)]):
            try:
                sized = model if size == model.preprocess.size else at_size(model, size)
                of_model(sized, whose)
            except (UsageError, ValueError, RuntimeError, AssertionError):
                if size == trained.preprocess.size:
                    raise
                continue  # the network takes its own size alone
            yield whose, sized, True
            plain = replace(sized.preprocess, mean=RAW, std=DECODED)
            if whose == MODEL:
                yield whose, sized._replace(preprocess=plain), False


def _readable(trained: Trained, pictures: Sequence[Picture]) -> tuple[list[int], np.ndarray]:
    """(places of the pictures that can be read, uint8 (M, H, W, 3) as the model sees them)."""
    reader = Predictor(TorchEngine(trained), trained.classes, trained.preprocess)
    good, seen = [], []
    for place, picture in enumerate(pictures):
        try:
            seen.append(reader.pixels(picture))
        except UnreadableImage:
            continue
        good.append(place)
    shape = (0, *trained.preprocess.size, 3)
    return good, np.stack(seen) if seen else np.zeros(shape, np.uint8)


def _from(progress: Progress | None, before: int, every: int) -> Progress | None:
    return None if progress is None else lambda done, _: progress(before + done, every)


def _scored(
    whose: str,
    size: tuple[int, int],
    right: bool,
    features: np.ndarray,
    labels: np.ndarray,
    halves: tuple[np.ndarray, np.ndarray],
) -> Score:
    fitted, asked = halves
    mean, deviation = features[fitted].mean(axis=0), features[fitted].std(axis=0)
    scaled = (features - mean) / np.where(deviation > FLOOR, deviation, 1)
    targets = one_hot(labels, int(labels.max()) + 1)
    places, _ = nearest(scaled[asked], scaled[fitted], NEIGHBOURS)
    votes = targets[fitted][places].sum(axis=1)
    votes += 0.5 * targets[fitted][places[:, 0]]  # of equal ones that of the nearest wins
    layer = fit_layers(features[fitted], targets[fitted], (PENALTY,))[0]
    said = votes.argmax(axis=1), layer(features[asked]).argmax(axis=1)
    return Score(whose, size, right, *(one == labels[asked] for one in said))


def check(
    run: str | Path | Backbone,
    pictures: Sequence[Picture],
    labels: Sequence[int] | np.ndarray,
    *,
    side: int,
    progress: Progress | None = None,
) -> list[Finding]:
    """What `measure` finds of a run folder, or of weights that belong to none, as findings. Raises
    as that and `load_model` do."""
    eyes = run if isinstance(run, Backbone) else of_run(run)
    scores = measure(eyes.trained, eyes.untrained(), pictures, labels, side=side, progress=progress)
    return conclusions(scores)


def findings(
    run: str | Path | Backbone, audit: Audit, progress: Progress | None = None
) -> list[Finding]:
    """For `crosspatch audit --run` and `--weights`: the expectations of the run's model, and what
    `check` says of up to `MOST` pictures, drawn evenly. run: its folder, a bundle in that, or
    weights. Raises as `check` does, and UsageError for data with several labels to a picture and a
    bundle without its run."""
    source = audit.source
    if source.multi:
        raise UsageError(
            "pictures have several labels",
            "one label to a picture",
            "leave --run or --weights away",
        )
    eyes = run if isinstance(run, Backbone) else of_run(run)
    chosen = np.linspace(0, len(source) - 1, min(MOST, len(source))).round().astype(int).tolist()
    seen, good = [], []
    for at in chosen:
        try:
            seen.append(np.asarray(source.image(at)))
        except UnreadableImage:
            continue
        good.append(at)
    if not seen:
        raise UsageError("no picture can be read", "pictures that can be read", "mend them first")
    sight = look(seen)
    told = expectations(eyes.trained.preprocess, sight)
    pictures = [partial(source.read, at) for at in good]
    told += check(eyes, pictures, source.labels[good], side=sight.side, progress=progress)
    words = {"DATA": audit.opened.place.data, "BEGIN": eyes.flags}
    fill = lambda text: " ".join(str(words.get(word, word)) for word in text.split(" "))
    return [one._replace(command=fill(one.command)) for one in told]


def conclusions(scores: Sequence[Score]) -> list[Finding]:
    """What follows, in plain words: the table as items, and whether size, normalisation, the
    training matter here, with 95 % intervals of the differences in kNN-5 accuracy."""
    items = [
        {
            "path": f"{one.features}, {_size(one.size)}"
            + ("" if one.normalised else ", not normalised"),
            "note": f"kNN-5 {_share(one.neighbours)}, linear {_share(one.linear)}",
        }
        for one in scores
    ]
    nets = [one for one in scores if one.features == MODEL]
    whole = nets[0]
    text = [
        f"Half of the pictures were named by the other half, {len(whole.neighbours):,} of them."
    ]
    worse = []
    small = [one for one in nets if one.size != whole.size and one.normalised]
    wrong = [one for one in nets if one.size == whole.size and not one.normalised]
    control = [one for one in scores if one.features == RANDOM]
    text += [
        sentence
        for other, what in (
            *((one, f"At {_size(one.size)} instead of {_size(whole.size)}") for one in small),
            *((one, "Without normalisation") for one in wrong),
        )
        for sentence in [f"{what} kNN-5 changes by {_change(whole, other)} points."]
    ]
    if control[1:]:
        change = _change(control[0], control[1])
        text.append(f"With random weights the smaller size changes it by {change} points: that "
                    "part has nothing to do with training.")  # fmt: skip
    for one in (*(c for c in control if c.size == whole.size), scores[0]):
        low = paired(*_moved(one, whole), len(whole.neighbours))[0]
        if low <= 0:
            worse.append(one.features)
    if worse:
        text.append(f"The network is not shown to be better than {' and '.join(worse)}.")
    level = "warn" if worse else "good"
    title = "What size and normalisation do to the features"
    return [Finding(level, KIND, title, " ".join(text), "", items)]


def _moved(before: Score, after: Score) -> tuple[int, int]:
    """(gained, lost) pictures."""
    one, other = before.neighbours, after.neighbours
    return int((other & ~one).sum()), int((one & ~other).sum())


def _change(before: Score, after: Score) -> str:
    gained, lost = _moved(before, after)
    count = len(before.neighbours)
    low, high = paired(gained, lost, count)
    return f"{100 * (gained - lost) / count:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _share(right: np.ndarray) -> str:
    low, high = wilson(int(right.sum()), len(right))
    return f"{100 * right.mean():.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _size(size: tuple[int, int]) -> str:
    return "x".join(str(side) for side in reversed(size)) + " pixels"
