"""What papers claim, scaled down to minutes by `crosspatch compare`; outcomes into the catalog.

    python benchmarks/claims.py                      what there is, and about how long it takes
    python benchmarks/claims.py GROUP --data cifar10.tar.xz --out FOLDER
           [--epochs 12] [--seeds 3] [--pictures 10000] [--threads 1] [--catalog FOLDER]

GROUP: mixing, distill, scalekd, longtail, tokens, resformer. `--data` holds train/CLASS/ and
test/CLASS/ of pictures of 32 pixels, such as CIFAR-10. One group is one process, so groups may run
side by side, with the same --out; what was stopped goes on when it is typed again. The first
--pictures of train (as many of each class) are learnt from, 15 % of them choose, all of test judge;
the long tail is drawn from the same. Whatever comes out is written into the catalog, good or bad,
and the page of the comparison into benchmarks/results.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path, PurePosixPath
from typing import Any

import crosspatch._torchvision  # noqa: F401

import numpy as np

from crosspatch import catalog
from crosspatch.catalog import Measured
from crosspatch.cli.compare import Whole
from crosspatch.cli.compare import _print as show
from crosspatch.cli.main import main as command_line
from crosspatch.cli.screen import Screen
from crosspatch.cli.words import plural
from crosspatch.metrics.paired import Estimate, crossed
from crosspatch.processor import processor
from crosspatch.training.compare import Asked, compare
from crosspatch.training.compared import Compared, Row
from crosspatch.training.run import RunFolder
from crosspatch.training.session import train_run

RESULTS = Path(__file__).parent / "results"
STUDENT, PLAIN, TOKENS, SIZES = (
    "deit_micro_distilled_32", "vit_micro_32", "lvvit_micro_32", "resformer_micro_32",
)  # fmt: skip
TEACHER = {"model": "resnet20_cifar", "recipe": "cnn", "size": 32}
SPEED = 250  # training pictures a second of the micro models with a thread, as a guess
TESTED_AT = (16, 24, 32, 48)


@dataclass(frozen=True)
class Claim:
    """slug; the candidate that is judged; what is claimed of it; which difference: of accuracy
    ("difference") or of the mean recall of rare classes ("tail_difference")."""

    slug: str
    candidate: str
    text: str
    figure: str = "difference"


@dataclass(frozen=True)
class Group:
    """One comparison. tries: makes --try of the folder of all; common: settings for all; longtail:
    whether the data are thinned; first: makes what candidates need (a teacher, labels); factor: how
    much longer a run takes than a plain one; candidates: how many, for the estimate."""

    tries: Callable[[Work], str]
    common: dict[str, Any]
    claims: tuple[Claim, ...]
    candidates: int
    factor: float = 1.0
    longtail: bool = False
    teacher: dict[str, Any] = field(default_factory=dict)
    first: Callable[[Work], None] = lambda work: None


@dataclass(frozen=True)
class Work:
    """Where one group works, and how."""

    name: str
    data: str
    out: Path
    epochs: int
    seeds: int
    threads: int

    @property
    def teacher(self) -> Path:
        return self.out / f"teacher-{self.name}"

    @property
    def labels(self) -> Path:
        return self.out / f"labels-{self.name}.safetensors"


def _label(work: Work) -> None:
    """Labels of every patch from the teacher, once."""
    if not work.labels.is_file():
        words = ["label", work.data, "--teacher", str(work.teacher), "--out", str(work.labels)]
        if command_line(words):
            sys.exit(1)


PAIR = "mixup+cutmix"
MORE = "beats the pair of MixUp and CutMix"
GROUPS = {
    "mixing": Group(
        lambda work: (
            f"{PAIR},resizemix,maskmix,transmix,mixpro,"
            "all=mixup+cutmix+resizemix+transmix+mixpro,nothing=mix=none"
        ),
        {"model": PLAIN},
        (
            Claim("resizemix", "resizemix", f"ResizeMix alone {MORE}."),
            Claim("resizemix", "all", f"A draw among all mixings {MORE}."),
            Claim("mixpro", "maskmix", f"MaskMix {MORE}."),
            Claim("transmix", "transmix", f"TransMix {MORE}."),
            Claim("mixpro", "mixpro", f"MaskMix with progressive attention labels {MORE}."),
        ),
        7,
    ),
    "distill": Group(
        lambda work: f"base,soft:{work.teacher},hard:{work.teacher}",
        {"model": STUDENT},
        (
            Claim("deit", "hard:teacher-distill", "Hard distillation beats none."),
            Claim("deit", "soft:teacher-distill", "Soft distillation beats none."),
        ),
        3,
        factor=1.5,
        teacher=TEACHER,
    ),
    "scalekd": Group(
        lambda work: f"base,scalekd:{work.teacher}",
        {"model": STUDENT},
        (Claim("scalekd", "scalekd:teacher-scalekd", "ScaleKD beats no distillation."),),
        2,
        factor=4.0,
        teacher=TEACHER,
    ),
    "longtail": Group(
        lambda work: (
            f"plain=balance=none,drw=balance=drw,ldam,logit-adjust,deit-lt=deit-lt:{work.teacher}"
        ),
        {"model": STUDENT, "size": 32},
        (
            Claim("deit-lt", "deit-lt", "DeiT-LT's student beats the plain one in recall of rare "
                  "classes.", "tail_difference"),
            Claim("deit-lt", "deit-lt", "DeiT-LT's student beats the plain one in accuracy."),
            Claim("ldam", "ldam", "LDAM with deferred weights beats plain training in recall of "
                  "rare classes.", "tail_difference"),
            Claim("logit-adjust", "logit-adjust", "Logit adjustment beats plain training in "
                  "recall of rare classes.", "tail_difference"),
        ),
        5,
        factor=1.6,
        longtail=True,
        # as DeiT-LT trains its own; the rate is lower: at 0.1 this short a training diverges
        teacher={**TEACHER, "model": "resnet_micro_32", "model_args": {"use_norm": True},
                 "objective": "ldam", "balance": "drw", "sam": 0.05, "lr": 0.02},
    ),
    "tokens": Group(
        lambda work: f"base,tokens=labels:{work.labels}",
        {"model": TOKENS},
        (Claim("token-labeling", "tokens", "Token labels beat labels of pictures alone."),),
        2,
        factor=2.0,
        teacher=TEACHER,
        first=_label,
    ),
    "resformer": Group(
        lambda work: "one=base,several=sizes=24/16",
        {"model": SIZES, "size": 32},
        (),  # tested at several sizes instead: see `at_sizes`
        2,
        factor=1.8,
    ),
}  # fmt: skip


def minutes(group: Group, args: argparse.Namespace) -> float:
    """A guess, teachers excepted: they take as long as one run or two."""
    pictures = args.pictures // 4 if group.longtail else args.pictures
    runs = group.candidates * args.seeds + (2 if group.teacher else 0)
    return runs * group.factor * args.epochs * 0.85 * pictures / SPEED / args.threads / 60


def unpacked(archive: Path, out: Path, pictures: int | None) -> Path:
    """The first pictures of each class of train, and all of test, as files; made once."""
    target = out / (f"pictures-{pictures}" if pictures else "pictures")
    if target.is_dir():
        return target
    out.mkdir(parents=True, exist_ok=True)
    if archive.is_dir():
        sys.exit(f"{archive} is a folder; an archive is expected")
    with tarfile.open(archive) as tar, tempfile.TemporaryDirectory(dir=out) as aside:
        names = sorted(one for one in tar.getnames() if PurePosixPath(one).suffix)
        kinds = sorted({PurePosixPath(one).parent for one in names})
        by = {kind: [n for n in names if PurePosixPath(n).parent == kind] for kind in kinds}
        each = pictures // sum(kind.parts[-2] == "train" for kind in kinds) if pictures else None
        wanted = {n for k in kinds for n in (by[k][:each] if k.parts[-2] == "train" else by[k])}
        chosen = [member for member in tar.getmembers() if member.name in wanted]
        tar.extractall(aside, members=chosen, filter="data")
        root = Path(aside) / PurePosixPath(*kinds[0].parts[:-2])
        made = Path(aside) / "made"
        made.mkdir()
        for part in ("train", "test"):
            (root / part).rename(made / part)
        try:
            made.rename(target)
        except OSError:  # another group made it meanwhile
            if not target.is_dir():
                raise
    return target


def taught(work: Work, settings: dict[str, Any]) -> None:
    """The teacher of a group, trained once, on the split that its students have."""
    run = RunFolder(work.teacher)
    if run.ended:
        return
    print(f"the teacher of {work.name}", flush=True)
    given = {**settings, "epochs": 2 * work.epochs, "threads": work.threads, "seed": 0}
    train_run(work.data, work.teacher, given, resume=run.unfinished)


def outcome(claim: Claim, found: Estimate, row: Row, base: str, how: str) -> Measured:
    """A claim with what was measured, good or bad. One claim is tested by its own interval."""
    points = [100 * value for value in found[:3]]
    if found.low > 0:
        verdict = "reproduced at this size"
    elif found.high < 0:
        verdict = "not reproduced: the contrary was measured"
    else:
        verdict = "not shown at this size, neither way"
    what = "points of test accuracy"
    what = "points of mean recall of the rarest classes" if "tail" in claim.figure else what
    told = f"{plural(found.seeds, 'seed')}, {plural(round(row.cost['epochs']), 'epoch')}"
    if row.accuracy:
        told += f", {row.name} at {100 * row.accuracy.mean:.1f} %"
    return Measured(
        claim=claim.text,
        figure=f"{points[0]:+.1f} {what} against {base}",
        interval=(round(points[1], 2), round(points[2], 2)),
        hardware=processor().describe(),
        command=how,
        date=date.today().isoformat(),
        verdict=f"{verdict} ({told})",
    )  # fmt: skip


def write(claims: Sequence[Claim], found: Compared, how: str, folder: Path) -> None:
    """The outcomes of a comparison into the catalog."""
    rows = {row.name: row for row in found.rows}
    made: dict[str, list[Measured]] = {}
    for claim in claims:
        row = rows[claim.candidate]
        gap = getattr(row, claim.figure)
        if gap is None:
            print(f"{claim.text} {row.verdict}")
            continue
        one = outcome(claim, gap, row, found.baseline.name, how)
        made.setdefault(claim.slug, []).append(one)
        print(f"{claim.slug}: {one.claim} {one.figure} {one.interval}: {one.verdict}")
    for slug, outcomes in made.items():
        catalog.record(slug, outcomes, folder)


def at_sizes(found: Compared, how: str, folder: Path) -> None:
    """Runs of one and of several sizes, tested at each size: the paper's own question."""
    made = []
    for side in TESTED_AT:
        tables = [np.array([_right(run.folder, found.plan.data, side) for run in row.runs])
                  for row in found.rows]  # fmt: skip
        gap = crossed(tables[1].astype(float) - tables[0])
        text = f"Training at 32, 24 and 16 pixels is better at {side} than training at 32 alone."
        claim = Claim("resformer", "several", text)
        row = found.rows[1]
        one = outcome(claim, gap, row, found.baseline.name, how)
        accuracy = [100 * table.mean() for table in tables]
        verdict = f"{one.verdict.split(' (')[0]} ({accuracy[1]:.1f} % against {accuracy[0]:.1f} %)"
        made.append(Measured(**{**one.__dict__, "verdict": verdict}))
        print(f"{made[-1].claim} {made[-1].figure} {made[-1].interval}: {verdict}", flush=True)
    catalog.record("resformer", made, folder)


def _right(run: Path, data: str, side: int) -> np.ndarray:
    """Which test pictures a run names rightly at another size (N,)."""
    from dataclasses import replace

    from crosspatch.data.opening import open_source
    from crosspatch.data.prepare import prepare
    from crosspatch.data.split import read_split
    from crosspatch.training.evaluation import predict_probabilities
    from crosspatch.training.package import load_model

    source, trained = open_source(data), load_model(run)
    pre = replace(trained.preprocess, size=(side, side), store=(side, side))
    test = read_split(run / "split.csv", source).test
    images = prepare(source, pre, workers=1).images.subset(test)
    said = predict_probabilities(trained.module.eval(), images, 250).numpy().argmax(1)
    return said == images.labels.numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("group", nargs="?", choices=list(GROUPS))
    parser.add_argument("--data", type=Path, help="cifar10.tar.xz")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--catalog", type=Path, default=catalog.HERE)
    args = parser.parse_args()
    for name in [args.group] if args.group else GROUPS:
        print(f"{name}: {GROUPS[name].candidates} candidates, about "
              f"{minutes(GROUPS[name], args):.0f} minutes", flush=True)  # fmt: skip
    if not args.group:
        return
    if args.data is None or args.out is None:
        parser.error("--data and --out are needed")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    group = GROUPS[args.group]
    folder = unpacked(args.data, args.out, args.pictures)
    data = f"{folder}@lt:100" if group.longtail else str(folder)
    work = Work(args.group, data, args.out, args.epochs, args.seeds, args.threads)
    if group.teacher:
        taught(work, group.teacher)
    group.first(work)
    common = {**group.common, "threads": args.threads}
    how = shlex.join(["python", "benchmarks/claims.py", *_typed(args)])
    with Screen() as screen:
        asked = Asked(group.tries(work), args.seeds, None, args.epochs, common)
        found = compare(data, args.out / args.group, asked, Whole(screen))
        show(screen, found)
    write(group.claims, found, how, args.catalog)
    if args.group == "resformer":
        at_sizes(found, how, args.catalog)
    RESULTS.mkdir(exist_ok=True)
    for name, end in (("compare.md", "md"), ("compare.png", "png")):
        if (found.out / name).is_file():
            shutil.copy(found.out / name, RESULTS / f"claims-{args.group}.{end}")


def _typed(args: argparse.Namespace) -> list[str]:
    """The command without this machine's paths."""
    words = [args.group, "--data", args.data.name, "--out", "claims"]
    for name in ("epochs", "seeds", "pictures", "threads"):
        words += [f"--{name}", str(getattr(args, name))]
    return words


if __name__ == "__main__":
    main()
