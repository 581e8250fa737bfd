"""`--try`: every form of a candidate, and what is refused."""

from __future__ import annotations

import pytest

from crosspatch.errors import UsageError
from crosspatch.training.candidates import parse_candidates

DEIT = "deit_tiny_distilled_patch16_224"
FORMS = {
    "mixup": {"mix": "mixup"},
    "mixup+cutmix": {"mix": "mixup,cutmix"},
    "mixup+ldam": {"mix": "mixup", "objective": "ldam"},
    "ldam:margin=0.5,scale=2": {"objective": "ldam:margin=0.5,scale=2"},
    f"{DEIT}+distill:a/run": {"model": DEIT, "distill": "soft", "teacher": "a/run"},
    "hard:a/run": {"distill": "hard", "teacher": "a/run"},
    "scalekd:a/run": {"distill": "scalekd", "teacher": "a/run"},
    "deit-lt": {"objective": "deit-lt"},
    "deit-lt:a/run": {"objective": "deit-lt", "teacher": "a/run"},
    "labels:a/b.safetensors": {"labels": "a/b.safetensors"},
    "token-labeling:a/b": {"objective": "token-labeling", "labels": "a/b"},
    "tome:r=8": {"reduce": "tome:r=8"},
    "evovit:keep=0.5,starts=4/8+mixup": {"reduce": "evovit:keep=0.5,starts=4/8", "mix": "mixup"},
    "mctf:r=4": {"reduce": "mctf:r=4"},
    "recipe=deit": {"recipe": "deit"},
    "deit": {"recipe": "deit"},
    "lr=0.001+sam=0.05": {"lr": 0.001, "sam": 0.05},
    "balance=drw": {"balance": "drw"},
    "sizes=24/16": {"sizes": "24,16"},
    "mix=mixup/cutmix": {"mix": "mixup,cutmix"},
    "weights=a/run": {"weights": "a/run"},
    "size=24x32": {"size": (24, 32)},
    "batch=32": {"batch": 32},
    "augment.ops=2+augment.rotate=3.5": {"augment": {"ops": 2, "rotate": 3.5}},
    "flip=no": {"flip": False},
    "x=evovit:keep=0.5,starts=4/8": {"reduce": "evovit:keep=0.5,starts=4/8"},
    "x=ldam:margin=0.5,scale=2": {"objective": "ldam:margin=0.5,scale=2"},
    "betas=0.9/0.95": {"betas": [0.9, 0.95]},
    "model_args.use_norm=yes+model_args.width=3": {"model_args": {"use_norm": True, "width": 3}},
}


@pytest.mark.parametrize("text", FORMS)
def test_a_candidate(text):
    first, found = parse_candidates(f"base,{text}")
    assert first.settings == {}
    assert found.settings == FORMS[text]
    assert found.folder not in ("", first.folder)
    assert "/" not in found.folder


def test_commas_before_settings_begin_a_candidate_and_before_options_do_not():
    found = parse_candidates("base,evovit:keep=0.5,starts=4/8,lr=0.01,tome:r=4,hard:a/run,sam=0.1")
    assert [one.text for one in found] == [
        "base", "evovit:keep=0.5,starts=4/8", "lr=0.01", "tome:r=4", "hard:a/run", "sam=0.1",
    ]  # fmt: skip


def test_names():
    found = parse_candidates("plain=base,quick=lr=0.01,distill:runs/a,distill:more/a,x=mixup+ldam")
    assert [one.name for one in found] == ["plain", "quick", "distill:a", "distill:more/a", "x"]
    assert len({one.folder for one in found}) == 5
    assert found[-1].settings == {"mix": "mixup", "objective": "ldam"}


def test_folders_are_never_shared_and_never_those_of_the_tables():
    found = parse_candidates("a-3=mixup,A=cutmix,a=lr=0.1,results.csv=lr=0.2,compare.png=lr=0.3")
    folders = [one.folder.casefold() for one in found]
    assert len(set(folders)) == 5
    assert not {"results.csv", "compare.png"} & set(folders)


def test_settings_of_all_are_replaced_by_a_candidates_own():
    with pytest.raises(UsageError, match="the same candidate"):
        parse_candidates("base,lr=0.1", {"lr": 0.1})
    assert parse_candidates("base,lr=0.2", {"lr": 0.1})[1].settings == {"lr": 0.2}


WRONG = [
    ("base,mixpu", "'mixpu' is nothing", "mixup"),
    ("base,mixup+ldm", "'ldm' in 'mixup", "ldam"),
    ("base,vit_mcro_32", "is nothing", "vit_micro_32"),
    ("base,lrr=0.1", "'lrr'", "lr"),
    ("base,x=lrr", "'x' in 'x=lrr'", "a mixing"),
    ("base,lr=high", "lr=high", "a number"),
    ("base,batch=1.5", "batch=1.5", "a whole number"),
    ("base,flip=maybe", "flip=maybe", "yes or no"),
    ("base,lr=", "'lr='", "a value"),
    ("base,size=big", "size=big", "pixels"),
    ("base,base", "base and base are the same", "seeds"),
    ("base,mixup,mix=mixup", "mix=mixup and mixup are the same", "seeds"),
    ("base,lr=1+lr=2", "sets lr to 1 and to 2", "one value"),
    ("base,tome:r=4+mctf:r=4", "sets reduce", "one value"),
    ("base,mixup+mixup", "mixup twice", "once"),
    ("base,seed=3", "seed is not a candidate's own", "the same for all"),
    ("base,epochs=3", "epochs is not", "the same for all"),
    ("base,task=multilabel", "task is not", "the same for all"),
    ("base,x=lr=0.1,x=lr=0.2", "two candidates are named x", "another name"),
    ("base", "one candidate", "two or more"),
    ("", "an empty candidate", "candidates with commas"),
    ("base,,mixup", "an empty candidate", "candidates with commas"),
    ("base,augment=3", "augment=3", "augment.NAME=value"),
    ("base,augment.foo=3", "augment.foo", "augment.NAME=value"),
    ("base,model_args=3", "model_args=3", "model_args.NAME=value"),
    ("base,lr.x=3", "lr.", "lr=value"),
    ("base,betas=0.9", "betas=0.9", "two numbers"),
    ("base,mean=0.5", "mean is not", "follows from the pictures"),
    ("base,class_weights=1", "class_weights is not", "follows from the pictures"),
    ("base,mix_prob=3", "mix_prob is not", "follows from the pictures"),
    ("base,labels", "'labels'", "--try base,labels:FILE"),
    ("base,teacher", "'teacher'", "teacher:RUN"),
    ("base,ldam:a/run", "gives ldam 'a/run'", "option=value"),
]


@pytest.mark.parametrize(("text", "got", "expected"), WRONG)
def test_what_is_refused(text, got, expected):
    with pytest.raises(UsageError) as raised:
        parse_candidates(text)
    assert got in raised.value.got
    assert expected in raised.value.expected + raised.value.do
