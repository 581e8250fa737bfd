"""Power laws are found again, and chance is drawn to the mean."""

import numpy as np
import pytest

from crosspatch.metrics.learning_curve import Law, fit, shrunk

SIZES = (50, 100, 200, 400)


def wrong(exponent: float, images: int, start: float = 0.6) -> list[float]:
    return [images * start * (size / SIZES[0]) ** -exponent for size in SIZES]


@pytest.mark.parametrize("exponent", [0.1, 0.3, 0.6])
def test_a_power_law_is_found_again(exponent: float) -> None:
    law = fit(SIZES, wrong(exponent, 100_000), 100_000)
    assert law.exponent == pytest.approx(exponent, abs=0.002)
    assert law.error < 0.02
    assert law.remaining(2)[0] == pytest.approx(2**-exponent, abs=0.002)


def test_few_test_pictures_say_little() -> None:
    few, many = fit(SIZES, wrong(0.3, 20), 20), fit(SIZES, wrong(0.3, 2000), 2000)
    assert few.error > 5 * many.error
    left, least, most = few.remaining(2)
    assert least < left <= most <= 1


def test_the_interval_holds_the_truth() -> None:
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        drawn = [rng.binomial(200, share / 200) for share in wrong(0.3, 200)]
        law = fit(SIZES, drawn, 200)
        held += abs(law.exponent - 0.3) < 1.96 * law.error
    assert held / 300 > 0.9


def test_chance_is_drawn_to_the_mean_and_what_is_sure_stays() -> None:
    rng = np.random.default_rng(1)
    noisy = [Law(0.3 + 0.2 * rng.standard_normal(), 0.2) for _ in range(50)]
    assert np.std([law.exponent for law in shrunk(noisy)]) < 0.06
    sure = [Law(0.1, 0.001), Law(0.5, 0.001), Law(0.9, 0.001)]
    assert [law.exponent for law in shrunk(sure)] == pytest.approx([0.1, 0.5, 0.9], abs=0.01)
    assert shrunk([]) == []


def test_what_has_no_law() -> None:
    with pytest.raises(ValueError, match="test pictures"):
        fit((50, 50), (1, 2), 10)
    with pytest.raises(ValueError, match="0 test pictures"):
        fit(SIZES, (1, 1, 1, 1), 0)
