"""What worse pictures cost: each change is one, and gains and losses are counted on pairs."""

import numpy as np
import pytest

from crosspatch.deploy.footprint import latency, weights_size
from crosspatch.deploy.robustness import CHANGES, changed, robustness
from support.runs import write_run


class Bright:
    """Says class 1 of what is bright, class 0 of what is dark."""

    class engine:
        class setting:
            engine = "torch"

    thresholds: tuple[float, ...] = ()

    def forward(self, images: np.ndarray) -> np.ndarray:
        bright = (images.mean(axis=(1, 2, 3)) > 100).astype(np.float32)
        return np.stack([1 - bright, bright], axis=1)


def pictures(count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 2
    noise = rng.integers(0, 60, (count, 32, 48, 3))
    return (noise + 140 * labels[:, None, None, None]).astype(np.uint8), labels


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_keeps_the_shape_and_changes(name: str) -> None:
    before, _ = pictures(3)
    after = changed(before, name)
    assert (after.shape, after.dtype) == (before.shape, np.uint8)
    assert (after != before).any()
    assert (changed(before, name) == after).all()


def test_a_grey_field_stays_itself_but_in_the_dark() -> None:
    plain = np.full((1, 40, 40, 3), 100, np.uint8)
    for name in CHANGES:
        off = np.abs(changed(plain, name).astype(int) - (40 if name == "dark" else 100)).max()
        assert off <= 1, name


def test_what_the_dark_costs() -> None:
    found = {one["name"]: one for one in robustness(Bright(), *pictures())}  # type: ignore[arg-type]
    assert found["clean"]["accuracy"] == 1.0
    assert "change" not in found["clean"]
    assert found["dark"]["accuracy"] == 0.5  # all are dark now
    assert found["dark"]["change"] == -0.5
    assert found["dark"]["change_low"] < -0.5 < found["dark"]["change_high"] < 0
    assert found["jpeg"]["change"] == 0
    assert found["jpeg"]["change_low"] < 0 < found["jpeg"]["change_high"]


def test_of_several_labels_all_must_be_right() -> None:
    images, labels = pictures()
    several = np.stack([1 - labels, labels], axis=1)
    judge = Bright()
    judge.thresholds = (0.5, 0.5)
    assert robustness(judge, images, several, names=())[0]["accuracy"] == 1.0  # type: ignore[arg-type]
    several[0] = 1
    told = robustness(judge, images, several, names=())[0]  # type: ignore[arg-type]
    assert told["accuracy"] == pytest.approx(11 / 12)


def test_time_and_size_of_a_run(tmp_path) -> None:
    import torch

    run, threads = write_run(tmp_path / "run"), torch.get_num_threads()
    took = latency(run, 0.05)
    assert 0 < took["low"] <= took["median"] <= took["high"]
    assert (took["threads"], took["engine"]) == (1, "torch")
    assert took["count"] >= 20
    assert torch.get_num_threads() == threads
    assert weights_size(run) == (run / "model" / "model.safetensors").stat().st_size
    assert weights_size(tmp_path) == 0
