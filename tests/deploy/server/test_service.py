"""A bundle that answers many at a time: each its own answer, nobody waits for nothing."""

from __future__ import annotations

import asyncio

import pytest

from crosspatch.deploy.server.service import Ask, Refused, Service
from support.bundles import CLASSES, info, write_bundle
from support.hostile import picture, saved


@pytest.fixture(scope="module")
def bundle_file(tmp_path_factory):
    return write_bundle(tmp_path_factory.mktemp("bundle") / "b.onnx", info((24, 32)))


def test_a_picture_is_answered(bundle_file) -> None:
    async def talk() -> None:
        service = Service(bundle_file, workers=1, batch=1)
        assert service.problem == "starting"
        assert not service.room
        await service.start()
        assert service.problem is None
        assert service.room
        answer = await service.answer(Ask(saved(picture("discs", 1), "PNG"), top=2))
        assert len(answer.predictions) == 2
        assert {name for name, _ in answer.predictions} <= set(CLASSES)
        assert (answer.width, answer.height, answer.format) == (48, 40, "PNG")
        with pytest.raises(Refused) as refused:
            await service.answer(Ask(b"no picture"))
        assert (refused.value.status, refused.value.code) == (415, "not_supported")
        await service.stop(1.0)
        assert service.pids == []

    asyncio.run(talk())
