"""A model is a folder.

Written by tools/extract.py from notebooks/00_folders.md: edit that notebook, not this file.
"""

import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bertnb.configuration import BertConfig, BertnbError, locate, read_json

__all__ = [
    "HF_NAMES",
    "hf_name",
    "HEADS",
    "TIED",
    "OLD_NAMES",
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


def _plain(name: str) -> str:
    """Return today's name of a weight, without a head model's `bert.`."""
    for old, new in OLD_NAMES:
        name = name.replace(old, new)
    return name.removeprefix("bert.")


def _plain_weights(
    weights: dict[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Return the weights under their plain names, without stored positions."""
    plain: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if _plain(name) in plain:
            raise BertnbError(f"{source} holds {_plain(name)} twice")
        plain[_plain(name)] = weight
    plain.pop("embeddings.position_ids", None)
    return plain


def _drop_copies(weights: dict[str, Tensor], source: str) -> None:
    """Take out the second copies of shared tensors; they must be equal."""
    for copy, original in TIED.items():
        if copy in weights:
            second = weights.pop(copy)
            if not torch.equal(weights.setdefault(original, second), second):
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
    if not weight.is_floating_point():
        raise BertnbError(f"{source}: {name} holds {weight.dtype}, not floats")
    if not weight.isfinite().all():
        raise BertnbError(f"{source}: {name} holds values that are not finite")


def _few(names: Collection[str]) -> str:
    """Name the first three, and count the rest."""
    shown = ", ".join(sorted(names)[:3]) or "nothing"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
        cls: type[_Model], path_or_hub_id: str | Path, **head_arguments: Any
    ) -> _Model:
        """Build the model of `config.json` and fill it from the weights.

        Weights of heads that the model lacks are left out. A head that the
        file lacks stays at its random start, with a warning.

        Raises:
            FileNotFoundError: no such folder, repository or file.
            BertnbError: a file is damaged, or the weights do not fit; the
                message names the file and the first keys.
        """
        file = locate(path_or_hub_id, "config.json")
        config = BertConfig.from_json_file(file)
        arguments = head_arguments or cls.saved_head_arguments(read_json(file))
        model = cls(config, **arguments)
        file = locate(path_or_hub_id, "model.safetensors")
        try:
            weights = load_file(file)
        except SafetensorError as error:
            raise BertnbError(
                f"{file} is no safetensors file: {error}"
            ) from error
        model.load_hf_weights(weights, str(file))
        return model.eval()

    @classmethod
    def saved_head_arguments(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Return the head's arguments that a `config.json` holds, if any."""
        return {}

    def extra_config(self) -> dict[str, Any]:
        """Return what the head adds to `config.json`."""
        return {}

    def load_hf_weights(self, weights: dict[str, Tensor], source: str) -> None:
        """Copy tensors with Hugging Face's names into the parameters.

        Strict both ways, and all or nothing.

        Raises:
            BertnbError: a key is missing or unexpected, a shape differs, a
                value is not finite, or two copies of a tensor differ.
        """
        state = self.state_dict()
        own = {_plain(hf_name(name)): state[name] for name in state}
        found = _plain_weights(weights, source)
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
        """Write `config.json` and `model.safetensors`; never half a file."""
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
        text = json.dumps(config, indent=2) + "\n"
        (folder / "config.json.tmp").write_text(text, encoding="utf-8")
        temporary = folder / "model.safetensors.tmp"
        save_file(weights, temporary, metadata={"format": "pt"})
        for name in ("config.json", "model.safetensors"):
            (folder / f"{name}.tmp").replace(folder / name)
