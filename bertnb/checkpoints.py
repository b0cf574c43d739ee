"""Checkpoints.

Written by tools/extract.py from notebooks/15_checkpoints.md: edit that notebook, not this file.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bertnb.configuration import BertConfig, BertnbError, locate, read_json
from bertnb.folders import PretrainedModel

__all__ = [
    "Words",
    "GENERATOR",
    "ONES",
    "crc32c",
    "masked_crc32c",
    "MAGIC",
    "FOOTER",
    "read_table",
    "DTYPES",
    "read_tf_checkpoint",
    "TF_NAMES",
    "TF_IGNORED",
    "hf_name_from_tf",
    "from_tf_checkpoint",
    "resize_vocabulary",
]


# %% A remainder is a good check sum
Words = NDArray[np.uint32]
GENERATOR = np.uint32(0x82F63B78)  # of (15.1): x^31 is the lowest bit
ONES = 0xFFFFFFFF


def _rests_of_16_bits() -> Words:
    """Return what 16 steps of the division make of each 16-bit number."""
    rests = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(16):
        rests = (rests >> 1) ^ (rests & 1) * GENERATOR
    return rests


_AFTER_16_BITS = _rests_of_16_bits()


def _after_a_word(rests: Words) -> Words:
    """Go on by 32 bits in every lane: times x^32, modulo the generator."""
    for _ in range(2):
        rests = (rests >> 16) ^ _AFTER_16_BITS[rests & 0xFFFF]
    return rests


def _apply(shift: Words, rests: Words) -> Words:
    """Apply a linear map, given as what it makes of the 32 single bits."""
    bits = rests[:, None] >> np.arange(32, dtype=np.uint32) & 1
    images: Words = np.bitwise_xor.reduce(bits * shift, axis=1)
    return images


def crc32c(data: bytes) -> int:
    """Return the check sum (15.1) that RFC 3720 calls CRC32C.

    The bytes are cut into lanes of one length, which are divided side by
    side; then (15.2) joins their rests two by two.
    """
    lane = 8 if len(data) < 4096 else 256  # words of four bytes
    pad = 4 * lane - len(data) % (4 * lane)  # zeros in front change no rest
    filled = np.zeros(pad + len(data), np.uint8)
    filled[pad:] = np.frombuffer(data, np.uint8)
    filled[pad : pad + 4] ^= 255  # the 32 ones that the division begins with
    lanes = np.ascontiguousarray(filled.view("<u4").reshape(-1, lane).T)
    rests = np.zeros(lanes.shape[1], np.uint32)
    shift = np.uint32(1) << np.arange(32, dtype=np.uint32)
    for words in lanes:
        rests = _after_a_word(rests ^ words)
        shift = _after_a_word(shift)
    while len(rests) > 1:
        if len(rests) % 2:
            rests = np.append(np.zeros(1, np.uint32), rests)
        rests = _apply(shift, rests[::2]) ^ rests[1::2]  # (15.2)
        shift = _apply(shift, shift)
    unused = ONES >> 8 * min(len(data), 4)  # of the ones, in a short message
    return int(rests[0]) ^ unused ^ ONES


def masked_crc32c(data: bytes) -> int:
    """Return the check sum as TensorFlow stores it, (15.3)."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & ONES  # modulo 2^32


# %% The files of 2018
MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
FOOTER = 48  # bytes: two handles, zeros, the magic number


def read_table(file: Path) -> dict[bytes, bytes]:
    """Return the keys and values of an SSTable, such as a `.index` file.

    Raises:
        FileNotFoundError: there is no such file.
        BertnbError: the file is cut short, damaged, compressed, or no table.
    """
    data = file.read_bytes()
    if len(data) < FOOTER or data[-8:] != MAGIC:
        raise BertnbError(
            f"{file} is no TensorFlow index, or cut short: its last 8 bytes "
            f"are {data[-8:].hex()}; expected {MAGIC.hex()}"
        )
    table: dict[bytes, bytes] = {}
    last = b""
    try:
        meta, at = _handle(data, len(data) - FOOTER)
        index, at = _handle(data, at)
        if any(data[at:-8]):
            raise IndexError("the footer")
        _block(data, *meta, file)
        for _, handle in _entries(_block(data, *index, file)):
            block, _ = _handle(handle, 0)
            for key, value in _entries(_block(data, *block, file)):
                if table and key <= last:
                    raise IndexError(f"the order of its keys, at {key!r}")
                table[key], last = value, key
    except IndexError as error:
        raise BertnbError(f"{file} is damaged: {error}") from error
    return table


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at a byte, and where it ends: 7 bits a
    byte, the lowest first; the eighth says that more follow.
    """
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            if shift > 7 and not data[at - 1]:
                raise IndexError("a number that is longer than it needs")
            return value, at


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Return where a block starts and its size, and where the handle ends."""
    start, at = _varint(data, at)
    size, at = _varint(data, at)
    return (start, size), at


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _block(data: bytes, start: int, size: int, file: Path) -> bytes:
    """Return a block's content, once its check sum is right."""
    end = start + size + 1  # behind the byte that tells the compression
    if end + 4 > len(data) - FOOTER:
        raise IndexError(f"a block of {size} bytes at {start}")
    if masked_crc32c(data[start:end]) != _number(data[end : end + 4]):
        raise BertnbError(
            f"{file} is damaged: the block at byte {start} has another CRC"
        )
    if data[end - 1]:
        raise BertnbError(
            f"{file}: the block at byte {start} is compressed, and "
            "TensorFlow's checkpoints are not"
        )
    return data[start : end - 1]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values; a key says how much it shares with the last."""
    end = len(block) - 4 * (_number(block[-4:]) + 1)
    at, key = 0, b""
    while at < end:
        shared, at = _varint(block, at)
        fresh, at = _varint(block, at)
        size, at = _varint(block, at)
        key = key[:shared] + block[at : at + fresh]
        at += fresh + size
        if len(key) != shared + fresh or at > end:
            raise IndexError("an entry")
        yield key, block[at - size : at]
    if at != end or end < 0:
        raise IndexError("the end of a block")


# %% What an entry says
DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    9: torch.int64,
    14: torch.bfloat16,
    19: torch.float16,
}


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the numbers of a protocol buffer's fields, and their values."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind, size = tag & 7, {1: 8, 5: 4}.get(tag & 7, 0)
        if kind == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind not in (1, 5):
            raise IndexError(f"a field of kind {kind}")
        content = message[at : at + size]
        at += size
        if len(content) != size:
            raise IndexError(f"field {tag >> 3}")
        yield tag >> 3, content if kind == 2 else _number(content)


def read_tf_checkpoint(
    prefix: str | Path, ignore: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Return the tensors of a TensorFlow checkpoint, by TensorFlow's names.

    Every byte that is returned has passed its check sum.

    Args:
        prefix: the files' common beginning, such as `folder/bert_model.ckpt`.
        ignore: parts of names; a tensor whose name, cut at `/`, has one of
            them is not read.

    Raises:
        FileNotFoundError: there is no index.
        BertnbError: index or data are damaged or incomplete, or hold what
            no BERT has.
    """
    file = Path(f"{prefix}.index")
    table = read_table(file)
    tensors: dict[str, Tensor] = {}
    try:
        header = dict(_fields(table.pop(b"")))
        if header.get(2, 0) != 0:
            raise IndexError("numbers with the highest byte first")
        for key, entry in table.items():
            name = key.decode()
            if not set(name.split("/")) & set(ignore):
                tensors[name] = _read_tensor(
                    f"{file}: {name}", str(prefix), header.get(1, 0), entry
                )
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise BertnbError(f"{file} is no index of tensors: {error}") from error
    return tensors


def _read_tensor(where: str, prefix: str, shards: int, entry: bytes) -> Tensor:
    """Return the tensor that an entry of the index describes."""
    absent = {1: 0, 2: b"", 3: 0, 4: 0, 5: 0, 6: 0}
    found: dict[int, Any] = absent | dict(_fields(entry))
    kind, dims, shard, offset, size, crc = (found[n] for n in absent)
    if kind not in DTYPES or 7 in found:
        raise BertnbError(
            f"{where} is not read: of type {kind}, or cut into slices"
        )
    shape = [dict(_fields(d)).get(1, 0) for n, d in _fields(dims) if n == 2]
    file = Path(f"{prefix}.data-{shard:05}-of-{shards:05}")
    if not file.is_file():
        raise BertnbError(f"{where} is in {file.name}, which is not there")
    if offset + size > file.stat().st_size:
        raise BertnbError(
            f"{where} ends behind {file.name}, which is cut short"
        )
    with file.open("rb") as stream:
        stream.seek(offset)
        content = stream.read(size)
    if masked_crc32c(content) != crc:
        raise BertnbError(f"{where} has another CRC in {file.name}: damaged")
    dtype = DTYPES[kind]
    if not size or size != prod(shape) * dtype.itemsize:
        raise BertnbError(f"{where} has {size} bytes for the shape {shape}")
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)


# %% The same numbers under other names
# patterns in TensorFlow's names -> Hugging Face's, one after the other
TF_NAMES = (
    (r"/", "."),
    (r"^output_", "classifier.output_"),
    (r"^cls\.squad\.", "qa_outputs."),
    (r"\.layer_(\d+)\.", r".layer.\1."),
    (r"_embeddings$", "_embeddings.weight"),
    (r"\.(kernel|gamma|output_weights)$", ".weight"),
    (r"\.(beta|output_bias)$", ".bias"),
)
# what a checkpoint holds of the run that wrote it: the optimiser's memory
TF_IGNORED = ("adam_m", "adam_v", "global_step")


def hf_name_from_tf(name: str) -> str:
    """Return what Hugging Face calls TensorFlow's variable `name`."""
    for pattern, new in TF_NAMES:
        name = re.sub(pattern, new, name)
    return name


_Model = TypeVar("_Model", bound=PretrainedModel)


def from_tf_checkpoint(
    model_class: type[_Model],
    folder_or_prefix: str | Path,
    ignore: tuple[str, ...] = (),
    **head_arguments: Any,
) -> _Model:
    """Build a model from a TensorFlow checkpoint as Google released them.

    Args:
        model_class: what to build, such as `BertForPreTraining`.
        folder_or_prefix: the unpacked folder, or `folder/bert_model.ckpt`
            where it holds several; `bert_config.json` lies beside.
        ignore: parts of names to leave out besides `TF_IGNORED`.
        head_arguments: what the model's head needs beside the configuration.

    Raises:
        FileNotFoundError: there is no index, or no `bert_config.json`.
        ValueError: the folder holds several checkpoints.
        BertnbError: a file is damaged, or the weights do not fit.
    """
    prefix = Path(folder_or_prefix)
    if prefix.is_dir():
        found = sorted(prefix.glob("*.index"))
        if len(found) != 1:
            raise (ValueError if found else FileNotFoundError)(
                f"{prefix} holds {[path.name for path in found]}; expected one "
                ".index, or a prefix such as folder/bert_model.ckpt"
            )
        prefix = found[0].with_suffix("")
    file = locate(prefix.parent, "bert_config.json")
    config = BertConfig.from_json_file(file)
    arguments = head_arguments or model_class.saved_head_arguments(
        read_json(file)
    )
    tensors = read_tf_checkpoint(prefix, TF_IGNORED + tuple(ignore))
    weights = {  # the kernels turned, (15.4)
        hf_name_from_tf(n): t.T if n.endswith("kernel") and t.dim() == 2 else t
        for n, t in tensors.items()
    }
    model = model_class(config, **arguments)
    model.load_hf_weights(weights, f"{prefix}.index")
    return model.eval()


# %% New words for a trained model
def resize_vocabulary(
    model: PretrainedModel,
    size: int,
    generator: torch.Generator | None = None,
    shrink: bool = False,
) -> None:
    """Give a model, in place, a vocabulary of another size.

    The old words keep their rows. New rows start as the original starts all,
    (4.11), and new biases at 0. The output layer is the table itself, so the
    two stay one. The changed parameters are new objects: make the optimiser
    afterwards.

    Args:
        model: any model of this package.
        size: the new V, such as `tokenizer.vocab_size`.
        generator: where the new rows come from; None: torch's own.
        shrink: whether fewer words than before are meant.

    Raises:
        ValueError: `size` is no size, or drops words although `shrink` is
            not set, or the padding's id among them.
    """
    config = replace(model.config, vocab_size=size)
    if size < model.config.vocab_size and not shrink:
        raise ValueError(
            f"size={size} drops the last {model.config.vocab_size - size} "
            "words and what was learnt of them; if that is meant: shrink=True"
        )
    body: Any = getattr(model, "bert", model)
    head: Any = getattr(model, "masked_lm", None)
    table = body.embeddings.word_embeddings
    start = torch.empty(size, config.hidden_size)
    std = config.initializer_range
    nn.init.trunc_normal_(
        start, std=std, a=-2 * std, b=2 * std, generator=generator
    )
    table.weight = _longer(table.weight, start)
    table.num_embeddings = size
    if head is not None:
        head.bias = _longer(head.bias, torch.zeros(size))
    part: Any
    for part in model.modules():
        if isinstance(getattr(part, "config", None), BertConfig):
            part.config = config


def _longer(old: nn.Parameter, start: Tensor) -> nn.Parameter:
    """Return `start` with the rows of `old` in front, as far as they go."""
    rows = start.to(old)
    rows[: len(old)] = old.detach()[: len(rows)]
    return nn.Parameter(rows, requires_grad=old.requires_grad)
