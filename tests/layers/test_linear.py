# SPDX-License-Identifier: Apache-2.0
"""The oneDNN product: torch's numbers to 1e-5, and torch's own operator wherever it must be."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from crosspatch.errors import UsageError
from crosspatch.layers import linear as module
from crosspatch.layers.linear import LEAST_MACS, Linear, active, linear, switched, use
from crosspatch.metrics.macs import count_macs


class Spy:
    """Counts the products that go to oneDNN."""

    def __init__(self, monkeypatch) -> None:
        self.calls, real = 0, module.onednn_product

        def counted(*operands):
            self.calls += 1
            return real(*operands)

        monkeypatch.setattr(module, "onednn_product", counted)


@pytest.fixture
def spy(monkeypatch) -> Spy:
    return Spy(monkeypatch)


@pytest.fixture(autouse=True)
def on():
    with switched("on"):
        yield


def operands(*lead: int, width: int = 96, out: int = 192, seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((*lead, width), (out, width), (out,))
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]


def gradients(product, parts, weight_of_output) -> list[torch.Tensor]:
    y = product(*parts)
    return [y.detach(), *torch.autograd.grad((y * weight_of_output).sum(), parts)]


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(64, 130),
    st.integers(64, 130),
    st.booleans(),
)
def test_output_and_gradients_are_those_of_torch(lead, width, out, biased) -> None:
    lead = [*lead, -(-LEAST_MACS // (width * out))]
    parts = operands(*lead, width=width, out=out)[: 3 if biased else 2]
    scale = torch.linspace(-1, 1, out) / len(parts[0].flatten(0, -2))
    mine = gradients(linear, parts, scale)
    theirs = gradients(F.linear, parts, scale)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, 1:],
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(4, -1, -1),
    ],
)
def test_views_are_taken_as_they_are(view, spy) -> None:
    x, weight, bias = operands(4, 400)
    torch.testing.assert_close(
        linear(view(x), weight, bias), F.linear(view(x), weight, bias), rtol=1e-5, atol=1e-5
    )
    assert spy.calls == 1


def test_only_what_is_asked_for_is_differentiated(spy) -> None:
    x, weight, bias = operands(400)
    linear(x.detach(), weight.detach(), bias).sum().backward()
    assert spy.calls == 1
    assert bias.grad is not None
    with torch.no_grad():
        assert linear(x, weight, bias).grad_fn is None


def test_a_second_derivative_is_refused() -> None:
    x, weight, bias = operands(400)
    first = torch.autograd.grad(linear(x, weight, bias).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def autocast(x, weight, bias):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return linear(x, weight, bias)


def compiled(x, weight, bias):
    return torch.compile(linear, backend="eager", fullgraph=True)(x, weight, bias)


def exported(x, weight, bias):
    layer = Linear(*reversed(weight.shape))
    layer.load_state_dict({"weight": weight.detach(), "bias": bias.detach()})
    return torch.export.export(layer, (x.detach(),)).module()(x)


def traced(x, weight, bias):
    given = (x.detach(), weight.detach(), bias.detach())
    return torch.jit.trace(linear, given, check_trace=False)(x, weight, bias)


def counted(x, weight, bias):
    with FlopCounterMode(display=False) as counter:
        y = linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * x.numel() * len(weight)
    return y


def vmapped(x, weight, bias):
    return torch.func.vmap(lambda row: linear(row, weight, bias))(x[None])[0]


def forward_mode(x, weight, bias):
    y, tangent = torch.func.jvp(lambda v: linear(v, weight, bias), (x,), (x,))
    torch.testing.assert_close(tangent + bias, y, rtol=1e-4, atol=1e-4)
    return y


def double(x, weight, bias):
    return linear(x.double(), weight.double(), bias.double()).float()


def switched_off(x, weight, bias):
    with switched("off"):
        return linear(x, weight, bias)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "how",
    [autocast, compiled, exported, traced, counted, vmapped, forward_mode, double, switched_off],
)
def test_torchs_own_operator_wherever_it_must_be(how, spy) -> None:
    x, weight, bias = operands(400)
    tolerance = 5e-2 if how is autocast else 1e-4
    torch.testing.assert_close(
        how(x, weight, bias).float(), F.linear(x, weight, bias), rtol=tolerance, atol=5 * tolerance
    )
    assert spy.calls == 0


def test_small_products_stay_with_torch(spy) -> None:
    x, weight, bias = operands(LEAST_MACS // (96 * 192))
    linear(x, weight, bias)
    assert spy.calls == 0
    linear(*operands(LEAST_MACS // (96 * 192) + 1))
    assert spy.calls == 1


def test_counting_switches_it_off(spy) -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), Linear(3 * 16 * 16, 2000))
    assert count_macs(net, (3, 16, 16)) == 3 * 16 * 16 * 2000
    assert spy.calls == 0


def test_the_mode_is_set_resolved_once_and_put_back(monkeypatch) -> None:
    assert active()
    with switched("off") as state:
        assert not state
        assert not active()
    assert active()
    asked = []
    monkeypatch.setattr(module, "remembered", lambda file, key, make, fits: make())
    for ratio in (module.WORTH * 1.01, module.WORTH * 0.99):
        monkeypatch.setattr(module, "measure", lambda r=ratio: asked.append(r) or r)
        monkeypatch.setattr(module, "_on", None)
        monkeypatch.delenv(module.VARIABLE, raising=False)
        assert active() is (ratio > module.WORTH)
        active()
    assert len(asked) == 2
    monkeypatch.setattr(module, "_on", None)
    monkeypatch.setenv(module.VARIABLE, "off")
    assert not active()
    with pytest.raises(UsageError, match="auto, on, off"):
        use("fast")


def test_without_the_operator_it_is_off(monkeypatch) -> None:
    monkeypatch.setattr(module, "onednn_exists", lambda: False)
    assert module.measure() == 0
    assert not use("on")
    assert not use("auto")


def test_measuring_gives_a_ratio() -> None:
    assert 0.1 < module.measure() < 10


def test_a_layer_is_torchs_linear_in_every_other_way() -> None:
    layer = Linear(8, 4)
    assert isinstance(layer, torch.nn.Linear)
    again = copy.deepcopy(layer)
    assert again.state_dict().keys() == {"weight", "bias"}
