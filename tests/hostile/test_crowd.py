"""Item 46: five hundred clients at once, each with a picture of its own."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from hostile.conftest import probabilities
from hostile.crowd import distinct
from hostile.process import Server
from support.bundles import colours

COUNT = 500


def test_five_hundred_at_once_get_their_own_answer_or_a_503(server: Server) -> None:
    sent = [distinct(number) for number in range(COUNT)]
    with ThreadPoolExecutor(COUNT) as pool:
        replies = list(pool.map(lambda one: server.ask(one[0]), sent))
    counted = Counter(reply.status for reply in replies)
    assert set(counted) <= {200, 503}, counted
    assert counted[200] >= 32
    for (_, colour), reply in zip(sent, replies, strict=True):
        if reply.status == 503:
            assert int(reply.headers["retry-after"]) >= 1
        else:
            expected = colours(np.array(colour, np.uint8).reshape(1, 1, 1, 3))[0]
            np.testing.assert_allclose(probabilities(reply), expected, atol=1e-5)
    assert (
        len({reply.json()["request_id"] for reply in replies if reply.status == 200})
        == (counted[200])
    )


def test_every_one_of_five_hundred_is_answered_when_they_ask_again(server: Server) -> None:
    def patient(number: int) -> None:
        data, colour = distinct(number)
        for _ in range(200):
            reply = server.ask(data)
            if reply.status == 200:
                expected = colours(np.array(colour, np.uint8).reshape(1, 1, 1, 3))[0]
                np.testing.assert_allclose(probabilities(reply), expected, atol=1e-5)
                return
            assert reply.status == 503, reply.body
        raise AssertionError("refused two hundred times")

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(patient, range(COUNT)))
