"""The numbers that define a BERT.

Written by tools/extract.py from notebooks/00_configuration.md: edit that notebook, not this file.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any

__all__ = [
    "BertnbError",
    "read_json",
    "SIZES",
    "HIDDEN_ACTS",
    "FIXED",
    "IGNORED",
    "BertConfig",
    "locate",
]


# %% Saying no early
class BertnbError(Exception):
    """Base of the errors about the content of a file or a run."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        BertnbError: the file is not JSON, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BertnbError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        found = type(values).__name__
        raise BertnbError(f"{path} holds a {found}; expected keys and values")
    return values


SIZES = tuple(
    "vocab_size hidden_size num_hidden_layers num_attention_heads "
    "intermediate_size max_position_embeddings type_vocab_size".split()
)
HIDDEN_ACTS = tuple(
    "gelu gelu_new gelu_pytorch_tanh relu silu swish tanh".split()
)
# they change the architecture: accepted only with the values that are BERT's
FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("bert",),
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False, None),
    "tie_word_embeddings": (True, None),
    "pruned_heads": ({}, None),
}
# they say nothing about the encoder: a head's labels, the tokenizer's ids ...
IGNORED = frozenset(
    "id2label label2id num_labels _num_labels problem_type classifier_dropout "
    "bos_token_id eos_token_id sep_token_id cls_token_id mask_token_id "
    "tokenizer_class language directionality pooler_fc_size pooler_type "
    "pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head "
    # ... bookkeeping, and what other programs do with memory and outputs ...
    "architectures transformers_version _name_or_path name finetuning_task "
    "dtype torch_dtype torchscript use_bfloat16 xla_device tf_legacy_loss "
    "output_attentions output_hidden_states output_past return_dict use_cache "
    "gradient_checkpointing chunk_size_feed_forward "
    "_attn_implementation_autoset "
    # ... and how a decoder would write text, in files of 2019 and 2020
    "bad_words_ids decoder_start_token_id diversity_penalty do_sample "
    "early_stopping length_penalty max_length min_length no_repeat_ngram_size "
    "num_beam_groups num_beams num_return_sequences prefix repetition_penalty "
    "task_specific_params temperature top_k top_p".split()
)


# %% The class
@dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT, with Hugging Face's keys; defaults: bert-base-uncased.

    Raises:
        ValueError: a size is not a positive whole number, another value lies
            outside its range, or the heads do not divide `hidden_size`.
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
            self._require(name, "a positive whole number", _is_size)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            self._require(
                name, "a number in [0, 1)", lambda p: _is_real(p) and 0 <= p < 1
            )
        for name in ("initializer_range", "layer_norm_eps"):
            self._require(
                name, "a positive number", lambda x: _is_real(x) and x > 0
            )
        acts = f"one of {', '.join(HIDDEN_ACTS)}"
        self._require("hidden_act", acts, HIDDEN_ACTS.__contains__)
        ids = f"an id from 0 to {self.vocab_size - 1}, below vocab_size"
        self._require(
            "pad_token_id",
            ids,
            lambda i: type(i) is int and i in range(self.vocab_size),
        )
        share = f"a divisor of hidden_size={self.hidden_size}, by (0.2)"
        self._require(
            "num_attention_heads", share, lambda a: self.hidden_size % a == 0
        )

    def _require(
        self, name: str, expected: str, holds: Callable[[Any], bool]
    ) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise ValueError(f"{name}={value!r}: expected {expected}")

    @property
    def head_size(self) -> int:
        """The size d of a head's query, key and value, (0.2)."""
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, Any]:
        """Return the thirteen keys and their values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BertConfig":
        """Build a configuration from the content of a `config.json`.

        Raises:
            ValueError: a value is wrong, a key is unknown, or a key would
                change the architecture in a way that this package lacks.
        """
        known = {field.name for field in fields(cls)}
        for key, allowed in FIXED.items():
            if key in values and values[key] not in allowed:
                raise ValueError(
                    f"{key}={values[key]!r}: only {allowed[0]!r} is supported"
                )
        for key, value in values.items():
            if key not in known | FIXED.keys() | IGNORED:
                names = ", ".join(sorted(known))
                raise ValueError(
                    f"unknown configuration key {key!r}={value!r}; known: {names}"
                )
        return cls(**{key: values[key] for key in values if key in known})

    @classmethod
    def from_json_file(cls, path: str | Path) -> "BertConfig":
        """Read one file.

        Raises:
            BertnbError: the file is not JSON, or describes no BERT of ours.
        """
        try:
            return cls.from_dict(read_json(Path(path)))
        except ValueError as error:
            raise BertnbError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        revision: str | None = None,
        token: str | None = None,
    ) -> "BertConfig":
        """Read `config.json` from a folder, or from the Hugging Face hub.

        Raises:
            FileNotFoundError: there is no such folder, repository or file.
            BertnbError: the file is not JSON, or describes no BERT of ours.
        """
        return cls.from_json_file(
            locate(path_or_hub_id, "config.json", revision, token)
        )


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_real(value: Any) -> bool:
    return (
        type(value) is not bool
        and isinstance(value, int | float)
        and isfinite(value)
    )


# %% A folder, or a name on the hub
def locate(
    path_or_hub_id: str | Path,
    name: str,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Return the local path of the file `name` in a folder, or download it.

    Args:
        path_or_hub_id: a folder, or the name of a repository on the hub.
        name: the file's name.
        revision: the repository's branch, tag or commit; a folder has none.
        token: what the hub asks for where a repository is not public.

    Raises:
        FileNotFoundError: neither a folder with that file nor a repository
            that can be reached.
    """
    folder, text = Path(path_or_hub_id), str(path_or_hub_id)
    if folder.is_dir():
        if not (folder / name).is_file():
            there = sorted(path.name for path in folder.iterdir())
            raise FileNotFoundError(
                f"{folder} holds no {name}; it holds {there}"
            )
        return folder / name
    path = folder.is_absolute() or folder.exists()
    if path or text.startswith((".", "~")) or text.endswith("/"):
        raise FileNotFoundError(f"{text!r} is not a folder")
    from huggingface_hub import constants, hf_hub_download

    try:
        return Path(hf_hub_download(text, name, revision=revision, token=token))
    except Exception as error:
        offline = "HF_HUB_OFFLINE is set, so only kept files are used: "
        raise FileNotFoundError(
            f"{text!r} is not a folder, and the hub gave no {name} under that "
            "name: "
            f"{offline if constants.HF_HUB_OFFLINE else ''}{error}"
        ) from error
