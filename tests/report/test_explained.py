"""The page and the section of explanations: of one branch and of several, of every task."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from torch import nn

import crosspatch as xp
from crosspatch.data.preprocess import Preprocess
from crosspatch.errors import UsageError
from crosspatch.report.explained import explained, section
from crosspatch.training.package import Trained
from support.explainable import MODELS, crossvit, trunk

SEEN = Preprocess(size=(32, 32), store=(36, 36), fit="crop", mean=(0.5,) * 3, std=(0.25,) * 3)
PIXELS = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
NAMES = tuple(f"<script>{c}</script>" for c in ("x", "b\n", "$c$", "d'\"", "e" * 300))


def trained(model: nn.Module, task: str = "classify", thresholds: tuple = ()) -> Trained:
    return Trained(model, NAMES, SEEN, 1.3, 10, task, thresholds)


def looked(html: str) -> str:
    assert "<script" not in html
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html)
    return html


@pytest.mark.parametrize(
    "name", ["vit avg", "vit of uneven blocks", "deit distilled", "crossvit", "crossvit none",
             "crossvit all", "crossvit of three"]
)  # fmt: skip
def test_pages_of_networks_of_one_branch_and_of_several(name: str) -> None:
    html = looked(explained("run", PIXELS[0], trained=trained(MODELS[name]())))
    assert ("Which branch decides" in html) == name.startswith("crossvit")
    assert ("What the fusions take" in html) == (name.startswith("crossvit") and "none" not in name)
    assert ("grids of their own" in html) == (name == "vit of uneven blocks")
    assert "They add up to" in html
    assert "&lt;script&gt;" in html


def test_several_labels_to_a_picture_have_no_runner_up() -> None:
    html = looked(explained("run", PIXELS[0], trained=trained(trunk(), "multilabel", (0.5,) * 5)))
    assert "is ahead of" not in html
    assert "The logit of" in html


def test_a_section_of_a_report() -> None:
    html = looked(section(trained(crossvit()), PIXELS, ["<b>one</b>", "two"]))
    assert html.count("<details") == 2
    assert "How far each branch decides, over 2 pictures" in html
    assert "&lt;b&gt;one&lt;/b&gt;" in html
    assert "<html" not in html
    assert "How far" not in section(trained(trunk()), PIXELS[:1])


def test_a_section_is_left_out_where_there_is_nothing_to_say() -> None:
    assert section(trained(crossvit()), []) == ""
    other = xp.create_model("convnext_micro_32", num_classes=5).eval()
    assert section(trained(other), PIXELS) == ""
    with pytest.raises(UsageError, match="cannot be taken apart"):
        explained("run", PIXELS[0], trained=trained(other))
    with pytest.raises(UsageError, match="no picture"):
        explained("run", trained=trained(crossvit()))


def test_the_answer_is_the_calibrated_one() -> None:
    model = trained(crossvit())
    cold = model._replace(temperature=0.1, preprocess=replace(SEEN))
    first = re.search(r"</b>, ([\d.]+) %", explained("run", PIXELS[0], trained=model))
    second = re.search(r"</b>, ([\d.]+) %", explained("run", PIXELS[0], trained=cold))
    assert first is not None
    assert second is not None
    assert float(first[1]) < float(second[1])
