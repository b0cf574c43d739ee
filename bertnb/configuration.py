"""The numbers that define a BERT.

Written by tools/extract.py from notebooks/00_configuration.md: edit that notebook, not this file.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = [
    "BertnbError",
    "HIDDEN_ACTS",
    "BertConfig",
    "SIZES",
    "FIXED",
    "IGNORED",
    "locate",
    "read_json",
]


# %% Errors
class BertnbError(Exception):
    """Base of the errors that are about the content of a file or a run, not about an argument's type or value."""


# %% The configuration
HIDDEN_ACTS = (
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "relu",
    "silu",
    "swish",
    "tanh",
)


@dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT, with the keys of a Hugging Face `config.json` (defaults: bert-base-uncased).

    Raises:
        ValueError: a size is not a positive whole number, a probability lies outside [0, 1), the heads do not
            divide `hidden_size`, or `hidden_act` is unknown.
    """

    vocab_size: int = 30522  # V
    hidden_size: int = 768  # H
    num_hidden_layers: int = 12  # N
    num_attention_heads: int = 12  # A
    intermediate_size: int = 3072  # F
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        for name in SIZES:
            _require(
                getattr(self, name),
                name,
                "a positive whole number",
                lambda v: type(v) is int and v > 0,
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            _require(
                getattr(self, name),
                name,
                "a number in [0, 1)",
                lambda v: 0 <= v < 1,
            )
        for name in ("initializer_range", "layer_norm_eps"):
            _require(
                getattr(self, name), name, "a positive number", lambda v: v > 0
            )
        _require(
            self.hidden_act,
            "hidden_act",
            f"one of {', '.join(HIDDEN_ACTS)}",
            HIDDEN_ACTS.__contains__,
        )
        _require(
            self.pad_token_id,
            "pad_token_id",
            f"an id below vocab_size={self.vocab_size}",
            lambda v: type(v) is int and 0 <= v < self.vocab_size,
        )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}: "
                "each head gets an equal share of the hidden vector"
            )

    @property
    def head_size(self) -> int:
        """The size d of a head's query, key and value: H / A."""
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """Return the thirteen keys and their values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BertConfig":
        """Build a configuration from the content of a `config.json`.

        Raises:
            ValueError: a key would change the architecture in a way that this package does not build, or is unknown.
        """
        known = {f.name for f in fields(cls)}
        for key, value in values.items():
            if key in FIXED and value not in FIXED[key]:
                raise ValueError(
                    f"{key}={value!r}: only {FIXED[key][0]!r} is supported"
                )
            if key not in known and key not in FIXED and key not in IGNORED:
                raise ValueError(
                    f"unknown configuration key {key!r}={value!r}; known keys: {', '.join(sorted(known))}"
                )
        return cls(
            **{key: value for key, value in values.items() if key in known}
        )

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> "BertConfig":
        """Read `config.json` from a folder, or from the Hugging Face hub.

        Raises:
            FileNotFoundError: there is no such folder, repository or file.
            BertnbError: the file is not JSON.
        """
        return cls.from_dict(read_json(locate(path_or_hub_id, "config.json")))


SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
# keys of other architectures' features: accepted only with the value that leaves BERT unchanged
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "tie_word_embeddings": (True, None),
    "pruned_heads": ({}, None),
}
# keys that say nothing about the encoder's shape: labels of a head, bookkeeping, and settings of other programs
IGNORED = frozenset(
    "architectures bos_token_id eos_token_id sep_token_id cls_token_id mask_token_id chunk_size_feed_forward "
    "classifier_dropout directionality dtype torch_dtype finetuning_task gradient_checkpointing id2label label2id "
    "num_labels output_attentions output_hidden_states output_past pooler_fc_size pooler_num_attention_heads "
    "pooler_num_fc_layers pooler_size_per_head pooler_type problem_type return_dict transformers_version use_cache "
    "_name_or_path _attn_implementation_autoset language name torchscript use_bfloat16".split()
)


def _require(value: Any, name: str, expected: str, holds: Any) -> None:
    if not holds(value):
        raise ValueError(f"{name}={value!r}: expected {expected}")


# %% A folder or a name on the hub
def locate(path_or_hub_id: str | Path, filename: str) -> Path:
    """Return the local path of `filename` in a folder, or download it from the Hugging Face hub.

    Raises:
        FileNotFoundError: neither a folder with that file nor a repository that can be reached.
    """
    folder = Path(path_or_hub_id)
    if folder.is_dir():
        if not (folder / filename).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {filename}; it holds {sorted(p.name for p in folder.iterdir())}"
            )
        return folder / filename
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(path_or_hub_id), filename))
    except Exception as error:
        raise FileNotFoundError(
            f"{str(path_or_hub_id)!r} is not a folder, and {filename} could not be had from the hub under that name: {error}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raise `BertnbError` that names the file where it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BertnbError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise BertnbError(
            f"{path} holds a {type(values).__name__}; expected an object of keys and values"
        )
    return values
