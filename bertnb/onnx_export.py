"""ONNX.

Written by tools/extract.py from notebooks/16_serving_onnx.md: edit that notebook, not this file.
"""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bertnb.configuration import BertnbError
from bertnb.encoder import BertModel
from bertnb.folders import PretrainedModel
from bertnb.inference import evaluating
from bertnb.serving import Int8Linear, body_of

__all__ = ["OPSET", "OnnxGraph", "INPUTS", "ONNX_BOUND", "export_onnx"]


# %% The code: the graph in the making
OPSET = 20  # the version of the operations: the first with Gelu


def _package(name: str) -> Any:
    """Import onnx or onnxruntime, or say how to get it."""
    try:
        return import_module(name)
    except ImportError as error:
        raise BertnbError(
            f'{name} is not installed: pip install "bertnb[onnx]"'
        ) from error


class OnnxGraph:
    """The nodes and the constants of an ONNX graph, in the making."""

    def __init__(self) -> None:
        self.onnx = _package("onnx")
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, value: Tensor) -> str:
        """Add a constant; return its name."""
        name = f"constant_{len(self.constants)}"
        array = value.detach().cpu().contiguous().numpy()
        tensor = self.onnx.numpy_helper.from_array(array, name)
        self.constants.append(tensor)
        return name

    def add(self, operation: str, *inputs: str, **settings: Any) -> str:
        """Add a node with one output; return the output's name."""
        name = f"{operation}_{len(self.nodes)}"
        node = self.onnx.helper.make_node(
            operation, list(inputs), [name], **settings
        )
        self.nodes.append(node)
        return name

    def numbers(self, *values: int) -> str:
        """Add a row of whole numbers."""
        return self.constant(torch.tensor(values))

    def number(self, value: int) -> str:
        """Add a single whole number."""
        return self.constant(torch.tensor(value))

    def linear(self, x: str, linear: nn.Linear) -> str:
        """(..., K) -> (..., out)."""
        product = self.add("MatMul", x, self.constant(linear.weight.T))
        return self.add("Add", product, self.constant(linear.bias))

    def norm(self, x: str, norm: nn.LayerNorm) -> str:
        """Normalise the last dimension, (4.1) and (4.2)."""
        constants = self.constant(norm.weight), self.constant(norm.bias)
        return self.add(
            "LayerNormalization", x, *constants, axis=-1, epsilon=norm.eps
        )

    def activate(self, x: str, name: str) -> str:
        """Apply the activation that a configuration names."""
        if name in ("silu", "swish"):
            return self.add("Mul", x, self.add("Sigmoid", x))
        if name in ("relu", "tanh"):
            return self.add(name.capitalize(), x)
        shape = "none" if name == "gelu" else "tanh"
        return self.add("Gelu", x, approximate=shape)  # (4.6), (4.7)


INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def _embeddings(graph: OnnxGraph, body: BertModel) -> str:
    """Add (5.1): ids (B, L) -> states (B, L, H)."""
    part = body.embeddings
    places = graph.constant(part.position_embeddings.weight)
    size = graph.add("Shape", INPUTS[0], start=1, end=2)  # L
    total = graph.add("Slice", places, graph.numbers(0), size)  # (L, H)
    tables = {
        INPUTS[0]: part.word_embeddings,
        INPUTS[2]: part.token_type_embeddings,
    }
    for ids, table in tables.items():
        rows = graph.add("Gather", graph.constant(table.weight), ids)
        total = graph.add("Add", rows, total)
    return graph.norm(total, part.LayerNorm)


def _attention(graph: OnnxGraph, x: str, mask: str, part: Any) -> str:
    """Add (2.1): states (B, L, H) and the mask (B, 1, 1, L) -> (B, L, H)."""
    heads, size = part.num_heads, part.query.in_features
    split = graph.numbers(0, 0, heads, size // heads)

    def projected(linear: nn.Linear, order: list[int]) -> str:
        flat = graph.add("Reshape", graph.linear(x, linear), split)
        return graph.add("Transpose", flat, perm=order)

    query = projected(part.query, [0, 2, 1, 3])  # (B, A, L, d)
    key = projected(part.key, [0, 2, 3, 1])  # (B, A, d, L)
    value = projected(part.value, [0, 2, 1, 3])
    scale = graph.constant(torch.tensor((size / heads) ** -0.5))
    scores = graph.add("Mul", graph.add("MatMul", query, key), scale)  # (1.3)
    low = graph.constant(torch.tensor(torch.finfo(torch.float32).min))
    weights = graph.add("Softmax", graph.add("Where", mask, scores, low))
    none = graph.constant(torch.zeros(()))
    weights = graph.add("Where", mask, weights, none)  # (1.7)
    context = graph.add("MatMul", weights, value)
    context = graph.add("Transpose", context, perm=[0, 2, 1, 3])
    merged = graph.add("Reshape", context, graph.numbers(0, 0, size))
    return graph.linear(merged, part.output)


def _layers(graph: OnnxGraph, body: BertModel) -> str:
    """Add the whole body, (6.2): the last states (B, L, H)."""
    x = _embeddings(graph, body)
    mask = graph.add("Cast", INPUTS[1], to=graph.onnx.TensorProto.BOOL)
    mask = graph.add("Unsqueeze", mask, graph.numbers(1, 2))  # (B, 1, 1, L)
    layers: Any = body.encoder.layer
    for layer in layers:
        attended = _attention(graph, x, mask, layer.attention)
        y = graph.norm(graph.add("Add", x, attended), layer.attention_norm)
        part = layer.feed_forward
        inner = graph.linear(y, part.intermediate)
        inner = graph.activate(inner, body.config.hidden_act)
        added = graph.add("Add", y, graph.linear(inner, part.output))
        x = graph.norm(added, layer.output_norm)  # (6.1)
    return x


def _outputs(graph: OnnxGraph, model: Any) -> dict[str, str]:
    """Add the body and the heads; return what is read, by the output's name."""
    body, found = body_of(model), dict[str, str]()
    states, pooled = _layers(graph, body), ""
    if body.pooler is not None:  # (6.3)
        first = graph.add("Gather", states, graph.number(0), axis=1)  # (B, H)
        pooled = graph.add("Tanh", graph.linear(first, body.pooler.dense))
    if model is body:
        found["last_hidden_state"] = states
        return found | ({"pooler_output": pooled} if pooled else {})
    both = hasattr(model, "masked_lm") and hasattr(model, "next_sentence")
    if hasattr(model, "masked_lm"):  # (8.2)
        head = model.masked_lm
        act = body.config.hidden_act
        words = graph.activate(graph.linear(states, head.dense), act)
        words = graph.norm(words, head.LayerNorm)
        table = graph.constant(body.embeddings.word_embeddings.weight.T)
        words = graph.add("MatMul", words, table)
        name = "prediction_logits" if both else "logits"
        found[name] = graph.add("Add", words, graph.constant(head.bias))
    if hasattr(model, "next_sentence"):
        name = "seq_relationship_logits" if both else "logits"
        found[name] = graph.linear(pooled, model.next_sentence)
    if hasattr(model, "classifier"):  # of the row, or of each token
        found["logits"] = graph.linear(pooled or states, model.classifier)
    if hasattr(model, "qa_outputs"):
        scores = graph.linear(states, model.qa_outputs)  # (B, L, 2)
        for i, name in enumerate(("start_logits", "end_logits")):
            found[name] = graph.add("Gather", scores, graph.number(i), axis=2)
    return found


ONNX_BOUND = 1e-4  # of the largest output, or of 1 where that is less


def export_onnx(model: nn.Module, path: str | Path) -> float:
    """Write a model as an ONNX file, checked; return the largest difference.

    The file takes `input_ids`, `attention_mask` (0 for padding) and
    `token_type_ids`, int64 (B, L), all of them, of any B and of any L up to
    `max_position_embeddings`, and gives float32 outputs that have the names
    of the model's. Its metadata hold the configuration, as JSON, under
    "config". It needs `onnx` and `onnxruntime`.

    Args:
        model: a `BertModel` or a model with a head; float32.
        path: the file; its folder is made where it is missing.

    Returns:
        The largest difference between the outputs of the file, as
        `onnxruntime` computes them, and the model's.

    Raises:
        TypeError: `model` holds no `BertModel`, has an unknown head, or is
            an int8 or 16-bit model.
        IsADirectoryError: `path` is a folder.
        BertnbError: a package is missing, or the two differ by more than
            1e-4 of the largest output, or of 1 where that is less; then there
            is no file.
        ValueError: the weights are over the 2 GB that such a file may hold.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"path={path} is a folder: name a file in it")
    _check_exportable(model)
    graph = OnnxGraph()
    runtime = _package("onnxruntime")
    names = _outputs(graph, model)
    if not names:
        raise TypeError(
            f"model is of type {type(model).__name__}, whose head is unknown "
            "here: export its body, model.bert"
        )
    made = _onnx_model(graph, names, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        unfinished.write_bytes(made.SerializeToString())
        difference = _difference(runtime, unfinished, model)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return difference


def _check_exportable(model: nn.Module) -> None:
    body_of(model)
    if any(isinstance(part, Int8Linear) for part in model.modules()):
        raise TypeError(
            "model is an int8 model: export the model that quantize was given"
        )
    kinds = {p.dtype for p in model.parameters()}
    if kinds != {torch.float32}:
        raise TypeError(
            f"model has weights of {', '.join(map(str, kinds))}: expected "
            "float32, as after model.float()"
        )
    size = 4 * sum(p.numel() for p in model.parameters())
    if size > 2_000_000_000:
        raise ValueError(
            f"model has {size} bytes of weights: an ONNX file holds at most 2 GB"
        )


def _onnx_model(
    graph: OnnxGraph, names: dict[str, str], model: nn.Module
) -> Any:
    """Close the graph: name its inputs and outputs, and add the configuration."""
    helper, kinds = graph.onnx.helper, graph.onnx.TensorProto
    for name, value in names.items():
        graph.nodes.append(helper.make_node("Identity", [value], [name]))
    whole = helper.make_graph(
        graph.nodes,
        type(model).__name__,
        [
            helper.make_tensor_value_info(
                name, kinds.INT64, ["batch", "length"]
            )
            for name in INPUTS
        ],
        [
            helper.make_tensor_value_info(name, kinds.FLOAT, None)
            for name in names
        ],
        graph.constants,
    )
    made = helper.make_model(
        whole,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=9,  # the one of that opset; older runtimes read no newer
    )
    config: dict[str, Any] = body_of(model).config.to_dict()
    if isinstance(model, PretrainedModel):
        config |= model.extra_config()
    helper.set_model_props(made, {"config": json.dumps(config)})
    return made


def _difference(runtime: Any, file: Path, model: nn.Module) -> float:
    """Run the file and the model on random rows; return how they differ."""
    config = body_of(model).config
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(
        str(file), options, providers=["CPUExecutionProvider"]
    )
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for rows, length in ((1, 1), (3, min(11, config.max_position_embeddings))):
        size = (rows, length)
        sizes = config.vocab_size, 2, config.type_vocab_size
        batch = {
            name: torch.randint(limit, size, generator=generator)
            for name, limit in zip(INPUTS, sizes, strict=True)
        }
        batch["attention_mask"][:, 0] = 1
        theirs = session.run(None, {k: v.numpy() for k, v in batch.items()})
        device = next(model.parameters()).device
        with evaluating(model):
            output = model(**{k: v.to(device) for k, v in batch.items()})
        for node, found in zip(session.get_outputs(), theirs, strict=True):
            expected = getattr(output, node.name).cpu()
            gap = (torch.from_numpy(found) - expected).abs().max().item()
            if not gap <= ONNX_BOUND * max(1.0, expected.abs().max().item()):
                raise BertnbError(
                    f"{node.name} of the ONNX file differs by {gap:.1e} from "
                    "the model's: no file was written"
                )
            worst = max(worst, gap)
    return worst
