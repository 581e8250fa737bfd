# SPDX-License-Identifier: Apache-2.0
"""The page that explains an answer: where the network looked, which parts decided, which branch.

`explained` makes the page of `crosspatch predict --explain`, `section` a piece of a run's report.
Numbers come from `explain/`; this is what people see of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from crosspatch.data.augment import normalise
from crosspatch.deploy.predictor import Picture, Predictor
from crosspatch.deploy.torch_engine import TorchEngine
from crosspatch.errors import UsageError, visible
from crosspatch.explain.attention import (
    ClassMap,
    Layout,
    layout,
    maps_of,
    rollout_of,
    written_from,
)
from crosspatch.explain.branches import BIASES, EXCHANGE, grouped, without
from crosspatch.explain.circuits import Attribution, dla
from crosspatch.explain.forward import explainable
from crosspatch.explain.overlay import SIDE, enlarged, shade, signed
from crosspatch.explain.patching import Record, patch, record
from crosspatch.report import figures, page
from crosspatch.tasks import activate
from crosspatch.tokens.host import branch_names
from crosspatch.training.package import Trained, load_model

BARS, CHECKED = 14, 6  # parts in the figure; parts that are exchanged to see whether they matter
NOT_A_GRID = "This network's stages have grids of their own: no maps are drawn."


class Drawn(NamedTuple):
    """A picture of a page. address: of the image; title, text: what it shows."""

    address: str
    title: str
    text: str


def explained(
    run: str | Path,
    *pictures: Picture,
    names: Sequence[str] = (),
    trained: Trained | None = None,
    progress: Any = None,
) -> str:
    """The page about what the model of a run folder says of pictures.

    names: what each is called, by default its path. trained: the run's model, where it was loaded
    already. progress: called with (done, total). Raises UsageError for no picture and for a model
    that cannot be taken apart, UnreadableImage for a damaged picture, DataError for a damaged run.
    """
    if not pictures:
        raise UsageError("no picture to explain", "one picture or more", "name a picture")
    trained = load_model(run) if trained is None else trained
    explainable(trained.module)
    predictor = Predictor(TorchEngine(trained, device="cpu"), trained.classes, trained.preprocess)
    names = names or [str(one) if isinstance(one, str | Path) else "picture" for one in pictures]
    told = []
    for done, (name, picture) in enumerate(zip(names, pictures, strict=True)):
        if progress is not None:
            progress(done, len(pictures))
        told.append(_one(trained, predictor.pixels(picture), name))
    if progress is not None:
        progress(len(pictures), len(pictures))
    return page.render(
        "explained.html",
        run=str(run),
        pictures=told,
    )


def section(trained: Trained, pictures: Sequence[np.ndarray], names: Sequence[str] = ()) -> Markup:
    """A piece of a report: who decides, on average and for each picture, and where it looked.

    pictures: uint8 (H, W, 3) of the model's size, as `Predictor.pixels` gives them. Empty where the
    model cannot be taken apart, or there is no picture.
    """
    try:
        explainable(trained.module)
    except UsageError:
        return Markup("")
    if not len(pictures):
        return Markup("")
    names = names or [f"picture {place}" for place in range(1, len(pictures) + 1)]
    told = [_one(trained, one, name) for name, one in zip(names, pictures, strict=True)]
    branches = _layout_names(trained)
    means: list[tuple[str, float]] = []
    if len(branches) > 1:
        sizes = [{row[0]: abs(row[1]) for row in one["written"]} for one in told]
        whole = [sum(size.values()) or 1.0 for size in sizes]
        means = [
            (key, 100 * float(np.mean([s[key] / w for s, w in zip(sizes, whole, strict=True)])))
            for key in sizes[0]
        ]
    return Markup(page.render("explained_section.html", pictures=told, means=means))


# ------------------------------------------------------------------ one picture


def _one(trained: Trained, pixels: np.ndarray, name: str) -> dict[str, Any]:
    """All that a page says of one picture."""
    model = explainable(trained.module).cpu().eval()
    as_seen = replace(trained.preprocess, store=trained.preprocess.size)
    images = normalise(torch.from_numpy(np.array(pixels))[None], as_seen).float()
    kept = record(model, images)
    probs = activate(kept.logits / trained.temperature, trained.task)[0].tolist()
    order = np.argsort([-p for p in probs], kind="stable")
    a = int(order[0])
    b = int(order[1]) if len(order) > 1 and trained.task != "multilabel" else None
    shape = _layout_or_none(model, images)
    found = dla(model, images, a, b, sources=shape is not None)
    classes = trained.classes
    answer = {
        "name": name,
        "seen": page.thumbnail(Image.fromarray(enlarged(pixels)), SIDE),
        "top": [(classes[i], probs[i]) for i in order[:5]],
        "a": classes[a],
        "b": None if b is None else classes[b],
        "difference": float(found.found[0, 0]),
        "error": found.error,
        "parts": [(part.name, f"{mean:+.4f}") for part, mean, _ in found.table()],
        "bars": _bars(found, classes[a], None if b is None else classes[b]),
        "checked": _checked(model, images, found, a, b),
        "maps": [] if shape is None else _maps(pixels, shape, kept, found),
        "note": NOT_A_GRID if shape is None else "",
        "written": [],
        "without": [],
    }
    names = _layout_names(trained)
    if len(names) > 1:
        sums = grouped(found, names)
        answer["written"] = [(_called(key), float(value[0])) for key, value in sums.items()]
        answer["without"] = _without(trained, model, images, kept)
    return answer


def _layout_names(trained: Trained) -> tuple[str, ...]:
    return branch_names(explainable(trained.module))


def _layout_or_none(model: Any, images: Tensor) -> Layout | None:
    try:
        return layout(model, images)
    except UsageError:
        return None


def _called(key: str) -> str:
    special = {
        EXCHANGE: "taken from the other branch in the fusions",
        BIASES: "biases, the same for every picture",
    }
    return special.get(key, f"{key} branch, from its own patches")


def _without(
    trained: Trained, model: Any, images: Tensor, kept: Record
) -> list[tuple[str, str, str]]:
    """(what is taken away, the answer then, its probability)."""
    rows = []
    for key, value in {"": kept.logits, **without(model, images, kept)}.items():
        scores = torch.as_tensor(np.asarray(value)).float() / trained.temperature
        probs = activate(scores, trained.task)[0]
        best = int(probs.argmax())
        what = {"": "nothing", EXCHANGE: "what the fusions take"}.get(key, f"the {key} branch")
        rows.append((what, trained.classes[best], page.percent(float(probs[best]))))
    return rows


def _checked(
    model: Any, images: Tensor, found: Attribution, a: int, b: int | None
) -> list[tuple[str, str, str]]:
    """(part, what it adds directly, how far the difference falls when the part is given what it
    computes for a picture of the same mean colour): of the parts that add most."""
    parts = [part for part, _, _ in found.table() if not part.constant and part.kind != "positions"]
    parts = parts[:CHECKED]
    plain = images.mean(dim=(2, 3), keepdim=True).expand_as(images)
    effects = patch(model, images, plain, parts, a=a, b=b)
    direct = {part: mean for part, mean, _ in found.table()}
    falls = effects.clean[0] - effects.patched[:, 0]
    rows = zip(parts, falls, strict=True)
    return [(part.name, f"{direct[part]:+.2f}", f"{fall:+.2f}") for part, fall in rows]


# ------------------------------------------------------------------ figures


def _bars(found: Attribution, a: str, b: str | None) -> Markup:
    """The parts that add most, as bars, and all others in one."""
    rows = found.table()
    shown, rest = rows[:BARS], rows[BARS:]
    labels = [part.name for part, _, _ in shown]
    values = [mean for _, mean, _ in shown]
    if rest:
        labels.append(f"all {len(rest)} others together")
        values.append(sum(mean for _, mean, _ in rest))
    colours = [figures.COLOURS[1] if v >= 0 else figures.COLOURS[0] for v in values]
    towards = f"towards {_short(a)}" + (f", not {_short(b)}" if b is not None else "")
    with figures.drawing(7.0, 0.7 + 0.24 * len(labels)) as (figure, panel):
        panel.barh(range(len(labels)), values, color=colours, height=0.7)
        panel.axvline(0, color=figures.SOFT, linewidth=0.8)
        panel.set_yticks(range(len(labels)), labels)
        panel.invert_yaxis()
        panel.grid(axis="y", visible=False)
        panel.set_xlabel(f"logits {towards}")
        said = f"What each part adds {towards}: most, {labels[0]} with {values[0]:+.2f}."
        return figures.to_svg(figure, said)


def _short(name: str, most: int = 32) -> str:
    """A class name that a figure has room for, in one line that a figure can hold."""
    line = visible(name)
    return line if len(line) <= most else line[: most - 1] + "…"


def _maps(pixels: np.ndarray, shape: Layout, kept: Record, found: Attribution) -> list[dict]:
    """Rows of drawn maps: one for each branch, one for the fusions."""
    classes, rolled = maps_of(shape, kept), rollout_of(shape, kept)
    written = written_from(shape, found)
    largest = max(float(np.abs(one).max()) for one in written.values())
    rows = []
    for name, roll in zip(shape.names, rolled, strict=True):
        drawn = []
        own = [one for one in classes if one.branch == name and not one.fusion]
        if own:
            last = own[-1]
            share = 1 - float(last.elsewhere.mean())
            heads = last.heads.shape[1]
            of = f"mean of {heads} heads" if heads > 1 else "its head"
            text = f"block {last.block}, {of}; patches have "
            drawn.append(
                _drawn(
                    shade(pixels, last.heads[0].mean(axis=0)),
                    "Last attention",
                    text + page.percent(share, 0),
                )
            )
        for onto, one in roll.maps.items():
            of = f" of the {onto} patches" if onto else ""
            text = f"{page.percent(float(one.sum()), 0)} of what is read comes from here"
            if one.sum() > 0:
                drawn.append(_drawn(shade(pixels, one[0]), f"Through all blocks{of}", text))
        title = "Written into the answer"
        text = "orange speaks for the answer, blue against it"
        drawn.append(_drawn(signed(pixels, written[name][0], largest), title, text))
        rows.append({"title": f"{name} branch".capitalize() if name else "", "drawn": drawn})
    fusions = [one for one in classes if one.fusion]
    if fusions:
        drawn = [_fusion(pixels, one) for one in fusions]
        rows.append({"title": "What the fusions take from the other branch", "drawn": drawn})
    return rows


def _fusion(pixels: np.ndarray, one: ClassMap) -> Drawn:
    title = f"Fusion {one.block}: {one.branch} asks {one.onto}"
    text = f"{page.percent(float(one.heads[0].sum(axis=(1, 2)).mean()), 0)} of its attention"
    return _drawn(shade(pixels, one.heads[0].mean(axis=0)), title, text)


def _drawn(image: Image.Image, title: str, text: str) -> Drawn:
    return Drawn(page.thumbnail(image, SIDE), title, text)
