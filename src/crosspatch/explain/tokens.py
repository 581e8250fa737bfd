# SPDX-License-Identifier: Apache-2.0
"""Which patches a reduced network kept, merged and left out, drawn over the picture.

One panel per block that reduces, one row of them per branch of a CrossViT. Patches that became one
token wear their mean colour inside one outline; patches that no token stands for are dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from crosspatch.data.augment import normalise
from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy.predictor import Predictor
from crosspatch.deploy.torch_engine import TorchEngine
from crosspatch.errors import UsageError
from crosspatch.tokens.host import reducers_of
from crosspatch.tokens.walk import Step, steps
from crosspatch.training.package import load_model

PANEL = 224  # least width of a panel, pixels
COLUMNS = 6  # panels side by side, at most
GAP, CAPTION = 10, 22
MERGED = 0.65  # how far a merged patch takes the mean colour of its token
DARK = 0.2  # brightness of what was left out
LINE = (255, 255, 255)
LEGEND = (
    "one outline, mean colour: patches that are one token  |  as in the picture: a token of its own"
    "  |  dark: no token"
)


class Panel(NamedTuple):
    """One reducing block. branch: "" where there is one; block: its number there; entering,
    leaving: tokens, prefix included; source: (rows, columns) int64, for every patch the token that
    stands for it after the block, -1 for none."""

    branch: str
    block: int
    entering: int
    leaving: int
    source: np.ndarray

    def counts(self) -> dict[str, Any]:
        """The panel without its picture, for JSON."""
        return {key: value for key, value in self._asdict().items() if key != "source"}

    @property
    def caption(self) -> str:
        where = f"{self.branch} block" if self.branch else "block"
        return f"{where} {self.block}: {self.entering} to {self.leaving} tokens"


def reductions(model: nn.Module, pixels: np.ndarray, preprocess: Preprocess) -> list[Panel]:
    """The blocks of `model` that leave fewer tokens than enter, on one picture.

    pixels: uint8 (H, W, 3) of the model's size, as `Predictor.pixels` gives them. Raises UsageError
    where no reduction is in the model or none of its blocks reduces in evaluation.
    """
    if not any(r is not None for r in reducers_of(model)):
        raise UsageError(
            "a model without a reduction of tokens",
            "one that was trained or saved with one",
            "crosspatch train DATA --weights RUN --reduce mctf",
        )
    batch = torch.from_numpy(np.array(pixels))[None]
    like = next(model.parameters())
    training = model.training
    model.eval()
    try:
        as_seen = replace(preprocess, store=preprocess.size)  # nothing is cut off any more
        found = steps(model, normalise(batch.to(like.device), as_seen))
    finally:
        model.train(training)
    panels = [_panel(step) for step in found]
    reducing = [panel for panel in panels if panel.leaving < panel.entering]
    if not reducing:
        raise UsageError(
            "a reduction that leaves every token in evaluation",
            "a method that reduces in evaluation too, such as mctf or tome",
            "crosspatch train DATA --weights RUN --reduce mctf",
        )
    return reducing


def _panel(step: Step) -> Panel:
    source = step.after.full_source[0].reshape(step.after.grid).cpu().numpy()
    entering, leaving = step.before.tokens.shape[1], step.after.tokens.shape[1]
    return Panel(step.branch, step.block, entering, leaving, source)


def draw(pixels: np.ndarray, panels: Sequence[Panel]) -> Image.Image:
    """The picture, uint8 (H, W, 3), with what each panel says of it: a row (or more) per branch."""
    factor = max(1, -(-PANEL // pixels.shape[1]))
    large = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    rows: list[list[tuple[str, np.ndarray]]] = []
    for branch in dict.fromkeys(panel.branch for panel in panels):
        mine = [(p.caption, overlay(large, p.source)) for p in panels if p.branch == branch]
        shown = [("the picture as the model sees it", large), *mine]
        rows += [shown[i : i + COLUMNS] for i in range(0, len(shown), COLUMNS)]
    height, width = large.shape[:2]
    columns = max(len(row) for row in rows)
    font = ImageFont.load_default(13)
    wide = max(columns * (width + GAP) + GAP, int(font.getlength(LEGEND)) + 2 * GAP)
    tall = len(rows) * (height + CAPTION + GAP) + CAPTION + GAP
    sheet = Image.new("RGB", (wide, tall), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, tall - CAPTION), LEGEND, fill="black", font=font)
    for y, row in enumerate(rows):
        for x, (caption, image) in enumerate(row):
            left, top = GAP + x * (width + GAP), GAP + y * (height + CAPTION + GAP)
            pen.text((left, top + 2), caption, fill="black", font=font)
            sheet.paste(Image.fromarray(image), (left, top + CAPTION))
    return sheet


def overlay(pixels: np.ndarray, source: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3): `pixels` with the patches of one token in one colour and one outline.

    source: (rows, columns), see `Panel`.
    """
    height, width = pixels.shape[:2]
    rows, columns = source.shape
    y = np.arange(height) * rows // height
    x = np.arange(width) * columns // width
    token = source[y][:, x]
    ids, place, count = np.unique(token, return_inverse=True, return_counts=True)
    place = place.reshape(token.shape)
    patches = dict(zip(*np.unique(source, return_counts=True), strict=True))
    sums = [np.bincount(place.ravel(), pixels[..., c].ravel(), len(ids)) for c in range(3)]
    colour = (np.stack(sums, axis=-1) / count[:, None])[place]
    share = np.array([MERGED if patches[one] > 1 else 0.0 for one in ids])[place][..., None]
    out = pixels * (1 - share) + colour * share
    out[token < 0] = pixels[token < 0] * DARK
    merged = (share[..., 0] > 0) & (token >= 0)
    edge = np.zeros_like(merged)
    for axis in (0, 1):
        differs = np.diff(token, axis=axis) != 0
        before = [slice(None, -1) if a == axis else slice(None) for a in (0, 1)]
        after = [slice(1, None) if a == axis else slice(None) for a in (0, 1)]
        edge[tuple(before)] |= differs & (merged[tuple(before)] | merged[tuple(after)])
    out[edge] = LINE
    return out.round().astype(np.uint8)


def summary(panels: Sequence[Panel]) -> str:
    """One line: tokens that enter and leave each branch, and at how many blocks they fall."""
    parts = []
    for branch in dict.fromkeys(panel.branch for panel in panels):
        mine = [panel for panel in panels if panel.branch == branch]
        blocks = f"{len(mine)} block{'s' if len(mine) > 1 else ''}"
        ends = f"{mine[0].entering} to {mine[-1].leaving} tokens in {blocks}"
        parts.append(f"{branch} {ends}".strip())
    return ", ".join(parts)


def draw_run(run: str | Path, picture: Any, out: str | Path) -> list[Panel]:
    """Draw what the reduced model of a run folder does with one picture into the file `out`.

    picture: as `Predictor.predict` takes it. Raises UsageError for a run without a reduction,
    `UnreadableImage` for a damaged picture, DataError for a damaged run.
    """
    trained = load_model(run)
    shown = Predictor(TorchEngine(trained), trained.classes, trained.preprocess)
    pixels = shown.pixels(picture)
    panels = reductions(trained.module, pixels, trained.preprocess)
    draw(pixels, panels).save(out)
    return panels
