"""Fine-tuning a classifier.

Written by tools/extract.py from notebooks/17_classification.md: edit that notebook, not this file.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertnb.configuration import BertConfig, BertnbError, read_json
from bertnb.encoder import BertModel
from bertnb.examples import TextExample
from bertnb.folders import PretrainedModel, config_file, read_weights
from bertnb.layers import initialize
from bertnb.masked_lm import mean_cross_entropy
from bertnb.packing import encode_packed, worth_packing
from bertnb.tasks import Row, Task
from bertnb.tokenization import WordPieceTokenizer

__all__ = [
    "classification_loss",
    "class_weights",
    "ClassifierOutput",
    "BertClassifier",
    "BertForSequenceClassification",
    "text_rows",
    "METRICS",
    "SequenceClassification",
    "check_finite",
]


# %% The code
def classification_loss(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Return the mean of -log P(label), (17.2); with one column, squared error.

    Args:
        logits: (B, C) floats.
        labels: int64 (B,), 0 to C - 1, or -100 for rows that do not count;
            floats (B,) or (B, 1) if C is 1.
        weights: floats (C,), what the terms of each class are multiplied by,
            (17.3), without a change of what they are divided by.

    Raises:
        TypeError: labels of classes are not int64.
        ValueError: a shape is wrong, or a label lies outside the classes.
    """
    if logits.shape[-1] > 1:
        return mean_cross_entropy(logits, labels, "labels", weights)
    if labels.shape not in (logits.shape, logits.shape[:1]):
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; expected "
            f"{tuple(logits.shape[:1])}, one number a row"
        )
    return F.mse_loss(logits.flatten().float(), labels.flatten().float())


def class_weights(
    labels: Sequence[int],
    names: Sequence[str],
    weights: str | Mapping[str, float] = "balanced",
) -> Tensor:
    """Return the weights of the classes, float32 (C,), of mean 1 over the
    labels, (17.4).

    Args:
        labels: the numbers of the training examples' classes, 0 to C - 1.
        names: of the C classes.
        weights: "balanced", (17.5), or each name's weight before scaling.

    Raises:
        ValueError: there is no label; names are missing or unknown; a weight
            is negative or not finite, or all that count are 0; or a class to
            be balanced has no example.
    """
    counts = torch.tensor(labels, dtype=torch.int64).bincount(
        minlength=len(names)
    )
    if weights == "balanced":
        if 0 in counts:
            raise ValueError(
                f"class_weights='balanced', but {names[int(counts.argmin())]!r}"
                " has no training example: leave it out of the labels"
            )
        wanted = 1 / counts.double()  # (17.5)
    elif isinstance(weights, str) or set(weights) != set(names):
        raise ValueError(
            f"class_weights={weights!r}; expected 'balanced' or one weight "
            f"for each of {', '.join(names)}"
        )
    else:
        wanted = torch.tensor([float(weights[name]) for name in names]).double()
    total = (counts * wanted).sum()
    if not (wanted.isfinite().all() and wanted.min() >= 0 and total > 0):
        raise ValueError(
            f"class_weights={weights!r}; expected finite weights >= 0, and "
            "one above 0 for a class with training examples"
        )
    return (counts.sum() * wanted / total).float()


@dataclass
class ClassifierOutput:
    """What a classifier returns: of a row (B, C), or of each token (B, L, C)."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    losses: dict[str, Tensor] | None = None  # the loss under "labels"


_Classifier = TypeVar("_Classifier", bound="BertClassifier")


class BertClassifier(PretrainedModel, ABC):
    """An encoder, dropout and a linear head that scores named classes.

    A subclass says what the head reads, `pooled`, and its `loss`.

    Args:
        config: the encoder's configuration.
        num_labels: C; None: 2.
        labels: the names of the classes, instead of their number.

    Raises:
        ValueError: `num_labels` and `labels` say different numbers, or there
            is no class.
    """

    pooled: bool  # the head reads the pooled [CLS]; False: every token
    class_weights: Tensor | None  # floats (C,), for the loss; never saved

    def __init__(
        self,
        config: BertConfig,
        num_labels: int | None = None,
        labels: list[str] | None = None,
    ) -> None:
        super().__init__()
        if labels and num_labels not in (None, len(labels)):
            raise ValueError(
                f"num_labels={num_labels}, but labels names {len(labels)}: give one of the two"
            )
        count = 2 if num_labels is None else num_labels
        if count < 1 or labels == []:
            raise ValueError(
                f"num_labels={num_labels}, labels={labels}: expected 1 or more"
            )
        self.config = config
        self.label_names = labels or [f"LABEL_{i}" for i in range(count)]
        self.num_labels = len(self.label_names)
        self.bert = BertModel(config, add_pooling_layer=self.pooled)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.register_buffer("class_weights", None, persistent=False)
        initialize(self.classifier, config.initializer_range)

    @classmethod
    def saved_head_arguments(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Return what a `config.json` says of the classes.

        Raises:
            ValueError: its `problem_type` asks for another loss than ours.
        """
        names = saved.get("id2label")
        arguments: dict[str, Any] = {"num_labels": saved.get("num_labels")}
        if names:
            arguments = {
                "labels": [str(names[i]) for i in sorted(names, key=int)]
            }
        count = len(names or ()) or arguments["num_labels"] or 2
        ours = "regression" if count == 1 else "single_label_classification"
        kind = saved.get("problem_type")
        if kind not in (None, ours):
            raise ValueError(
                f"problem_type={kind!r} with num_labels={count}: "
                f"only {ours!r} is supported, one class or number a row"
            )
        return arguments

    def extra_config(self) -> dict[str, Any]:
        """Return the label names as Hugging Face writes them."""
        return {
            "id2label": {
                str(i): name for i, name in enumerate(self.label_names)
            },
            "label2id": {name: i for i, name in enumerate(self.label_names)},
        }

    @classmethod
    def for_classes(
        cls: type[_Classifier],
        path_or_hub_id: str | Path,
        num_labels: int | None = None,
        labels: list[str] | None = None,
        revision: str | None = None,
        token: str | None = None,
        **others: Any,
    ) -> _Classifier:
        """Build a model for these classes, trained as far as they were learnt.

        The classes of a trained head are found by their names, in whatever
        order the checkpoint has them; names such as LABEL_0 say nothing, and
        become the new ones. Without a head, or with one for other classes (a
        warning says so), it begins untrained. Without arguments the classes
        are the checkpoint's. `others` as in `from_pretrained`.
        """
        source = path_or_hub_id, revision, token
        others |= {
            name: value
            for name, value in (("num_labels", num_labels), ("labels", labels))
            if value
        }
        names = cls._trained_classes(*source)
        if labels and names and sorted(names) == sorted(labels):
            model = cls.from_pretrained(*source, **others | {"labels": names})
            model.order_labels(labels)
            return model
        count = len(labels) if labels else num_labels
        plain = all(name.startswith("LABEL_") for name in names or ())
        fits = len(names or ()) == count and (plain or count == 1)
        if count and not fits:
            others["ignore"] = (*others.get("ignore", ()), "classifier.")
            if names is not None:
                warnings.warn(
                    f"{path_or_hub_id} has a head for other classes: a new "
                    "one begins untrained",
                    stacklevel=3,
                )
        return cls.from_pretrained(*source, **others)

    @classmethod
    def _trained_classes(
        cls, path_or_hub_id: str | Path, revision: str | None, token: str | None
    ) -> list[str] | None:
        """Return the names of a checkpoint's classes, [] where its
        `problem_type` is another; None: it is another kind of model."""
        saved = read_json(config_file(path_or_hub_id, revision, token))
        if not cls.reads(saved):
            return None
        try:
            own = cls.saved_head_arguments(saved)
        except ValueError:
            return []
        count = own.get("num_labels") or 2
        # where the configuration does not say, the weights have to
        if not saved.get("architectures") and not any(own.values()):
            weights = read_weights(path_or_hub_id, revision, token)[0]
            count = len(weights.get("classifier.weight", ()))
        return own.get("labels") or [f"LABEL_{i}" for i in range(count)] or None

    def order_labels(self, labels: Sequence[str]) -> None:
        """Put the classes into another order, each with its weights.

        Raises:
            ValueError: `labels` are other names than `label_names`.
        """
        if sorted(labels) != sorted(self.label_names):
            raise ValueError(
                f"labels={list(labels)}: expected the model's, "
                f"{self.label_names}, in another order"
            )
        places = [self.label_names.index(name) for name in labels]
        with torch.no_grad():
            for parameter in self.classifier.parameters():
                parameter.copy_(parameter[places])
        if self.class_weights is not None:
            self.class_weights = self.class_weights[places]
        self.label_names = list(labels)

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return how wrong the scores (..., C) are."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> ClassifierOutput:
        """Score the classes; with `labels`, also the loss.

        Other arguments as in `BertModel`.
        """
        inputs = input_ids, attention_mask, token_type_ids, position_ids
        every = output_hidden_states or output_attentions
        if (
            self.training
            and not every
            and attention_mask is not None
            and worth_packing(attention_mask)
        ):
            encoded = encode_packed(
                self.bert, input_ids, attention_mask, *inputs[2:]
            )
        else:
            # of the last layer the pooler reads [CLS] and no other place
            nowhere = input_ids[:, :0].long() if self.pooled else None
            encoded = self.bert(
                *inputs, output_hidden_states, output_attentions, nowhere
            )
        vectors = (
            encoded.pooler_output if self.pooled else encoded.last_hidden_state
        )
        logits = self.classifier(self.dropout(vectors))
        loss = None if labels is None else self.loss(logits, labels)
        return ClassifierOutput(
            loss,
            logits,
            encoded.hidden_states,
            encoded.attentions,
            None if loss is None else {"labels": loss},
        )


class BertForSequenceClassification(BertClassifier):
    """BERT with a linear classifier on the pooled [CLS], (17.1).

    With `num_labels=1` it is a regression. `labels` of the call are int64
    (B,), with one label floats (B,).
    """

    pooled = True

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return `classification_loss`, (17.2), with the `class_weights`."""
        return classification_loss(logits, labels, self.class_weights)


# %% From texts to rows, and from scores to names
def text_rows(
    examples: Sequence[TextExample],
    targets: Sequence[int | float | None],
    tokenizer: WordPieceTokenizer,
    max_length: int,
) -> list[Row]:
    """Return a row for each text or pair, (7.6), with its target if it has
    one, as "labels".

    A text without a token, such as an empty one, is a row of [CLS] and [SEP].
    A warning says how many rows were cut to `max_length` tokens.

    Raises:
        ValueError: some examples have a `text_pair`, and some have none.
    """
    if not len(examples):
        return []
    texts = [example.text for example in examples]
    seconds = [e.text_pair for e in examples if e.text_pair is not None]
    if len(seconds) not in (0, len(texts)):
        pairs = [e.text_pair is not None for e in examples]
        odd = pairs.index(not pairs[0])
        raise ValueError(
            f"example 0 has {'a' if pairs[0] else 'no'} text_pair, example "
            f"{odd} has {'none' if pairs[0] else 'one'}: give all or none one"
        )

    def encode(chosen: Sequence[int], longest: int | None) -> list[Row]:
        found = tokenizer(
            [texts[i] for i in chosen],
            [seconds[i] for i in chosen] if seconds else None,
            max_length=longest,
            padding=False,
            return_tensors=None,
        )
        columns = found["input_ids"], found["token_type_ids"]
        return [
            Row(
                i,
                ids,
                kinds,
                {} if targets[i] is None else {"labels": targets[i]},
            )
            for i, ids, kinds in zip(chosen, *columns, strict=True)
        ]

    rows = encode(range(len(texts)), None)
    long = [row.example for row in rows if len(row.input_ids) > max_length]
    if long:
        warnings.warn(
            f"{len(long)} of {len(rows)} rows are longer than "
            f"max_length={max_length} tokens: their ends were cut off",
            stacklevel=2,
        )
        for row in encode(long, max_length):
            rows[row.example] = row
    return rows


METRICS = ("accuracy", "macro_f1", "matthews")


def _other_score(name: str, truth: list[str], answers: list[str]) -> float:
    """Return the macro F1, (17.6), or Matthews' correlation, (17.7)."""
    try:
        from sklearn.metrics import f1_score, matthews_corrcoef
    except ImportError as error:
        raise BertnbError(
            f'metric={name!r} needs scikit-learn: pip install "bertnb[train]"'
        ) from error
    if name == "macro_f1":
        return float(f1_score(truth, answers, average="macro", zero_division=0))
    return float(matthews_corrcoef(truth, answers))


@dataclass(frozen=True)
class SequenceClassification(Task):
    """One class for each text or pair of texts.

    An answer is {"label": name, "score": its probability, "scores": {name:
    probability}}, (17.1). Texts that are too long lose their end, with a
    warning; of a text without a token the model sees only [CLS] and [SEP].

    Args:
        training, validation: examples; their labels must be in `labels`.
        labels: the names of the classes; None: those of `training`, sorted.
            For a trained model: `model.label_names`.
        class_weights: None, "balanced", or a weight for each name, (17.4).
        metric: "accuracy", "macro_f1", (17.6), or "matthews", (17.7).

    Raises:
        BertnbError: `validation` is to be scored by a metric that needs
            scikit-learn, which is not there.
        TypeError: a training example's label is no name.
        ValueError: `metric` is unknown, or there are fewer than two classes,
            or one is named twice.
    """

    training: Sequence[TextExample] = ()
    validation: Sequence[TextExample] = ()
    labels: Sequence[str] | None = None
    class_weights: str | Mapping[str, float] | None = None
    metric: str = "accuracy"

    model_class = BertForSequenceClassification

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(
                f"metric={self.metric!r}: expected one of {', '.join(METRICS)}"
            )
        if self.metric != "accuracy" and len(self.validation):
            # that scikit-learn is missing should not be news after an epoch
            _other_score(self.metric, ["a", "b"], ["a", "b"])
        for number, example in enumerate(self.training):
            if not isinstance(example.label, str | None):
                raise TypeError(
                    f"training example {number} has the label "
                    f"{example.label!r}; expected the name of a class "
                    "(SequenceRegression learns numbers)"
                )
        found = {e.label for e in self.training if isinstance(e.label, str)}
        names = sorted(found) if self.labels is None else self.labels
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(
                f"labels={list(names)}: expected two classes or more, each "
                "once, from `labels` or from the training examples"
            )
        object.__setattr__(self, "labels", tuple(names))

    def head_arguments(self) -> dict[str, Any]:
        """Return the names of the classes."""
        return {"labels": list(self.labels or ())}

    def prepare(self, model: BertForSequenceClassification) -> None:
        """Check the model's classes, and give it the class weights.

        Raises:
            ValueError: its `label_names` are others, or the weights do not
                fit, see `class_weights`.
        """
        super().prepare(model)
        model.class_weights = None
        if self.class_weights is not None and len(self.training):
            known = [i for i in self._classes(self.training) if i is not None]
            names = list(self.labels or ())
            weights = class_weights(known, names, self.class_weights)
            model.class_weights = weights.to(model.classifier.weight.device)

    def _classes(self, examples: Sequence[TextExample]) -> list[int | None]:
        """Return the number of each example's class, None where unknown."""
        numbers: dict[Any, int] = {
            name: i for i, name in enumerate(self.labels or ())
        }
        for number, example in enumerate(examples):
            if example.label is not None and example.label not in numbers:
                raise ValueError(
                    f"example {number} has the label {example.label!r}; "
                    f"expected one of {', '.join(numbers)}"
                )
        return [None if e.label is None else numbers[e.label] for e in examples]

    def rows(
        self,
        examples: Sequence[TextExample],
        tokenizer: WordPieceTokenizer,
        max_length: int,
    ) -> list[Row]:
        """Return a row for each example, see `text_rows`.

        Raises:
            ValueError: a label is not in `labels`, or only some examples have
                a `text_pair`.
        """
        classes = self._classes(examples)
        return text_rows(examples, classes, tokenizer, max_length)

    def decode(
        self,
        examples: Sequence[TextExample],
        rows: Sequence[Row],
        logits: Sequence[Tensor],
    ) -> list[dict[str, Any]]:
        """Return label and probabilities of each text, see the class.

        Raises:
            ValueError: a row's scores are not finite.
        """
        answers = []
        for row, scores in zip(rows, logits, strict=True):
            check_finite(row, scores)
            p = scores.softmax(-1).tolist()  # (17.1)
            named = dict(zip(self.labels or (), p, strict=True))
            label = max(named, key=named.__getitem__)
            answers.append(
                {"label": label, "score": named[label], "scores": named}
            )
        return answers

    def score(
        self, examples: Sequence[TextExample], answers: Sequence[dict[str, Any]]
    ) -> dict[str, float]:
        """Return the accuracy, and the metric if it is another.

        Raises:
            BertnbError: the metric needs scikit-learn, which is not there.
            ValueError: an example has no label, or one that is not in
                `labels`.
        """
        if None in (classes := self._classes(examples)):
            raise ValueError(
                f"example {classes.index(None)} has no label: nothing to "
                "compare its answer with"
            )
        truth = [str(example.label) for example in examples]
        found = [answer["label"] for answer in answers]
        pairs = list(zip(truth, found, strict=True))
        scores = {"accuracy": sum(t == a for t, a in pairs) / len(pairs)}
        if self.metric != "accuracy":
            scores[self.metric] = _other_score(self.metric, truth, found)
        return scores


def check_finite(row: Row, scores: Tensor) -> None:
    """Raise a ValueError that names the example whose scores are not finite."""
    if not scores.isfinite().all():
        raise ValueError(
            f"example {row.example}: the model gives a score of "
            f"{scores[~scores.isfinite()][0].item()}: its weights are broken, or "
            "its precision is too low"
        )
