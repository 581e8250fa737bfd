"""The laws of token reduction, for every method by its row in `support.reductions`."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import crosspatch as xp
from crosspatch.layers.tokens import recover
from crosspatch.tokens.host import reducers_of
from crosspatch.tokens.reduce import replay
from crosspatch.tokens.spec import METHODS
from support.reductions import CASES, pictures, tiny_crossvit, tiny_host

METHOD = pytest.mark.parametrize("method", list(CASES))


def where(holds):
    """The methods of whose row `holds` is true."""
    return pytest.mark.parametrize("method", [name for name, case in CASES.items() if holds(case)])


def reduced(method, **host):
    case = CASES[method]
    return xp.reduce(tiny_host(**{**case.host, **host}), method, **case.options)[0]


def states(model, images):
    """The states after the blocks, by number, and the last."""
    final, collected = model.run(model.embed(images), collect=range(len(model.blocks)))
    return [collected[i] for i in sorted(collected)], final


def test_every_method_has_a_row():
    assert set(CASES) == set(METHODS)


@where(lambda case: case.nothing is not None)
def test_nothing_asked_changes_no_bit(method):
    case = CASES[method]
    for model in (tiny_host(**case.host), tiny_host(**case.host, init_values=0.3, qk_norm=True)):
        untouched, saved = xp.reduce(model, method, **case.nothing)
        with torch.no_grad():
            assert torch.equal(untouched(pictures()), model(pictures()))
        assert saved.macs == saved.base


@METHOD
def test_token_counts_are_those_of_the_schedule(method):
    model = reduced(method)
    model.train(CASES[method].trains_only)
    (reducer,) = reducers_of(model)
    assert reducer is not None
    with torch.no_grad():
        entering = model.embed(pictures()).tokens.shape[1]
        after, _ = states(model, pictures())
    assert (entering, *(s.tokens.shape[1] for s in after)) == reducer.counts
    assert min(reducer.counts) < entering or CASES[method].parameters


@where(lambda case: case.merges)
def test_sizes_sum_to_the_number_of_tokens(method):
    model = reduced(method)
    with torch.no_grad():
        for state in states(model, pictures())[0]:
            if state.sizes is not None:
                assert torch.equal(state.sizes.sum(dim=1), torch.full((3,), 17.0))
        assert state.sizes is not None


@where(lambda case: case.prefix)
@pytest.mark.parametrize("host", [{}, {"reg_tokens": 2}, {"dist_token": True}])
def test_prefix_tokens_stay_where_they_are(method, host):
    """They are neither merged nor moved: of size one, and no patch's source."""
    model = reduced(method, **host)
    prefix = model.num_prefix_tokens
    with torch.no_grad():
        for state in states(model, pictures())[0]:
            assert state.n_prefix == prefix
            if state.sizes is not None:
                assert (state.sizes[:, :prefix] == 1).all()
            if state.source is not None:
                assert not ((state.source >= 0) & (state.source < prefix)).any()


@where(lambda case: case.restores)
def test_source_restores_the_full_grid(method):
    model = reduced(method)
    with torch.no_grad():
        _, final = states(model, pictures())
        assert (final.full_source >= final.n_prefix).all()
        assert (final.full_source < final.tokens.shape[1]).all()
        assert recover(final).shape == (3, 16, model.embed_dim)
        if final.sizes is not None:
            counted = torch.stack([row.bincount(minlength=17) for row in final.full_source])
            assert torch.equal(counted[:, 1 : final.sizes.shape[1]].float(), final.sizes[:, 1:])


@where(lambda case: case.permutes)
def test_shuffled_patches_change_nothing(method):
    model = reduced(method)
    with torch.no_grad():
        state = model.embed(pictures())
        shuffle = torch.randperm(16, generator=torch.Generator().manual_seed(2))
        index = torch.cat([torch.arange(1), shuffle + 1])
        shuffled = state._replace(tokens=state.tokens[:, index])
        a, b = (model.classify(model.pool(model.run(s)[0])) for s in (state, shuffled))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@METHOD
def test_the_given_model_is_untouched(method):
    case = CASES[method]
    model = tiny_host(**case.host)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    xp.reduce(model, method, **case.options)
    assert reducers_of(model) == (None,)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert len(after) == len(before)
    if not case.parameters:
        assert list(reduced(method).state_dict()) == list(after)


@METHOD
def test_copies_and_replays_compute_the_same(method):
    model = reduced(method)
    rebuilt = tiny_host(**CASES[method].host)
    for transform in model.transforms:
        replay(rebuilt, transform)
    rebuilt.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(pictures())
        assert torch.equal(copy.deepcopy(model)(pictures()), expected)
        assert torch.equal(rebuilt.eval()(pictures()), expected)


@METHOD
def test_autocast_checkpointing_and_gradients(method):
    model = reduced(method).train()
    images = pictures()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(3)
        model(images).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 20
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads, strict=True))
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(images).isfinite().all()


@METHOD
def test_one_graph_and_a_dynamic_batch(method):
    model = reduced(method, depth=3)
    with torch.no_grad():
        expected = model(pictures())
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(pictures()), expected, rtol=1e-4, atol=1e-4)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (pictures(2),), dynamic_shapes=({0: batch},))
        module = program.module()
        for count in (1, 3):
            got = module(pictures(count))
            torch.testing.assert_close(got, model(pictures(count)), rtol=1e-4, atol=1e-4)


@METHOD
def test_both_branches_of_a_crossvit(method):
    case = CASES[method]
    model = tiny_crossvit()
    untouched = model(pictures())
    both, saved = xp.reduce(model, method, **case.options)
    assert {one.branch for one in saved.blocks} == {"fine", "coarse"}
    with torch.no_grad():
        assert both(pictures()).isfinite().all()
        assert not torch.equal(both(pictures()), untouched) or case.trains_only
        one, saved = xp.reduce(model, method, **case.options, fine=None)
        assert reducers_of(one)[0] is None
        assert reducers_of(one)[1] is not None
    both.train()(pictures()).square().mean().backward()


def test_the_table_in_the_docs_says_which_laws_hold():
    """docs/tokens.md, row by row."""
    docs = Path(__file__).parents[2] / "docs" / "tokens.md"
    lines = docs.read_text(encoding="utf-8").splitlines()
    mark = {True: "yes", False: "no"}
    for method, case in CASES.items():
        holds = (case.nothing is not None, case.merges, case.prefix, case.restores, case.permutes,
                 case.parameters, case.trains_only)  # fmt: skip
        row = f"| `{method}` | " + " | ".join(mark[one] for one in holds) + " |"
        assert row in lines, row
