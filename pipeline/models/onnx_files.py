"""PyTorch modules as ONNX files: written, made smaller, run. What is in them is others' business."""

import importlib
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core.errors import PipelineError

OPSET = 20


def need(*packages: str) -> None:
    """Raises PipelineError where one of these packages is missing, saying what to install."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError:
            raise PipelineError(
                f'no package {package}. Run `pip install "extrahead[export]"` first.'
            ) from None


def write_onnx(
    module: nn.Module, example: Tensor, file: Path, given: str, names: list[str]
) -> None:
    """Write a module of one input and one or more outputs, for batches of any size.

    example: a batch of at least 2, from which the shapes are taken; given: the input's name;
    names: the outputs'. Not `embedding` for a text tower: torch names a value inside so already,
    and onnxruntime refuses the file.
    """
    need("onnx", "onnxscript")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names every operator it meets
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (example,),
            file,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[given],
            output_names=names,
            opset_version=OPSET,
            external_data=False,
            verbose=False,
        )


def run_onnx(file: Path, given: np.ndarray) -> Any:
    """All outputs of a file of one input, by onnxruntime on the CPU."""
    need("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: given})


def add_metadata(file: Path, facts: dict[str, str]) -> None:
    """Facts for `session.get_modelmeta().custom_metadata_map`."""
    import onnx

    model = onnx.load(file)
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, file)


def quantise(file: Path, out: Path) -> None:
    """An int8 copy: weights quantised per channel, activations as they come.

    Raises PipelineError for what is no ONNX file.
    """
    need("onnx", "onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises a preparation that torch's exporter has done
    try:
        quantize_dynamic(str(file), str(out), weight_type=QuantType.QInt8, per_channel=True)
    except Exception as error:  # onnx and onnxruntime share no base below Exception
        raise PipelineError(f"{file} was not quantised: {error}") from None
    finally:
        root.setLevel(level)


def store_as_float16(file: Path, out: Path) -> None:
    """A copy whose weights are stored as float16 and cast up when it is loaded.

    Half the bytes and the same float32 arithmetic: onnxruntime crashes on what its own converter
    makes of a text tower, whose mask holds -inf.
    """
    need("onnx")
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(file)
    weights, casts = [], []
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type == TensorProto.FLOAT and values.ndim > 1 and np.isfinite(values).all():
            small = f"{tensor.name}.float16"
            weights.append(numpy_helper.from_array(values.astype(np.float16), small))
            casts.append(helper.make_node("Cast", [small], [tensor.name], to=TensorProto.FLOAT))
        else:
            weights.append(tensor)
    nodes = [*casts, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.initializer.extend(weights)
    model.graph.node.extend(nodes)
    onnx.save(model, out)
