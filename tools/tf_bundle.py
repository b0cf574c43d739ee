"""Write TensorFlow checkpoints without TensorFlow, and ask TensorFlow itself.

The writer serves the tests and this measurement; it shares no code with the
reader in bertnb/checkpoints.py, its check sums included.

python tools/tf_bundle.py                       # measure the reader
python tools/tf_bundle.py --tensorflow PYTHON   # and ask TensorFlow, which
                                                # that Python can import
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from manifest import ROOT

RECORD = ROOT / "book" / "runs" / "checkpoints.json"
MAGIC = 0xDB4775248B80FB57
TYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9, "float16": 19}
TABLE = []
for _byte in range(256):
    for _ in range(8):
        _byte = _byte >> 1 ^ (0x82F63B78 if _byte & 1 else 0)
    TABLE.append(_byte)

Entry = tuple[bytes, bytes]


def crc32c(data: bytes) -> int:
    """Return the check sum, a byte at a time from a table of 256."""
    rest = 0xFFFFFFFF
    for byte in data:
        rest = rest >> 8 ^ TABLE[(rest ^ byte) & 0xFF]
    return rest ^ 0xFFFFFFFF


def masked(crc: int) -> bytes:
    """Return a check sum as it is stored."""
    turned = (crc >> 15) | (crc << 17) & 0xFFFFFFFF
    return ((turned + 0xA282EAD8) % 2**32).to_bytes(4, "little")


def varint(number: int) -> bytes:
    """Return a number in pieces of seven bits."""
    pieces = []
    while number > 127:
        pieces.append(number % 128 + 128)
        number //= 128
    return bytes([*pieces, number])


def block(entries: Iterable[Entry], interval: int = 16, kind: int = 0) -> bytes:
    """Return a block with its restart points, compression byte and sum."""
    content, last, restarts = b"", b"", [0]
    for number, (key, value) in enumerate(entries):
        shared = len(os.path.commonprefix([last, key]))  # noqa: RUF071
        if number and number % interval == 0:
            shared = 0
            restarts.append(len(content))
        for size in (shared, len(key) - shared, len(value)):
            content += varint(size)
        content, last = content + key[shared:] + value, key
    for restart in (*restarts, len(restarts)):
        content += restart.to_bytes(4, "little")
    content += bytes([kind])
    return content + masked(crc32c(content))


def table(entries: list[Entry], per_block: int = 20, kind: int = 0) -> bytes:
    """Return a whole table of sorted entries, several to a block."""
    data, handles = b"", []

    def add(part: bytes) -> bytes:
        nonlocal data
        handle = varint(len(data)) + varint(len(part) - 5)
        data += part
        return handle

    for start in range(0, len(entries), per_block):
        part = entries[start : start + per_block]
        handles.append((part[-1][0], add(block(part, kind=kind))))
    footer = add(block([])) + add(block(handles, interval=1))
    return data + footer.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")


def field(number: int, value: int | bytes, fixed: bool = False) -> bytes:
    """Return a field of a protocol buffer."""
    if isinstance(value, bytes):
        return varint(8 * number + 2) + varint(len(value)) + value
    if fixed:
        return varint(8 * number + 5) + value.to_bytes(4, "little")
    return varint(8 * number) + varint(value) if value else b""


def entry(array: np.ndarray, shard: int, offset: int, crc: bytes) -> bytes:
    """Return what the index says of a tensor."""
    shape = b"".join(field(2, field(1, size)) for size in array.shape)
    return (
        field(1, TYPES[str(array.dtype)])
        + field(2, shape)
        + field(3, shard)
        + field(4, offset)
        + field(5, array.nbytes)
        + field(6, int.from_bytes(crc, "little"), fixed=True)
    )


def write_bundle(
    prefix: Path, arrays: dict[str, np.ndarray], shards: int = 1, **how: int
) -> None:
    """Write a checkpoint, its tensors dealt out to the shards."""
    header = field(1, shards) + field(3, field(1, 1))
    entries, data = [(b"", header)], [b""] * shards
    for number, name in enumerate(sorted(arrays)):
        content, shard = arrays[name].tobytes(), number % shards
        sum_ = masked(crc32c(content))
        said = entry(arrays[name], shard, len(data[shard]), sum_)
        entries.append((name.encode(), said))
        data[shard] += content
    Path(f"{prefix}.index").write_bytes(table(entries, **how))
    for number, content in enumerate(data):
        path = Path(f"{prefix}.data-{number:05d}-of-{shards:05d}")
        path.write_bytes(content)


TENSORFLOW = """
import json, sys
import numpy as np, tensorflow as tf
folder = sys.argv[1]
reader = tf.train.load_checkpoint(folder + "/ours")
ours = np.load(folder + "/arrays.npz")
names = reader.get_variable_to_shape_map()
same = [np.array_equal(reader.get_tensor(n), ours[n]) for n in ours.files]
tf1 = tf.compat.v1
with tf.Graph().as_default(), tf1.Session() as session:
    made = [tf1.get_variable(n, initializer=ours[n]) for n in ours.files]
    session.run(tf1.global_variables_initializer())
    tf1.train.Saver(made).save(session, folder + "/theirs")
print(json.dumps({
    "tensorflow": tf.__version__,
    "tensors of ours that it reads": len(names),
    "of them equal": sum(same),
}))
"""


def ask_tensorflow(python: str) -> dict[str, object]:
    """Let TensorFlow read our file, and write one for our reader."""
    from bertnb.checkpoints import read_tf_checkpoint

    draw = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        f"bert/encoder/layer_{i}/{part}/kernel": draw.normal(
            size=(i + 1, 7)
        ).astype("f4")
        for i in range(30)
        for part in ("query", "key", "dense")
    }
    arrays["global_step"] = np.array(123456789012, "i8")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_bundle(folder / "ours", arrays)
        np.savez(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]
        told = subprocess.run(
            [python, "-c", TENSORFLOW, name],
            capture_output=True,
            text=True,
            check=True,
        )
        theirs = read_tf_checkpoint(folder / "theirs")
    said: dict[str, object] = json.loads(told.stdout.splitlines()[-1])
    equal = [np.array_equal(theirs[n].numpy(), arrays[n]) for n in arrays]
    said["tensors of theirs that we read"] = len(theirs)
    said["of theirs equal"] = sum(equal)
    return said


def measure() -> dict[str, object]:
    """Time the check sum, and the reading of a file of bert-base's size."""
    from bertnb import checkpoints

    draw = np.random.default_rng(0)
    data = draw.bytes(30522 * 768 * 4)  # the table of words
    start = time.perf_counter()
    crc32c(data[: 1 << 20])
    loop = (1 << 20) / (time.perf_counter() - start)
    start = time.perf_counter()
    checkpoints.crc32c(data)
    fast = len(data) / (time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as name:
        prefix = Path(name) / "base"
        content, entries, offset = [], [(b"", field(1, 1))], 0
        shapes = [(30522, 768)] + 144 * [(768, 768)]  # 109 M numbers
        for number, shape in enumerate(shapes):
            array = draw.normal(size=shape).astype("f4")
            raw = array.tobytes()
            sum_ = checkpoints.masked_crc32c(raw).to_bytes(4, "little")
            entries.append(
                (f"t{number:03d}".encode(), entry(array, 0, offset, sum_))
            )
            content.append(raw)
            offset += len(raw)
        Path(f"{prefix}.index").write_bytes(table(entries))
        with Path(f"{prefix}.data-00000-of-00001").open("wb") as stream:
            stream.writelines(content)
        content.clear()
        start = time.perf_counter()
        checkpoints.read_tf_checkpoint(prefix)
        seconds = time.perf_counter() - start
    return {
        "crc32c, MB a second, a byte at a time in Python": round(loop / 1e6, 1),
        "crc32c, MB a second, in lanes": round(fast / 1e6),
        "bytes of a file of bert-base's size": offset,
        "seconds to read and check it": round(seconds, 1),
    }


def main() -> int:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tensorflow", metavar="PYTHON")
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    record: dict[str, object] = {
        "command": "python tools/tf_bundle.py --tensorflow PYTHON",
        "hardware": f"{platform.machine()}, one core",
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "seed": 0,
        "commit": commit,
        **measure(),
    }
    if options.tensorflow:
        record |= ask_tensorflow(options.tensorflow)
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
