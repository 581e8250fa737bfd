"""A bundle that answers many at a time: each gets its own answer, and nobody waits for nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crosspatch.deploy.bundle import check_pictures, read_bundle
from crosspatch.deploy.engines import open_engine
from crosspatch.deploy.predictor import Predictor
from crosspatch.deploy.server.service import HELD, Answer, Ask, Refused, Service
from crosspatch.errors import DataError, UsageError
from support.bundles import CLASSES, colours, info, write_bundle
from support.hostile import BAD, GOOD, picture, saved

GIANT = saved(Image.new("RGB", (7000, 5600)), "PNG")


@pytest.fixture(scope="module")
def bundle_file(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("bundle") / "b.onnx", info((24, 32)))


def with_service(path: Path, use: Callable[[Service], Awaitable[None]], **given) -> None:
    """Runs `use` with a service that is ready; no process and no thread of it is left."""

    async def talk() -> None:
        usual = {"engine": "onnxruntime", "threads": 1, "workers": 1}
        usual |= {"patience": 60.0, "decode_seconds": 30.0}  # the tests' machine may be busy
        service = Service(path, **usual | given)
        await service.start()
        pids = service.pids
        try:
            async with asyncio.timeout(100):
                await use(service)
        finally:
            pids += service.pids
            await service.stop(5.0)
        assert not any(psutil.pid_exists(pid) for pid in pids)

    asyncio.run(talk())


def distinct(count: int, size: tuple[int, int] = (40, 48)) -> list[bytes]:
    """Pictures of one colour each, whose probabilities all differ."""
    colours = [(100 + k % 25, 100 + k // 25, 100) for k in range(count)]
    return [saved(Image.new("RGB", size, colour), "PNG") for colour in colours]


def predicted(path: Path, bodies: list[bytes], batch: int | None = None) -> np.ndarray:
    bundle = read_bundle(path)
    made = Predictor(open_engine(bundle), bundle.info.classes, bundle.info.preprocess)
    return made.predict(bodies, batch=batch).probs


def probs(answer: Answer) -> list[float]:
    """(3,) in the order of the classes."""
    return [dict(answer.predictions)[name] for name in CLASSES]


async def refusal(answer: Awaitable[Answer]) -> Refused:
    with pytest.raises(Refused) as refused:
        await answer
    return refused.value


def test_a_service_begins_answers_and_ends(bundle_file) -> None:
    async def talk() -> None:
        service = Service(bundle_file, workers=1, batch=1)
        assert service.problem == "starting"
        assert not service.room
        assert (await refusal(service.answer(Ask(GOOD["1x1.png"]())))).code == "busy"
        await service.start()
        assert service.problem is None
        assert service.room
        assert (service.limit, service.depth, service.restarts) == (4, 0, 0)
        answer = await service.answer(Ask(saved(picture("discs", 1), "PNG"), top=2))
        assert len(answer.predictions) == 2
        assert (answer.width, answer.height, answer.format) == (48, 40, "PNG")
        assert answer.batch == 1
        assert min(answer.queue, answer.decode, answer.compute) > 0
        await service.stop(1.0)
        assert service.pids == []
        assert (await refusal(service.answer(Ask(b"x")))).code == "draining"
        await service.stop(1.0)

    asyncio.run(talk())


def test_no_torch_is_needed(bundle_file) -> None:
    script = (
        "import asyncio, sys; from crosspatch.deploy.server.service import Ask, Service\n"
        "async def talk():\n"
        "    service = Service(sys.argv[1], workers=1)\n"
        "    await service.start()\n"
        "    await service.answer(Ask(open(sys.argv[2], 'rb').read()))\n"
        "    await service.stop(1)\n"
        "asyncio.run(talk())\n"
        "assert 'torch' not in sys.modules\n"
    )
    image = bundle_file.with_name("one.png")
    image.write_bytes(GOOD["1x1.png"]())

    async def talk() -> int:
        command = [sys.executable, "-W", "error", "-c", script, str(bundle_file), str(image)]
        return await (await asyncio.create_subprocess_exec(*command)).wait()

    assert asyncio.run(talk()) == 0


@pytest.mark.parametrize("batch", [1, 16])
def test_five_hundred_at_once_get_their_own_answers(bundle_file, batch) -> None:
    bodies = distinct(500)
    expected = predicted(bundle_file, bodies, 1)
    assert len(np.unique(expected, axis=0)) == 500

    async def use(service: Service) -> None:
        answers = await asyncio.gather(*(service.answer(Ask(body)) for body in bodies))
        found = np.array([probs(one) for one in answers])
        np.testing.assert_allclose(found, expected, rtol=0, atol=0 if batch == 1 else 1e-6)
        assert {one.batch <= batch for one in answers} == {True}
        assert service.depth == 0
        assert service._held == 0

    with_service(bundle_file, use, workers=2, batch=batch, queue=500)


def test_answers_are_bit_for_bit_those_of_predict_whatever_comes_together(bundle_file) -> None:
    """Each answer says how many were computed together; order within a batch is that of decoding,
    and with one process that is the order in which they came."""
    bodies = [saved(picture("rings", seed), "JPEG") for seed in range(60)]

    async def use(service: Service) -> None:
        answers = await asyncio.gather(*(service.answer(Ask(body)) for body in bodies))
        place, sizes = 0, set()
        while place < len(bodies):
            size = answers[place].batch
            expected = predicted(bundle_file, bodies[place : place + size], size)
            np.testing.assert_array_equal(
                np.array([probs(one) for one in answers[place : place + size]], np.float32),
                expected,
            )
            place, sizes = place + size, sizes | {size}
        assert place == len(bodies)

    with_service(bundle_file, use, batch=8, queue=60, max_wait_ms=3)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from([*GOOD, *BAD]), min_size=1, max_size=40))
def test_a_bad_picture_fails_alone(bundle_file, names) -> None:
    formats = ("JPEG", "PNG", "WebP", "BMP", "GIF", "TIFF")
    makers = {**GOOD, **{name: make for name, (make, _) in BAD.items()}}
    bodies = [makers[name]() for name in names]
    good = [body for name, body in zip(names, bodies, strict=True) if name in GOOD]
    expected = iter(predicted(bundle_file, good))

    async def use(service: Service) -> None:
        asks = (service.answer(Ask(body)) for body in bodies)
        for name, found in zip(
            names, await asyncio.gather(*asks, return_exceptions=True), strict=True
        ):
            if name in GOOD:
                assert isinstance(found, Answer), name
                np.testing.assert_allclose(probs(found), next(expected), rtol=0, atol=1e-6)
            else:
                assert isinstance(found, Refused), name
                assert found.status in (400, 415, 422)

    with_service(bundle_file, use, workers=2, queue=100, formats=formats)


def test_what_is_seen_is_the_models_input(bundle_file) -> None:
    body = GOOD["exif6.jpg"]()

    async def use(service: Service) -> None:
        plain, shown = await asyncio.gather(
            service.answer(Ask(body)), service.answer(Ask(body, seen=True))
        )
        assert plain.seen is None
        name = bundle_file.with_name("seen.png")
        name.write_bytes(shown.seen)
        bundle = read_bundle(bundle_file)
        expected = Predictor(open_engine(bundle), CLASSES, bundle.info.preprocess).pixels(body)
        np.testing.assert_array_equal(np.asarray(Image.open(name)), expected)

    with_service(bundle_file, use)


def test_cancelled_asks_give_their_places_free_and_are_not_computed(bundle_file) -> None:
    async def use(service: Service) -> None:
        asks = [asyncio.create_task(service.answer(Ask(GIANT))) for _ in range(4)]
        await asyncio.sleep(0.05)
        assert service.depth == service.limit == 4
        assert not service.room
        assert "4 of 4 places" in service.problem
        refused = await refusal(service.answer(Ask(GOOD["1x1.png"]())))
        assert (refused.status, refused.code) == (503, "busy")
        assert refused.retry_after >= 1
        for ask in asks:
            ask.cancel()
        await asyncio.wait(asks)
        assert (service.depth, service.room, service.problem) == (0, True, None)
        assert service._held == 0
        before = len(computed)
        answer = await service.answer(Ask(GOOD["1x1.png"]()))
        assert answer.width == 1
        assert len(computed) == before + 1  # the four were left out

    computed: list[float] = []
    observe = lambda name, value: computed.append(value) if name == "compute" else None
    with_service(bundle_file, use, queue=4, observe=observe)


def test_a_deadline_is_kept_to_the_moment_and_nothing_is_computed_after_it(bundle_file) -> None:
    async def use(service: Service) -> None:
        refused = await refusal(service.answer(Ask(GOOD["1x1.png"](), deadline=0.0)))
        assert (refused.status, refused.code) == (504, "deadline")
        first = asyncio.create_task(service.answer(Ask(GIANT)))
        await asyncio.sleep(0.02)
        began = time.monotonic()
        refused = await refusal(service.answer(Ask(GOOD["1x1.png"](), deadline=began + 0.1)))
        assert refused.code == "deadline"
        assert 0.09 < time.monotonic() - began < 0.25
        assert service.depth == 1
        assert (await first).width == 7000
        assert computed == [1]
        late = time.monotonic() + 30
        assert (await service.answer(Ask(GOOD["1x1.png"](), deadline=late))).width == 1

    computed: list[float] = []
    observe = lambda name, value: computed.append(value) if name == "batch" else None
    with_service(bundle_file, use, observe=observe)


def test_asks_that_would_wait_too_long_are_refused_although_there_are_places(bundle_file) -> None:
    async def use(service: Service) -> None:
        slow(service, 0.05)
        service._compute = 0.05
        bodies = distinct(60)
        asks = [asyncio.create_task(service.answer(Ask(body))) for body in bodies]
        await asyncio.sleep(0.01)
        assert not service.room
        assert 4 <= service.depth <= 7  # 0.25 s of pictures that take 0.05 s
        done = await asyncio.gather(*asks, return_exceptions=True)
        good = [one for one in done if isinstance(one, Answer)]
        assert 4 <= len(good) <= 7
        assert max(one.queue for one in good) < 0.6
        assert {one.code for one in done if isinstance(one, Refused)} == {"busy"}
        short = Ask(bodies[0], deadline=time.monotonic() + 0.02)
        waiting = asyncio.create_task(service.answer(Ask(bodies[1])))
        await asyncio.sleep(0)
        assert (await refusal(service.answer(short))).code == "busy"  # 0.05 s ahead, 0.02 s left
        await waiting

    with_service(bundle_file, use, batch=1, queue=1000, patience=0.25)


def test_pictures_that_wait_may_hold_no_more_than_so_many_bytes(bundle_file) -> None:
    async def use(service: Service) -> None:
        heavy = GIANT + bytes(HELD // 2)
        asks = [asyncio.create_task(service.answer(Ask(heavy))) for _ in range(2)]
        await asyncio.sleep(0)
        assert (await refusal(service.answer(Ask(heavy)))).code == "busy"
        await asyncio.gather(*asks, return_exceptions=True)
        assert service._held == 0

    with_service(bundle_file, use, queue=100)


def slow(service: Service, seconds: float) -> None:
    """Every batch takes that much longer."""
    run = service.engine.run

    def held(images: np.ndarray) -> np.ndarray:
        time.sleep(seconds)
        return run(images)

    service.engine.run = held


def test_draining_finishes_what_is_inside_and_refuses_what_comes(bundle_file) -> None:
    async def use(service: Service) -> None:
        asks = [asyncio.create_task(service.answer(Ask(body))) for body in distinct(20)]
        await asyncio.sleep(0)
        service.drain()
        assert service.problem == "draining"
        assert not service.room
        assert (await refusal(service.answer(Ask(b"x")))).code == "draining"
        await service.stop(20.0)
        assert [len((await one).predictions) for one in asks] == [3] * 20

    with_service(bundle_file, use, workers=2, queue=20)


def test_what_is_not_done_after_the_grace_is_refused(bundle_file) -> None:
    async def use(service: Service) -> None:
        slow(service, 0.3)
        asks = [asyncio.create_task(service.answer(Ask(body))) for body in distinct(10)]
        await asyncio.sleep(0.05)
        began = time.monotonic()
        await service.stop(0.05)
        assert time.monotonic() - began < 2.0
        done = await asyncio.gather(*asks, return_exceptions=True)
        assert "draining" in {one.code for one in done if isinstance(one, Refused)}
        assert all(isinstance(one, Answer | Refused) for one in done)

    with_service(bundle_file, use, batch=1, queue=20)


def test_a_killed_process_costs_one_picture_and_three_the_readiness(bundle_file) -> None:
    async def use(service: Service) -> None:
        for deaths in (1, 2, 3):
            ask = asyncio.create_task(service.answer(Ask(GIANT)))
            await asyncio.sleep(0.05)
            os.kill(service.pids[0], signal.SIGKILL)
            refused = await refusal(ask)
            assert (refused.status, refused.code) == (500, "decoder_died")
            began = time.monotonic()
            assert (await service.answer(Ask(GOOD["1x1.png"]()))).width == 1
            assert time.monotonic() - began < 2.0
            assert service.restarts == deaths
            assert (service.problem is None) == (deaths < 3)

    with_service(bundle_file, use)


def test_nothing_grows_over_a_thousand_asks(bundle_file) -> None:
    process = psutil.Process()
    bodies = [*distinct(40), *[make() for make, _ in list(BAD.values())[1:6]]]

    async def round(service: Service, count: int) -> None:
        for _ in range(count):
            asks = (service.answer(Ask(body)) for body in bodies)
            await asyncio.gather(*asks, return_exceptions=True)

    async def use(service: Service) -> None:
        await round(service, 5)
        before = process.num_fds(), process.num_threads(), service.pids
        await round(service, 23)
        assert (process.num_fds(), process.num_threads(), service.pids) == before
        assert (service.depth, service._held, len(service._pending)) == (0, 0, 0)
        assert not service._workers._waiting
        assert len(service._workers._idle) <= 2

    with_service(bundle_file, use, workers=2, queue=50)


def test_a_bundle_that_does_not_give_its_own_answers_is_not_served(tmp_path) -> None:
    described = info((24, 32))
    wrong = tuple(tuple(row) for row in colours(check_pictures((24, 32)) // 2).round(7).tolist())
    for made, match in (
        (write_bundle(tmp_path / "a.onnx", info((24, 32), check=wrong)), "off by"),
        (write_bundle(tmp_path / "b.onnx", described, scale=3e38), "not numbers"),
    ):
        service = Service(made, engine="onnxruntime", threads=1, workers=1)
        with pytest.raises(DataError, match=match):
            asyncio.run(service.start())
        assert service.pids == []
        assert service.problem is not None


def test_the_threshold_is_the_one_given_or_that_of_the_bundle(tmp_path, bundle_file) -> None:
    sure = write_bundle(tmp_path / "sure.onnx", info((24, 32), sure=0.875))

    async def check(service: Service, expected: float) -> None:
        answer = await service.answer(Ask(GOOD["progressive.jpg"]()))
        assert answer.threshold == service.threshold == expected
        assert answer.abstain == (answer.confidence < expected)
        assert answer.labels is None

    for path, told, expected in (
        (bundle_file, {}, 0.5),
        (sure, {}, 0.875),
        (sure, {"threshold": 0.25}, 0.25),
    ):
        with_service(path, lambda service, e=expected: check(service, e), **told)


def test_of_several_labels_those_over_their_thresholds_are_said(tmp_path) -> None:
    size = (24, 32)
    path = write_bundle(
        tmp_path / "m.onnx", info(size, task="multilabel", thresholds=(0.3, 0.2, 0.9))
    )

    async def use(service: Service) -> None:
        grey = saved(Image.new("RGB", size, (99, 99, 99)), "PNG")  # a third each
        answer = await service.answer(Ask(grey, top=1))
        assert [name for name, _ in answer.labels] == ["red", "green"]
        assert not answer.abstain
        assert answer.predictions == [answer.labels[0]]
        blue = await service.answer(Ask(saved(Image.new("RGB", size, (0, 0, 30)), "PNG")))
        assert (blue.labels, blue.abstain, blue.threshold) == ([], True, 0.9)
        assert 0.8 < blue.confidence < 0.9

    with_service(path, use)


def test_scores_of_patches_go_to_those_who_asked_for_them(bundle_file) -> None:
    async def use(service: Service) -> None:
        run, explained = service.engine.run, []

        def explain(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            explained.append(len(images))
            corners = images[:, ::12, ::16, 0].astype(np.float32)  # told apart by the picture
            return run(images), corners

        bodies = distinct(30)
        plain = await service.answer(Ask(bodies[0], explain=True))
        assert plain.patches is None  # this bundle has none
        service.explains, service.engine.explain = True, explain
        asks = [Ask(body, explain=place % 3 == 0) for place, body in enumerate(bodies)]
        answers = await asyncio.gather(*(service.answer(ask) for ask in asks))
        for place, answer in enumerate(answers):
            red = 100.0 + place % 25
            assert answer.patches == (None if place % 3 else [[red, red], [red, red]])
        assert sum(explained) >= 10
        before = list(explained)
        assert (await service.answer(Ask(bodies[1]))).patches is None
        assert explained == before

    with_service(bundle_file, use, batch=4, queue=40)


@pytest.mark.parametrize(
    "given",
    [
        {"workers": 0},
        {"batch": 0},
        {"queue": -1},
        {"formats": ("EPS",)},
        {"formats": ()},
        {"threshold": 1.5},
        {"threshold": float("nan")},
    ],
)
def test_settings_that_make_no_sense_are_refused(bundle_file, given) -> None:
    with pytest.raises(UsageError):
        Service(bundle_file, **given)
