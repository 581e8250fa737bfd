"""What of a set of tensors goes into a model: body as it is, positions resized, heads by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import crosspatch as xp
from crosspatch.errors import DataError
from crosspatch.layers.position import Table, resize_tables
from crosspatch.models.registry import classifiers
from crosspatch.training.transfer import fill, head_entries
from crosspatch.training.weights import match_heads

NAMES = ("ash", "beech", "cedar", "date", "elm", "fir")
KINDS = [
    ("vit_micro_32", {}),
    ("vit_micro_32", {"dist_token": True}),
    ("crossvit_micro_32", {}),
    ("evo_levit_micro_32", {}),
    ("resnet10t", {}),
]


def model(name, classes, seed=0, **arguments):
    torch.manual_seed(seed)
    return xp.create_model(name, num_classes=classes, **arguments)


@pytest.mark.parametrize(("name", "arguments"), KINDS)
@settings(max_examples=6, deadline=None)
@given(
    theirs=st.lists(st.sampled_from(NAMES), min_size=2, max_size=5, unique=True),
    ours=st.lists(st.sampled_from(NAMES), min_size=2, max_size=5, unique=True),
)
def test_heads_are_matched_by_the_names_of_classes(name, arguments, theirs, ours):
    old = model(name, len(theirs), 1, **arguments)
    new, fresh = (model(name, len(ours), 2, **arguments) for _ in range(2))
    rows, said = match_heads(theirs, ours)
    count = fill(new, old.state_dict(), where="w", rows=rows)
    assert count == len(theirs)
    before, after, drawn = old.state_dict(), new.state_dict(), fresh.state_dict()
    heads = head_entries(new)
    assert len(heads) == 2 * len(classifiers(new))
    for entry in after:
        if entry not in heads:
            assert torch.equal(after[entry], before[entry])
    for entry in heads:
        for place, one in enumerate(ours):
            known = one in theirs
            wanted = before[entry][theirs.index(one)] if known else drawn[entry][place]
            assert torch.equal(after[entry][place], wanted)
    assert f"{len(set(theirs) & set(ours))} of {len(ours)}" in said


def test_names_in_another_case_are_said_and_not_taken():
    rows, said = match_heads(("Ash", "beech", "cedar"), ("ash", "beech ", "date"))
    assert rows == ()
    assert "0 of 3 taken over, 3 fresh" in said
    assert "ash (there: Ash), beech  (there: beech)" in said
    assert match_heads(("a", "b"), ("b", "a"))[0] == (1, 0)


@pytest.mark.parametrize(("name", "arguments"), KINDS[:4])
def test_at_the_same_size_a_filled_model_gives_the_same_answers(name, arguments):
    old, new = (model(name, 3, seed, img_size=(32, 24), **arguments).eval() for seed in (1, 2))
    fill(new, old.state_dict(), where="w", rows=(0, 1, 2), tables=old.position_tables())
    pictures = torch.randn(2, 3, 32, 24)
    with torch.no_grad():
        assert torch.equal(new(pictures), old(pictures))


@pytest.mark.parametrize(("name", "arguments"), KINDS[:4])
def test_positions_follow_the_size_though_no_grid_is_square(name, arguments):
    old = model(name, 3, 1, img_size=(32, 48), **arguments)
    new = model(name, 3, 2, img_size=(48, 32), **arguments).eval()
    fill(new, old.state_dict(), where="w", rows=(0, 1, 2), tables=old.position_tables())
    for entry, table in new.position_tables().items():
        (h, w), prefix, _ = table
        found, theirs = new.get_parameter(entry), old.get_parameter(entry)
        assert found.shape[1] == prefix + h * w
        assert torch.equal(found[:, :prefix], theirs[:, :prefix])
        assert not torch.equal(found[:, prefix:], theirs[:, prefix:])  # turned, not copied
        image = theirs[0, prefix:, 0].detach().view(w, h)
        corner = found[0, prefix:, 0].detach().view(h, w)[0, 0]
        assert (corner - image[0, 0]).abs() < image.std()
    assert new(torch.randn(1, 3, 48, 32)).isfinite().all()


def test_a_table_of_no_square_grid_needs_to_be_told():
    state = {"pos_embed": torch.randn(1, 1 + 2 * 3, 4)}
    new = {"pos_embed": Table((3, 3), 1)}
    with pytest.raises(ValueError, match="no square grid"):
        resize_tables(state, new)
    found = resize_tables(state, new, {"pos_embed": Table((2, 3), 1)})
    assert found["pos_embed"].shape == (1, 10, 4)
    assert resize_tables(state, {"pos_embed": Table((2, 3), 1)})["pos_embed"] is state["pos_embed"]


def test_a_head_without_names_is_taken_where_it_has_as_many_classes():
    old = model("vit_micro_32", 3, 1)
    same, other = model("vit_micro_32", 3, 2), model("vit_micro_32", 4, 2)
    drawn = other.head.weight.clone()
    assert fill(same, old.state_dict(), where="w") == 3
    assert torch.equal(same.head.weight, old.head.weight)
    assert fill(other, old.state_dict(), where="w") == 3
    assert torch.equal(other.head.weight, drawn)
    body = {k: v for k, v in old.state_dict().items() if not k.startswith("head.")}
    assert fill(other, body, where="w") is None


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda s: s.pop("cls_token"), "missing: cls_token"),
        (lambda s: s.update(more=torch.zeros(1)), "unexpected: more"),
        (lambda s: s.update(cls_token=torch.zeros(1, 1, 5)), r"cls_token is \(1, 1, 5\)"),
        (lambda s: s["norm.weight"].fill_(torch.nan), "not finite: norm.weight"),
        (lambda s: [s.pop(k) for k in list(s) if "blocks" in k], r"missing: .* and \d+ more"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(spoil, match):
    state = {k: v.clone() for k, v in model("vit_micro_32", 3, 1).state_dict().items()}
    spoil(state)
    new = model("vit_micro_32", 3, 2)
    before = {k: v.clone() for k, v in new.state_dict().items()}
    with pytest.raises(DataError, match=match):
        fill(new, state, where="w")
    assert all(torch.equal(v, before[k]) for k, v in new.state_dict().items())
