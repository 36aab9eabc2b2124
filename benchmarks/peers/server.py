"""An inference engine in a process of its own, driven through a pipe: it runs in the virtual environment of a peer.

    python server.py ENGINE model.onnx input.npy THREADS

ENGINE is a key of ENGINES, or file.py:function for one of your own: a function of the model's path, the input and the
threads that returns a function without arguments, which computes and returns the outputs. Commands come as lines:
`turn SECONDS` answers the seconds per call of as many calls as fit, `output FILE` writes what the model computes.
Needs numpy and the engine alone.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
import time

import numpy as np


class Skip(Exception):
    """The engine is here, but does not do this."""


def onnxruntime(path, x, threads):
    """ONNX Runtime, float32."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the others take turns on these cores
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})[0]


def onnxruntime_int8(path, x, threads):
    """ONNX Runtime with weights and activations of 8 bits, their ranges taken from the input."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Once(CalibrationDataReader):
        def __init__(self):
            self.left = [{"input": x}]

        def get_next(self):
            return self.left.pop() if self.left else None

    quantized = f"{path}.int8.onnx"
    quantize_static(path, quantized, Once(), quant_format=QuantFormat.QDQ, per_channel=True)
    return onnxruntime(quantized, x, threads)


def openvino(path, x, threads, precision="f32", model=None):
    """OpenVINO, in the given precision."""
    import openvino as ov

    core = ov.Core()
    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Skip("this processor has no bf16 instructions")
    compiled = core.compile_model(model or core.read_model(path), "CPU", {**hints, "PERFORMANCE_HINT": "LATENCY"})
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(np.ascontiguousarray(x)))

    def call():
        request.infer()
        return request.get_output_tensor().data

    return call


def openvino_bf16(path, x, threads):
    return openvino(path, x, threads, "bf16")


def openvino_int8(path, x, threads):
    """OpenVINO after NNCF's quantisation, ranges taken from the input."""
    import nncf
    import openvino as ov

    images = [x[i % len(x)][None].repeat(len(x), 0) for i in range(4)]
    quantized = nncf.quantize(ov.Core().read_model(path), nncf.Dataset(images), subset_size=len(images))
    return openvino(path, x, threads, model=quantized)


def deepsparse(path, x, threads):
    """Neural Magic's DeepSparse."""
    from deepsparse import Engine

    engine = Engine(model=path, batch_size=len(x), num_cores=threads)
    return lambda: engine.run([x])[0]


ENGINES = {
    "onnxruntime": onnxruntime,
    "onnxruntime int8": onnxruntime_int8,
    "openvino": openvino,
    "openvino bf16": openvino_bf16,
    "openvino int8": openvino_int8,
    "deepsparse": deepsparse,
}


def named(engine):
    """Return the engine of this name, or the function of file.py:function."""
    if engine in ENGINES:
        return ENGINES[engine]
    file, _, function = engine.rpartition(":")
    spec = importlib.util.spec_from_file_location("engine", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def version(package):
    """Return the version of a package; an empty text for a function of a file."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def turn(call, least):
    """Return the seconds per call of as many calls as fit."""
    start, calls, spent = time.perf_counter(), 0, 0.0
    while not calls or spent < least:
        call()
        calls += 1
        spent = time.perf_counter() - start
    return spent / calls


def main():
    """Load the model, say whether that went well, then do what comes."""
    engine, path, inputs, threads = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer

    def answer(**what):
        print(json.dumps(what), file=answers, flush=True)

    try:
        call = named(engine)(path, np.load(inputs), int(threads))
        call()
    except Exception as error:  # an engine may raise anything; the benchmark names it and goes on
        lines = str(error).strip().splitlines() or [""]
        return answer(skipped=f"{'' if isinstance(error, Skip) else type(error).__name__ + ': '}{lines[-1][:200]}")
    answer(ready=True, version=version(engine.partition(" ")[0]))
    for line in sys.stdin:
        command, _, rest = line.strip().partition(" ")
        if command == "turn":
            answer(seconds=turn(call, float(rest)))
        else:
            np.save(rest, np.asarray(call()))
            answer(saved=rest)


if __name__ == "__main__":
    main()
