# SPDX-License-Identifier: Apache-2.0
"""`crosspatch data longtail DATA`: a folder of pictures with a long tail."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from crosspatch.cli.options import DATA, Columns, Output, at_least, positive, typed


def longtail(
    data: Annotated[str, Parameter(help=DATA)],
    /,
    *,
    out: Annotated[Path, Parameter(metavar="DIR")],
    ratio: Annotated[float, Parameter(converter=positive)] = 100.0,
    kind: Literal["exp", "step"] = "exp",
    seed: Annotated[int, at_least(0, "--seed 0")] = 0,
    columns: Columns | None = None,
    output: Output | None = None,
) -> int:
    """Write pictures with a long tail: fewer from class to class.

    To train on such data without writing them, add @lt:100 to DATA.

    Parameters
    ----------
    out
        The new folder, with train, val and test; only train is thinned.
    ratio
        The first class has so many times the training pictures of the last.
    kind
        exp: fewer from class to class; step: the later half has few.
    seed
        Of the split, where DATA has none.
    """
    output = output or Output()
    from crosspatch.data.longtail import Tail, require_tail
    from crosspatch.data.written import check_new, whole_folder, write_pictures

    tail = Tail(ratio, kind)
    require_tail(tail, f"--ratio {ratio:g}", "--ratio ")
    check_new(out)
    from crosspatch.cli.screen import Screen, print_json
    from crosspatch.data.opening import open_source
    from crosspatch.data.split import make_split

    with Screen(stderr=output.json) as screen:
        source = open_source(data, tail=tail, **typed(columns or Columns()))
        split = make_split(source, seed=seed)
        with whole_folder(out) as draft:
            tell = lambda done, total: screen.progress("writing", done, total)
            write_pictures(source, split, draft, tell)
        counts = dict(zip(source.classes, source.counts(split.train).tolist(), strict=True))
        sizes = {name: len(getattr(split, name)) for name in ("train", "val", "test")}
        if not output.json:
            _print(screen, out, sizes, counts)
    if output.json:
        print_json({"out": str(out), "data": data, **tail._asdict(), "split": sizes,
                    "training": counts})  # fmt: skip
    return 0


def _print(screen: Any, out: Path, sizes: dict[str, int], counts: dict[str, int]) -> None:
    from crosspatch.cli import words

    screen.line(f"{out}: " + " · ".join(f"{n:,} {name}" for name, n in sizes.items()), "bold")
    screen.line("training pictures", "cyan")
    for name, count in counts.items():
        screen.line(f"  {name}: {count:,}")
    screen.line()
    screen.line("next, type", "green")
    screen.line(f"  {words.command('crosspatch', 'train', out)}")
