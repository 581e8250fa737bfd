# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime and OpenVINO behind one call: uint8 pictures in, probabilities out.

Both run on the processor with a given number of threads. When a bundle is opened, the graph's own
names, types and shapes are compared with what the bundle says of itself, so that a file whose graph
and description do not belong together is refused before it answers anything. This module does not
import torch.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np

from crosspatch.deploy.bundle import (
    INPUT,
    OUTPUT,
    PATCHES,
    Bundle,
    BundleInfo,
    needed,
    openvino_core,
)
from crosspatch.errors import DataError, UsageError, near

ENGINES = ("onnxruntime", "openvino", "torch")
"""What computes; `torch` runs a run folder's model (`torch_engine`), never a bundle."""

TOLERANCE = 1e-3
"""Largest difference of a probability in fp32; engines sum in another order than torch does."""

DTYPES: dict[str, str] = {
    "tensor(uint8)": "uint8",
    "tensor(float)": "float32",
    "u8": "uint8",
    "f32": "float32",
}
"""What ONNX Runtime and OpenVINO call the types that a bundle has."""


class Setting(NamedTuple):
    """engine: one of ENGINES; precision: fp32, bf16 or int8, what it computes in; threads."""

    engine: str
    precision: str
    threads: int

    def describe(self) -> str:
        """`onnxruntime int8, 4 threads`."""
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        return f"{self.engine} {self.precision}, {threads}"


class Engine(Protocol):
    """Something that answers pictures. One thread at a time may call `run`."""

    setting: Setting

    def run(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) of the model's size -> probabilities (B, K) float32."""
        ...


class BundleEngine(Engine, Protocol):
    """What runs a bundle; where that was exported with `--explain` it can tell more."""

    def explain(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (B, H, W, 3) -> probabilities (B, K), and what each patch gave to the logit of the
        most probable class, (B, rows, columns), both float32. Raises UsageError for a bundle
        without such scores."""
        ...


class Port(NamedTuple):
    """One input or output of a graph; shape: None where any length goes."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    def describe(self) -> str:
        """`image uint8 (any, 224, 224, 3)`."""
        sides = ", ".join("any" if side is None else str(side) for side in self.shape)
        return f"{self.name} {self.dtype} ({sides})"


def precision_of(info: BundleInfo) -> str:
    """What a bundle computes in: fp32 or int8."""
    return "fp32" if info.precision == "fp32" else "int8"


def available(bundle: Bundle) -> list[tuple[str, str]]:
    """(engine, precision) that this machine can run `bundle` with; bf16 is named last."""
    own = precision_of(bundle.info)
    found = []
    if bundle.format == "onnx" and _importable("onnxruntime"):
        found.append(("onnxruntime", own))
    if _importable("openvino"):
        found.append(("openvino", own))
        if own == "fp32" and computes_bf16():
            found.append(("openvino", "bf16"))
    return found


def computes_bf16() -> bool:
    """Whether OpenVINO says that this processor has products in bfloat16."""
    return "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


_opened: list[str] = []


def opened() -> bool:
    """Whether an engine was opened in this process: it has threads and locks, which a fork would
    copy half-way."""
    return bool(_opened)


def open_engine(
    bundle: Bundle, engine: str = "onnxruntime", precision: str | None = None, threads: int = 1
) -> BundleEngine:
    """Opens a bundle for running. precision: None for that of the file.

    Raises UsageError for an engine or a precision that cannot be had with this bundle on this
    machine, DataError when the graph is damaged or is not what its description says.
    """
    if engine not in ENGINES[:2]:
        hint = near(engine, ENGINES[:2], 1) or ENGINES[0]
        raise UsageError(
            f"engine {engine!r} for {bundle.path}",
            f"a bundle runs on {' or '.join(ENGINES[:2])}; torch runs the folder of a run",
            f"--engine {hint}",
        )
    if threads < 1:
        raise UsageError(f"{threads} threads", "one thread or more", "leave the number out")
    own = precision_of(bundle.info)
    setting = Setting(engine, precision or own, threads)
    if setting.precision == "bf16":
        _refuse_bf16(bundle, engine)
    elif setting.precision != own:
        raise UsageError(
            f"{setting.precision} asked of {bundle.path}, which is {bundle.info.precision}",
            f"it computes in {own}",
            f"crosspatch export RUN {'--int8' if own == 'fp32' else ''}".rstrip(),
        )
    _opened.append(engine)
    kind = OnnxRuntimeEngine if engine == "onnxruntime" else OpenVinoEngine
    return kind(bundle, setting)


def _refuse_bf16(bundle: Bundle, engine: str) -> None:
    """Raises UsageError unless `bundle` can be computed in bfloat16 here."""
    if engine != "openvino":
        problem = f"bf16 is a setting of openvino, not of {engine}"
    elif bundle.info.precision != "fp32":
        problem = f"{bundle.path} is {bundle.info.precision} already"
    elif not computes_bf16():
        problem = "this processor has no products in bf16"
    else:
        return
    raise UsageError(
        problem,
        "bf16: an fp32 bundle, OpenVINO, and a processor with AVX-512 BF16 or AMX",
        f"--engine {engine}",
    )


class OnnxRuntimeEngine:
    """A bundle .onnx in ONNX Runtime, on the processor."""

    def __init__(self, bundle: Bundle, setting: Setting) -> None:
        runtime = needed("onnxruntime")
        if bundle.format != "onnx":
            raise UsageError(
                f"{bundle.path} is a bundle of OpenVINO",
                "ONNX Runtime reads bundles .onnx",
                "--engine openvino",
            )
        options = runtime.SessionOptions()
        options.intra_op_num_threads = setting.threads
        options.inter_op_num_threads = 1
        options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        try:
            self._session = runtime.InferenceSession(
                str(bundle.path), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime's errors have no common base
            _refuse_graph(bundle, "ONNX Runtime", error)
        self.setting, self._bundle = setting, bundle
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        _compare(bundle, [_onnx_port(one) for one in inputs], [_onnx_port(one) for one in outputs])

    def run(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) -> probabilities (B, K) float32. Raises DataError where the graph
        cannot be computed."""
        given = {INPUT: np.ascontiguousarray(images)}
        try:
            answer = self._session.run([OUTPUT], given)[0]
        except Exception as error:  # ONNX Runtime's errors have no common base
            _refuse_graph(self._bundle, "ONNX Runtime", error, "run")
        return _whole(answer, len(images), len(self._bundle.info.classes))

    def explain(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (B, H, W, 3) -> probabilities (B, K), scores of the patches (B, rows, columns)."""
        _check_explains(self._bundle)
        given = {INPUT: np.ascontiguousarray(images)}
        try:
            answer, patches = self._session.run([OUTPUT, PATCHES], given)
        except Exception as error:  # ONNX Runtime's errors have no common base
            _refuse_graph(self._bundle, "ONNX Runtime", error, "run")
        return _whole(answer, len(images), len(self._bundle.info.classes)), patches


class OpenVinoEngine:
    """A bundle in OpenVINO, on the processor. bf16 only where the setting says so."""

    def __init__(self, bundle: Bundle, setting: Setting) -> None:
        core = openvino_core()
        hint = "bf16" if setting.precision == "bf16" else "f32"
        config = {
            "INFERENCE_NUM_THREADS": setting.threads,
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # several processes would be pinned to the same cores
        }
        try:
            model = core.read_model(bundle.path)
            _compare(
                bundle,
                [_openvino_port(one) for one in model.inputs],
                [_openvino_port(one) for one in model.outputs],
            )
            self._request = core.compile_model(model, "CPU", config).create_infer_request()
        except RuntimeError as error:
            _refuse_graph(bundle, "OpenVINO", error)
        self.setting, self._bundle = setting, bundle

    def run(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, 3) -> probabilities (B, K) float32. Raises DataError where the graph
        cannot be computed."""
        try:
            self._request.infer({INPUT: np.ascontiguousarray(images)}, share_inputs=True)
        except RuntimeError as error:
            _refuse_graph(self._bundle, "OpenVINO", error, "run")
        answer = self._request.get_tensor(OUTPUT).data
        return _whole(answer.copy(), len(images), len(self._bundle.info.classes))

    def explain(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (B, H, W, 3) -> probabilities (B, K), scores of the patches (B, rows, columns)."""
        _check_explains(self._bundle)
        return self.run(images), self._request.get_tensor(PATCHES).data.copy()


def _check_explains(bundle: Bundle) -> None:
    if not bundle.info.explains:
        raise UsageError(
            f"scores of patches from {bundle.path}",
            "a bundle that has them as its second output",
            "crosspatch export RUN --explain",
        )


def _refuse_graph(bundle: Bundle, engine: str, error: Exception, what: str = "load") -> NoReturn:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raise DataError(
        f"{engine} cannot {what} {bundle.path} ({(lines or [type(error).__name__])[-1][:200]})",
        "a whole bundle that crosspatch wrote",
        "export the run again, or update the engine",
    ) from error


def _onnx_port(one: Any) -> Port:
    shape = tuple(side if isinstance(side, int) else None for side in one.shape)
    kind = str(one.type)
    return Port(one.name, DTYPES.get(kind, kind), shape)


def _openvino_port(one: Any) -> Port:
    shape = tuple(None if side.is_dynamic else side.get_length() for side in one.partial_shape)
    kind = str(one.element_type.get_type_name())
    names = one.get_names()
    name = next((known for known in (INPUT, OUTPUT, PATCHES) if known in names), one.get_any_name())
    return Port(name, DTYPES.get(kind, kind), shape)


def _compare(bundle: Bundle, inputs: list[Port], outputs: list[Port]) -> None:
    """Raises DataError when the graph is not that of the description."""
    info = bundle.info
    taken = [Port(INPUT, "uint8", (None, *info.preprocess.size, 3))]
    given = [Port(OUTPUT, "float32", (None, len(info.classes)))]
    if info.explains:  # how many rows and columns of patches, only the graph says
        second = outputs[1].shape if len(outputs) > 1 else ()
        most = info.preprocess.size
        fits = len(second) == 3 and all(
            0 < (n or 0) <= m for n, m in zip(second[1:], most, strict=True)
        )
        sides = second[1:] if fits else (None, None)
        given.append(Port(PATCHES, "float32", (None, *sides)))
    for found, wanted, what in ((inputs, taken, "takes"), (outputs, given, "gives")):
        if found != wanted:
            said, told = (", ".join(port.describe() for port in ports) for ports in (found, wanted))
            raise DataError(
                f"the graph in {bundle.path} {what} {said or 'nothing'}",
                f"its description says {told}",
                "export the run again",
            )


def _whole(answer: np.ndarray, pictures: int, classes: int) -> np.ndarray:
    """The answer itself, or DataError when it has another shape than was promised."""
    if answer.shape != (pictures, classes):
        raise DataError(
            f"the engine gave probabilities of shape {answer.shape} for {pictures} pictures",
            f"({pictures}, {classes})",
            "export the run again",
        )
    return answer


@cache
def _importable(name: str) -> bool:
    try:
        needed(name)
    except UsageError:
        return False
    return True
