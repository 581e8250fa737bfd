# SPDX-License-Identifier: Apache-2.0
"""What bench measures, what it leaves out, and what it says of it."""

from __future__ import annotations

import csv
import shutil

import numpy as np
import pytest
import torch

from crosspatch.data.preprocess import Preprocess
from crosspatch.deploy import bench as measuring
from crosspatch.deploy import bench_report, peak, subject
from crosspatch.deploy.bench import Benched, Row, bench, torch_threads
from crosspatch.deploy.bundle import Bundle, BundleInfo, read_bundle
from crosspatch.deploy.engines import Setting
from crosspatch.deploy.subject import Subject, prepare
from crosspatch.errors import DataError, UsageError
from crosspatch.metrics.latency import timing
from crosspatch.models.registry import create_model
from crosspatch.processor import Processor
from crosspatch.training.package import save_model

ALL = [
    ("torch", "fp32"), ("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"),
    ("openvino", "int8"),
]  # fmt: skip


class Notes:
    """A report that is kept."""

    def __init__(self) -> None:
        self.messages, self.steps = [], []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def progress(self, what: str, done: int, total: int) -> None:
        self.steps.append((what, done, total))


def processor_without_bf16() -> Processor:
    return Processor("some processor", 2, ("avx2",))


@pytest.fixture(scope="module", autouse=True)
def short():
    """Few turns, small products, and the same precisions on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "MOST", 5)
        patch.setattr(peak, "SIZES", (32, 64))
        patch.setattr(peak, "SECONDS", 0.01)
        for module in (measuring, subject, bench_report):
            patch.setattr(module, "processor", processor_without_bf16)
        patch.setattr("crosspatch.deploy.engines.computes_bf16", lambda: False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def notes() -> Notes:
    return Notes()


@pytest.fixture(scope="module")
def found(folder, notes) -> Benched:
    return bench(["vit_micro_32"], folder, notes, batches=(1, 3), threads=(1,), seconds=60)


def test_every_engine_and_precision_is_measured_at_every_batch(found, notes) -> None:
    assert [(*row.setting[:2], row.batch) for row in found.rows] == [
        (*kind, batch) for batch in (1, 3) for kind in ALL
    ]
    assert {row.setting.threads for row in found.rows} == {1}
    assert all(row.took.count == 5 and row.took.low <= row.took.median for row in found.rows)
    assert notes.messages[0] == "preparing vit_micro_32"
    assert "takes about" in notes.messages[1]
    assert notes.steps == [("measuring", 1, 2), ("measuring", 2, 2)]
    assert found.remarks == []


def test_shares_and_ratios_are_those_of_the_times(found) -> None:
    (one,) = found.subjects
    for batch in (1, 3):
        rows = [row for row in found.rows if row.batch == batch]
        rates = [2 * one.macs * batch / (row.took.median * row.share) for row in rows]
        assert rates == pytest.approx([rates[0]] * len(rows))  # one product, in the same turns
        torch_turns = np.array(rows[0].took.turns)
        for row in rows:
            ratios = torch_turns / np.array(row.took.turns)
            assert row.faster == pytest.approx(np.median(ratios))
            assert row.per_picture == row.took.median / batch
    assert set(found.peaks[1]) == {"fp32", "int8"}
    assert all(one.rate > 0 for one in found.peaks[1].values())


def test_the_table_names_the_machine_in_every_row(found) -> None:
    rows = bench_report.table(found)
    assert len(rows) == len(found.rows)
    for row, measured in zip(rows, found.rows, strict=True):
        assert row["processor"] == "some processor"
        assert row["torch"] == torch.__version__
        assert row["ms"] == pytest.approx(1e3 * measured.took.median, abs=1e-3)
        assert row["ms_per_picture"] * row["batch"] == pytest.approx(row["ms"], abs=1e-3)
        assert row["size"] == "32x32"
        assert row["share_of_peak"] > 0


def test_the_threads_of_torch_are_as_before(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(measuring, "usable_cores", lambda: 2)
    before = torch.get_num_threads()
    found = bench(["vit_micro_32"], tmp_path, Notes(), batches=(1,), engines=("torch",), seconds=9)
    assert [row.setting for row in found.rows] == [Setting("torch", "fp32", n) for n in (1, 2)]
    assert torch.get_num_threads() == before
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    assert not list(tmp_path.iterdir())  # torch alone needs no export


def test_bf16_is_measured_where_the_processor_has_it(monkeypatch, tmp_path) -> None:
    able = Processor("another", 2, ("avx512", "bf16"))
    for module in (measuring, subject):
        monkeypatch.setattr(module, "processor", lambda: able)
    found = bench(
        ["vit_micro_32"], tmp_path, Notes(), batches=(1,), threads=(1,), engines=("torch",)
    )
    assert [row.setting.precision for row in found.rows] == ["fp32", "bf16"]
    assert "bf16" in found.peaks[1]


def test_what_has_not_begun_in_time_is_left_out_and_named(folder, found) -> None:
    path = str(folder / "0.onnx")
    late = bench([path], folder, Notes(), batches=(1, 3), threads=(1,), seconds=1e-6)
    assert {row.batch for row in late.rows} == {1}
    assert late.remarks == [f"not measured, as the time was over: {path}, 1 thread, batch 3"]


def test_a_bundle_is_measured_as_it_is(folder, found) -> None:
    path = folder / "0-int8.onnx"
    alone = bench([str(path)], folder, Notes(), batches=(2,), threads=(1,), seconds=5)
    assert [row.setting[:2] for row in alone.rows] == [
        ("onnxruntime", "int8"), ("openvino", "int8"),
    ]  # fmt: skip
    assert all(row.faster is None for row in alone.rows)
    assert not any("torch" in text for text in bench_report.verdicts(alone))
    only = bench(
        [str(path)], folder, Notes(), batches=(2,), threads=(1,), engines=("openvino",), seconds=5
    )
    assert [row.setting.engine for row in only.rows] == ["openvino"]
    with pytest.raises(UsageError, match="nothing runs with torch"):
        bench([str(path)], folder, Notes(), threads=(1,), engines=("torch",))


def test_torch_runs_beside_a_bundle_that_lies_in_the_folder_of_its_run(
    folder, found, tmp_path
) -> None:
    (one,) = found.subjects
    shutil.copy(folder / "0.onnx", tmp_path / "bundle.onnx")
    assert one.trained is not None
    for classes, beside in (("0", False), (one.trained.classes, True)):
        config = {
            "architecture": "vit_micro_32",
            "model_args": {"num_classes": len(classes)},
            "class_names": list(classes),
            "preprocessing": one.trained.preprocess.to_dict(),
            "transforms": [],
        }
        module = create_model("vit_micro_32", num_classes=len(classes))
        (tmp_path / "model").mkdir(exist_ok=True)
        save_model(tmp_path / "model", module, config)
        prepared = prepare(str(tmp_path / "bundle.onnx"), tmp_path / "x.onnx", ["torch"], [])
        assert (prepared.trained is not None) == beside


def test_a_model_by_name_takes_the_size_that_is_asked_for(tmp_path) -> None:
    notes = Notes()
    found = bench(["vit_micro_32"], tmp_path, notes, batches=(1,), threads=(1,), size=(16, 24),
                  engines=("torch",))  # fmt: skip
    assert found.subjects[0].size == (16, 24)
    assert bench_report.records(found)[0]["size"] == "16x24"


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("vit_mikro_32", {}, "vit_micro_32"),
        ("runs/none", {}, "runs/none does not exist"),
        (__file__, {}, "is a file"),
        ("none.onnx", {}, "none.onnx does not exist"),
        ("vit_micro_32", {"threads": (999,)}, "--threads 999"),
        ("vit_micro_32", {"engines": ("openvinno",)}, "--engine openvino"),
    ],
)
def test_names_and_settings_that_cannot_be_had(name, given, words, tmp_path) -> None:
    with pytest.raises(UsageError, match=words):
        bench([name], tmp_path, Notes(), **given)


def test_runs_and_bundles_keep_their_size(folder, found, tmp_path) -> None:
    for name in (str(folder / "0.onnx"), str(tmp_path)):
        with pytest.raises(UsageError, match="leave --size out"):
            prepare(name, tmp_path / "x.onnx", ["torch"], [], size=32)
    with pytest.raises(DataError, match=r"config\.json"):
        prepare(str(tmp_path), tmp_path / "x.onnx", ["torch"], [])


def test_what_cannot_be_exported_runs_in_torch_with_a_remark(monkeypatch, tmp_path) -> None:
    def refuse(*given) -> None:
        raise DataError("it has a loop", "a graph", "use torch")

    monkeypatch.setattr("crosspatch.deploy.export.export_model", refuse)
    place, remarks = tmp_path / "x.onnx", []
    one = prepare("vit_micro_32", place, ["torch", "openvino"], remarks)
    assert one.bundles == ()
    assert one.settings(["torch", "openvino"]) == [("torch", "fp32", None)]
    assert remarks == ["vit_micro_32 runs in torch alone: it has a loop; use torch"]
    with pytest.raises(DataError, match="loop"):
        prepare("vit_micro_32", place, ["openvino"], remarks, strict=True)


def test_what_cannot_be_quantised_or_opened_leaves_the_rest(
    monkeypatch, folder, found, tmp_path
) -> None:
    def copy(module, path, info) -> None:
        shutil.copy(folder / "0.onnx", path)

    def refuse(*given) -> None:
        raise DataError("nothing to quantise", "a Linear", "leave it")

    monkeypatch.setattr("crosspatch.deploy.export.export_model", copy)
    monkeypatch.setattr("crosspatch.deploy.quantise.quantise_dynamic", refuse)
    real = measuring.open_engine

    def open_engine(bundle, engine, precision, threads):
        return refuse() if engine == "openvino" else real(bundle, engine, precision, threads)

    monkeypatch.setattr(measuring, "open_engine", open_engine)
    some = bench(["vit_micro_32"], tmp_path, Notes(), batches=(1,), threads=(1,))
    assert [row.setting[:2] for row in some.rows] == ALL[:2]
    assert [text.partition(":")[0] for text in some.remarks] == [
        "no int8 of vit_micro_32", "vit_micro_32 in openvino fp32",
    ]  # fmt: skip


def crafted(int8: list[float], bf16: list[float] | None = None) -> Benched:
    """One model in two threads and batches 1 and 4, with these times beside fp32's."""
    info = BundleInfo(
        classes=("a",), preprocess=Preprocess((8, 8), (8, 8)), architecture="m", parameters=10,
        macs=10**9, weights="",
    )  # fmt: skip
    bundles = tuple(
        Bundle(None, "onnx", BundleInfo(**{**vars(info), "precision": kind}), "", size)
        for kind, size in (("fp32", 8_000_000), ("int8-dynamic", 2_500_000))
    )
    times = {"fp32": [0.02, 0.04], "int8": int8} | ({"bf16": bf16} if bf16 else {})
    rows = [
        Row("m", Setting("openvino", kind, 2), batch, timing([took] * 3), 0.5, None)
        for place, batch in enumerate((1, 4))
        for kind, took in ((kind, values[place]) for kind, values in times.items())
    ]
    machine = {"processor": "some processor", "torch": "0"}
    one = Subject("m", None, bundles, (8, 8), 10, 10**9)
    return Benched([one], rows, {}, [], machine, 1.0)


@pytest.mark.parametrize(
    ("int8", "said"),
    [
        ([0.03, 0.08], "int8 is slower than fp32 in openvino: 1.50 to 2.00 times as long; this "
         "processor has no fast int8 products (VNNI); what it saves is size, 2.5 MB instead of "
         "8.0 MB"),
        ([0.01, 0.02], "int8 is faster than fp32 in openvino: 0.50 of its time"),
        ([0.02, 0.0404], "int8 is as fast as fp32 in openvino: 1.00 to 1.01 of its time; this "
         "processor has no fast int8 products (VNNI); what it saves is size, 2.5 MB instead of "
         "8.0 MB"),
        ([0.01, 0.08], "int8 in openvino takes 0.50 to 2.00 of the time of fp32; what it saves is "
         "size, 2.5 MB instead of 8.0 MB"),
    ],
)  # fmt: skip
def test_it_says_what_int8_does(int8, said) -> None:
    assert bench_report.verdicts(crafted(int8))[2:] == [said]


def test_it_says_what_is_quickest_and_what_does_most() -> None:
    found = crafted([0.015, 0.08], [0.016, 0.06])
    quick, many, bf16, int8 = bench_report.verdicts(found)
    assert quick == "quickest answer: openvino int8, 2 threads, 15.0 ms for one picture"
    assert many == "most pictures: openvino fp32, 2 threads, in batches of 4, 100 pictures/s"
    assert bf16 == "bf16 in openvino takes 0.80 to 1.50 of the time of fp32"
    assert "0.75 to 2.00" in int8
    two = found._replace(subjects=[*found.subjects, found.subjects[0]._replace(name="n")])
    assert all(text.startswith("m: ") for text in bench_report.verdicts(two))


def test_the_figure_shows_every_time_and_the_floor(tmp_path) -> None:
    found = crafted([0.03, 0.08])
    (panel,) = bench_report.figure(found).axes
    heights = sorted(bar.get_height() for bar in panel.patches)
    assert heights == pytest.approx([10, 20, 20, 30])
    floors = [line.get_ydata()[0] for line in panel.lines if line.get_linestyle() == "--"]
    assert floors == pytest.approx([10, 5])
    assert [text.get_text() for text in panel.get_xticklabels()] == [
        "2 threads\nbatch 1", "2 threads\nbatch 4",
    ]  # fmt: skip
    assert len(set(bench_report.COLOURS.values())) == len(bench_report.COLOURS)


def test_table_and_figure_are_written_aside_and_replaced(found, tmp_path) -> None:
    bench_report.check_folder(tmp_path / "new" / "out")
    for _ in range(2):
        written = bench_report.write(tmp_path / "new" / "out", found)
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == [
        "bench.csv", "bench.png",
    ]  # fmt: skip
    with written[0].open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["engine"] for row in rows] == [row.setting.engine for row in found.rows]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--out"):
        bench_report.check_folder(tmp_path / "file")


def test_the_exports_are_bundles_that_say_what_they_are(folder, found) -> None:
    kinds = [read_bundle(folder / name).info.precision for name in ("0.onnx", "0-int8.onnx")]
    assert kinds == ["fp32", "int8-dynamic"]
    assert found.subjects[0].bundles[1].size < found.subjects[0].bundles[0].size


def test_the_peak_is_that_of_the_fastest_product() -> None:
    products = [
        peak.Product("slow", lambda: sum(range(200_000)), 10),
        peak.Product("fast", lambda: sum(range(2_000)), 10),
        peak.Product("much", lambda: sum(range(20_000)), 10_000),
    ]
    best = peak.fastest(products, 0.02)
    assert best.product.name == "much"
    assert best.rate > 0


def test_products_multiply_matrices() -> None:
    (one, *_) = peak._float_products(torch.float32)
    answer = one.call()
    assert answer.shape == (32, 32)
    assert not answer.requires_grad
    (exact,) = peak._int8_product(64, 1).call()
    assert exact.dtype == np.int32
    assert exact.shape == (64, 64)
