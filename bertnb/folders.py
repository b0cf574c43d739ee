"""A model is a folder.

Written by tools/extract.py from notebooks/00_folders.md: edit that notebook, not this file.
"""

import json
import warnings
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bertnb.configuration import BertConfig, BertnbError, locate, read_json

__all__ = ["HF_NAMES", "hf_name", "Model", "PretrainedModel", "OTHER_HEADS"]


# %% The names of the weights
# our name -> Hugging Face's, in this order; the rest is the same
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
    """Return the name that Hugging Face gives to the parameter that we call `name`."""
    for ours, theirs in HF_NAMES:
        if ours in name:
            return name.replace(ours, theirs)
    return name


# %% In and out
Model = TypeVar("Model", bound="PretrainedModel")


class PretrainedModel(nn.Module):
    """A module with a `config` that is read from, and written to, a folder in Hugging Face's layout."""

    optional: tuple[str, ...] = (
        "pooler.",
        "bert.pooler.",
    )  # may be missing in a checkpoint: then new, with a warning
    config: BertConfig

    @classmethod
    def from_pretrained(
        cls: type[Model], path_or_hub_id: str | Path, **head_arguments: Any
    ) -> Model:
        """Build the model of `config.json` and fill it from `model.safetensors`.

        Weights of other heads are left out. A head that the checkpoint lacks stays at its random start, with a warning.

        Raises:
            FileNotFoundError: no such folder, repository or file.
            BertnbError: the weights are damaged, or do not fit the configuration; the message names the first keys.
        """
        saved = read_json(locate(path_or_hub_id, "config.json"))
        model = cls(
            BertConfig.from_dict(saved),
            **(head_arguments or cls.saved_head_arguments(saved)),
        )
        file = locate(path_or_hub_id, "model.safetensors")
        try:
            weights = load_file(file)
        except SafetensorError as error:
            raise BertnbError(
                f"{file} is not a readable safetensors file: {error}"
            ) from error
        model.load_hf_weights(weights, str(file))
        return model.eval()

    @classmethod
    def saved_head_arguments(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Return the head's arguments that a `config.json` holds; none for a model without such a head."""
        return {}

    def extra_config(self) -> dict[str, Any]:
        """Return what the head adds to `config.json`."""
        return {}

    def load_hf_weights(self, weights: dict[str, Tensor], source: str) -> None:
        """Copy tensors with Hugging Face's names into the parameters; strict in both directions.

        Raises:
            BertnbError: a key is missing or unexpected, a shape differs, or a value is not finite.
        """
        parameters = {hf_name(name): p for name, p in self.state_dict().items()}
        inner = any(name.startswith("bert.") for name in parameters)
        weights = {
            _prefixed(name, inner): w
            for name, w in weights.items()
            if not name.startswith(OTHER_HEADS) or name in parameters
        }
        missing = {n for n in parameters if n not in weights}
        new = {n for n in missing if n.startswith(self.optional)}
        unexpected = {
            n
            for n in weights
            if n not in parameters and not n.startswith(self.optional)
        }
        if missing - new or unexpected:
            raise BertnbError(
                f"{source} does not fit {type(self).__name__}: missing {_few(missing - new)}; unexpected {_few(unexpected)}"
            )
        for name in parameters.keys() & weights.keys():
            if weights[name].shape != parameters[name].shape:
                raise BertnbError(
                    f"{source}: {name} has shape {tuple(weights[name].shape)}, config.json says {tuple(parameters[name].shape)}"
                )
            if not weights[name].isfinite().all():
                raise BertnbError(
                    f"{source}: {name} holds values that are not finite"
                )
            parameters[name].copy_(weights[name])
        if new:
            warnings.warn(
                f"{source} has no weights for {_few(new)}: they start untrained",
                stacklevel=3,
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, each under a temporary name first; `transformers` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": [type(self).__name__],
            "model_type": "bert",
            **self.config.to_dict(),
            **self.extra_config(),
        }
        (folder / "config.json.tmp").write_text(
            json.dumps(config, indent=2) + "\n", encoding="utf-8"
        )
        weights = {
            hf_name(name): p.detach().contiguous()
            for name, p in self.state_dict().items()
        }
        save_file(
            weights, folder / "model.safetensors.tmp", metadata={"format": "pt"}
        )
        for name in ("config.json", "model.safetensors"):
            (folder / f"{name}.tmp").replace(folder / name)


OTHER_HEADS = ("cls.", "classifier.", "qa_outputs.")


def _prefixed(name: str, inner: bool) -> str:
    """Give a weight's name the prefix `bert.` where the model has one, and take it away where not."""
    bare = name.removeprefix("bert.")
    return (
        f"bert.{bare}"
        if inner and bare.startswith(("embeddings.", "encoder.", "pooler."))
        else bare
    )


def _few(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) or "nothing"
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
