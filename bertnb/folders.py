"""A model is a folder.

Written by tools/extract.py from notebooks/00_folders.md: edit that notebook, not this file.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Collection
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar
from zipfile import ZipFile, is_zipfile
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bertnb.configuration import BertConfig, BertnbError, locate, read_json

__all__ = [
    "HF_NAMES",
    "hf_name",
    "HEADS",
    "TIED",
    "OLD_NAMES",
    "IGNORED_WEIGHTS",
    "FLOATS",
    "WEIGHTS",
    "SUMS",
    "read_weights",
    "config_file",
    "PretrainedModel",
]


# %% Two names for one tensor
# our name -> Hugging Face's; the first that fits counts, the rest is the same
HF_NAMES = (
    (".attention.output.", ".attention.output.dense."),
    (".attention.query.", ".attention.self.query."),
    (".attention.key.", ".attention.self.key."),
    (".attention.value.", ".attention.self.value."),
    (".attention_norm.", ".attention.output.LayerNorm."),
    (".feed_forward.intermediate.", ".intermediate.dense."),
    (".feed_forward.output.", ".output.dense."),
    (".output_norm.", ".output.LayerNorm."),
    ("masked_lm.bias", "cls.predictions.bias"),
    ("masked_lm.", "cls.predictions.transform."),
    ("next_sentence.", "cls.seq_relationship."),
)


def hf_name(name: str) -> str:
    """Return what Hugging Face calls the parameter that we call `name`."""
    for ours, theirs in HF_NAMES:
        if ours in name:
            return name.replace(ours, theirs)
    return name


# %% Body and heads
# parts that a file or a model may lack, each of them wholly or not at all
HEADS = (
    "pooler.",
    "cls.predictions.",
    "cls.seq_relationship.",
    "classifier.",
    "qa_outputs.",
)
# second copies of shared tensors, in some files
TIED = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
OLD_NAMES = (
    ("LayerNorm.gamma", "LayerNorm.weight"),
    ("LayerNorm.beta", "LayerNorm.bias"),
)
# left out of every file: they hold nothing that was learnt
IGNORED_WEIGHTS = ("embeddings.position_ids",)


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _plain(name: str) -> str:
    """Return today's name of a weight, without a head model's `bert.`."""
    for old, new in OLD_NAMES:
        name = name.replace(old, new)
    return name.removeprefix("bert.")


def _plain_weights(
    weights: dict[str, Tensor], ignore: tuple[str, ...], source: str
) -> dict[str, Tensor]:
    """Return the weights under their plain names, without the ignored ones."""
    if isinstance(ignore, str):  # its letters would each leave something out
        raise TypeError(f"ignore={ignore!r}: expected a tuple, ({ignore!r},)")
    out = tuple(_plain(prefix) for prefix in ignore)
    plain: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if _plain(name) in plain:
            raise BertnbError(f"{source} holds {_plain(name)} twice")
        if _plain(name) not in IGNORED_WEIGHTS:
            plain[_plain(name)] = weight
    return {n: w for n, w in plain.items() if not n.startswith(out)}


def _drop_copies(weights: dict[str, Tensor], source: str) -> None:
    """Take out the second copies of shared tensors; they must be equal."""
    for copy, original in TIED.items():
        if copy in weights:
            second = weights.pop(copy)
            first = weights.setdefault(original, second)
            if first.shape != second.shape or (first != second).any():
                raise BertnbError(
                    f"{source}: {copy} differs from {original}, but BERT "
                    "shares the two"
                )


def _in_absent_head(name: str, names: Collection[str]) -> bool:
    """Say whether `name` is of a head of which `names` holds nothing."""
    return any(
        name.startswith(head) and not any(n.startswith(head) for n in names)
        for head in HEADS
    )


def _check_values(
    name: str, weight: Tensor, wanted: Tensor, source: str
) -> None:
    """Refuse another shape, whole numbers, and values that are not finite."""
    if weight.shape != wanted.shape:
        raise BertnbError(
            f"{source}: {name} has shape {tuple(weight.shape)}; this model "
            f"needs {tuple(wanted.shape)}"
        )
    if weight.dtype not in FLOATS:
        raise BertnbError(f"{source}: {name} holds {weight.dtype}, not floats")
    if not weight.to(wanted.dtype).isfinite().all():
        raise BertnbError(f"{source}: {name} holds values that are not finite")


def _few(names: Collection[str]) -> str:
    """Name the first three, and count the rest."""
    shown = ", ".join(sorted(names)[:3]) or "nothing"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# %% The file that holds the weights
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SUMS = "bertnb_crc32"  # where our files note each tensor's check sum


def read_weights(
    path_or_hub_id: str | Path,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[dict[str, Tensor], Path]:
    """Return the tensors of a folder or repository, and the file they are in.

    The first of `WEIGHTS` that is there is read. Nothing in a file is run.

    Raises:
        FileNotFoundError: there are no weights, or no such repository.
        BertnbError: a file is damaged, holds more than tensors, or index and
            shards contradict each other.
    """
    from huggingface_hub.errors import EntryNotFoundError

    missing: list[str] = []
    for name in WEIGHTS:
        try:
            file = locate(path_or_hub_id, name, revision, token)
        except FileNotFoundError as error:
            # a folder's answer has no cause; the hub's can be "no such file"
            if not isinstance(error.__cause__, EntryNotFoundError | None):
                raise
            missing.append(str(error))
            continue
        if file.suffix != ".json":
            return _read_tensors(file), file
        weights: dict[str, Tensor] = {}
        for shard, keys in _read_index(file).items():
            try:
                part = locate(path_or_hub_id, shard, revision, token)
            except FileNotFoundError as error:
                raise BertnbError(
                    f"{file} says that {_few(keys)} is in {shard}: {error}"
                ) from error
            tensors = _read_tensors(part)
            if wrong := tensors.keys() ^ keys:
                where = "holds" if min(wrong) in tensors else "lacks"
                raise BertnbError(
                    f"{part} {where} {min(wrong)}, against {file.name}"
                )
            weights |= tensors
        return weights, file
    raise FileNotFoundError(
        f"{missing[0]}. Weights are looked for in {', '.join(WEIGHTS)}"
    )


def _read_index(file: Path) -> dict[str, set[str]]:
    """Return the names of the shards, each with its keys."""
    shards: dict[str, set[str]] = {}
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BertnbError(f"{file} has no weight_map with keys and shards")
    ending = re.escape(file.name.split(".")[1])
    for key, shard in weight_map.items():
        plain = isinstance(shard, str) and re.fullmatch(
            rf"\w[\w.-]*\.{ending}", shard, re.ASCII
        )
        if not plain:
            raise BertnbError(
                f"{file} wants {key} from {shard!r}; a shard is a file beside "
                f"it whose name ends in .{ending}"
            )
        shards.setdefault(shard, set()).add(key)
    return shards


def _read_tensors(file: Path) -> dict[str, Tensor]:
    """Return what a file of tensors holds; run nothing."""
    if file.suffix != ".safetensors":
        return _read_pickle(file)
    try:
        with safe_open(file, "pt") as stream:
            sums = json.loads((stream.metadata() or {}).get(SUMS, "{}"))
        tensors = load_file(file)
    except (SafetensorError, ValueError) as error:
        raise BertnbError(f"{file} is no safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if sums.get(name, _sum(tensor)) != _sum(tensor):
            raise BertnbError(
                f"{file}: {name} is damaged: it has another check sum than "
                "when it was saved"
            )
    return tensors


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.bin`; anything else in it is refused."""
    try:
        if is_zipfile(file):  # torch.load does not look at its check sums
            with ZipFile(file) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} has another check sum")
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler's errors are of many kinds
        call = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"wants to call {call[1]}" if call else "is damaged"
        raise BertnbError(f"{file} {reason}; nothing was run") from error
    if not isinstance(tensors, dict):
        found = type(tensors).__name__
        raise BertnbError(f"{file} holds a {found}; expected names and tensors")
    for key, tensor in tensors.items():
        if (
            not isinstance(key, str)
            or not isinstance(tensor, Tensor)
            or tensor.layout != torch.strided
            or tensor.device.type != "cpu"
        ):
            raise BertnbError(f"{file}: {key!r} is no name with a tensor")
    return tensors


def _sum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().flatten()
    return crc32(flat.view(torch.uint8).numpy().data)


def config_file(
    path_or_hub_id: str | Path,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Return the `config.json` of a model; of a save that was killed, the one
    that belongs to the weights.

    Raises:
        FileNotFoundError: there is none.
    """
    return _left_config(Path(path_or_hub_id)) or locate(
        path_or_hub_id, "config.json", revision, token
    )


def _left_config(folder: Path) -> Path | None:
    """Return the `config.json.tmp` that belongs to the weights, if any: a
    save that was killed has left it.
    """
    left = folder / "config.json.tmp"
    weights = folder / "model.safetensors"
    if left.is_file() and weights.is_file():
        digest = sha256(left.read_bytes()).hexdigest()
        try:
            with safe_open(weights, "pt") as file:
                if (file.metadata() or {}).get("config_sha256") == digest:
                    return left
        except SafetensorError:
            pass  # who reads the weights says so
    return None


# %% In and out
_Model = TypeVar("_Model", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    """A module with a `config`, read from and written to a folder.

    The folder has Hugging Face's layout: `config.json` and
    `model.safetensors`.
    """

    config: BertConfig

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        path_or_hub_id: str | Path,
        revision: str | None = None,
        token: str | None = None,
        ignore: tuple[str, ...] = (),
        **head_arguments: Any,
    ) -> _Model:
        """Build the model of `config.json` and fill it from the weights.

        Weights of heads that the model lacks are left out. A head that the
        file lacks stays at its random start, with a warning. Numbers of half
        precision become the model's 32 bits.

        Args:
            path_or_hub_id: a folder, or the name of a repository on the hub.
            revision: the repository's branch, tag or commit.
            token: what the hub asks for where a repository is not public.
            ignore: how the names begin that are left out on purpose, such as
                `("cls.species.", "cls.chain.", "cls.graft.")` for the heads
                that only AntiBERTy has.
            head_arguments: what the model's head needs beside the
                configuration, such as `num_labels`; the file's if not given.

        Raises:
            FileNotFoundError: no such folder, repository or file.
            TypeError: `ignore` is one string, or the head has no such argument.
            BertnbError: a file is damaged, or the weights do not fit; the
                message names the file and the first keys.
        """
        file = config_file(path_or_hub_id, revision, token)
        config = BertConfig.from_json_file(file)
        arguments = head_arguments or cls.saved_head_arguments(read_json(file))
        weights, source = read_weights(path_or_hub_id, revision, token)
        model = cls(config, **arguments)
        model.load_hf_weights(weights, str(source), ignore)
        return model.eval()

    @classmethod
    def for_classes(
        cls: type[_Model], path_or_hub_id: str | Path, **head_arguments: Any
    ) -> _Model:
        """Build a model with this head, untrained where the checkpoint is of
        another class. A model with named classes overrides it."""
        saved = read_json(config_file(path_or_hub_id))
        if head_arguments and not cls.reads(saved):
            head_arguments["ignore"] = ("classifier.",)
        return cls.from_pretrained(path_or_hub_id, **head_arguments)

    @classmethod
    def reads(cls, saved: dict[str, Any]) -> bool:
        """Say whether a `config.json` is of this class, or does not say."""
        kinds = saved.get("architectures") or ()
        return not kinds or any(kind.__name__ in kinds for kind in cls.__mro__)

    @classmethod
    def saved_head_arguments(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Return the head's arguments that a `config.json` holds, if any."""
        return {}

    def extra_config(self) -> dict[str, Any]:
        """Return what the head adds to `config.json`."""
        return {}

    def load_hf_weights(
        self,
        weights: dict[str, Tensor],
        source: str,
        ignore: tuple[str, ...] = (),
    ) -> None:
        """Copy tensors with Hugging Face's names into the parameters.

        Strict both ways, and all or nothing; names that begin with one of
        `ignore` are left out.

        Raises:
            BertnbError: a key is missing or unexpected, a shape differs, a
                value is not finite, or two copies of a tensor differ.
        """
        state = self.state_dict()
        own = {_plain(hf_name(name)): state[name] for name in state}
        found = _plain_weights(weights, ignore, source)
        if "cls.predictions.bias" in own:
            _drop_copies(found, source)
        new = {n for n in own.keys() - found if _in_absent_head(n, found)}
        missing = own.keys() - found - new
        unexpected = {
            n for n in found.keys() - own if not _in_absent_head(n, own)
        }
        if missing or unexpected:
            raise BertnbError(
                f"{source} does not fit {type(self).__name__}: missing "
                f"{_few(missing)}; unexpected {_few(unexpected)}"
                + " (`ignore` leaves out what it names)"
                * bool(unexpected)
            )
        fitting = [name for name in own if name in found]
        for name in fitting:
            _check_values(name, found[name], own[name], source)
        for name in fitting:
            own[name].copy_(found[name])
        if new:
            lacks = f"{source} has no weights for {_few(new)}"
            warnings.warn(f"{lacks}: they start untrained", stacklevel=3)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`; never half a model."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": [type(self).__name__],
            "model_type": "bert",
            **self.config.to_dict(),
            **self.extra_config(),
        }
        weights = {
            hf_name(name): tensor.contiguous()
            for name, tensor in self.state_dict().items()
        }
        if left := _left_config(folder):  # finish the save that was killed
            left.replace(folder / "config.json")
        text = (json.dumps(config, indent=2) + "\n").encode()
        (folder / "config.json.tmp").write_bytes(text)
        metadata = {
            "format": "pt",
            "config_sha256": sha256(text).hexdigest(),
            SUMS: json.dumps({n: _sum(w) for n, w in weights.items()}),
        }
        temporary = folder / "model.safetensors.tmp"
        save_file(weights, temporary, metadata=metadata)
        # the library lets nobody else read what it writes
        shutil.copymode(folder / "config.json.tmp", temporary)
        names = ("model.safetensors", "config.json")
        for name in names:  # on the disk, before one of them has its name
            with (folder / f"{name}.tmp").open("rb+") as file:
                os.fsync(file.fileno())
        for name in names:
            (folder / f"{name}.tmp").replace(folder / name)
