"""Run the TensorFlow programs of articles 000 and 003 as they were meant.

transformers 5 has no TensorFlow any more, so this needs an environment of
their own time. It was run once; the record lies in the book, and the chapter
on the articles' code cites it.

python -m venv then
then/bin/pip install "tensorflow-cpu==2.15.1" "transformers==4.36.2" "numpy<2"
then/bin/python tools/articles_tensorflow.py > book/runs/articles-tensorflow.json
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
PIECES = "[PAD] [UNK] [CLS] [SEP] [MASK] this is an example sentence another ."
TEXTS = ["This is an example sentence.", "Another example sentence."]


def attempt(action: Callable[[], Any]) -> str:
    """Return what an action gives, or the kind and the words of its error."""
    try:
        return f"{action()}"
    except Exception as error:
        # Keras's messages are long: where, what is wrong, with what arguments
        message = str(error).split("Call arguments")[0].strip()
        what = message.splitlines()[-1].strip() if message else ""
        return f"{type(error).__name__}: {what.removeprefix('ValueError: ')}"


def main() -> int:
    """Print the record."""
    tf: Any = import_module("tensorflow")
    transformers: Any = import_module("transformers")
    tf.random.set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder, "vocab.txt")
        vocabulary.write_text("\n".join(PIECES.split()) + "\n", "utf-8")
        tokenizer = transformers.BertTokenizer(str(vocabulary))
    config = transformers.BertConfig(
        vocab_size=len(PIECES.split()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    rows = tokenizer(TEXTS, padding=True)
    ids, mask = tf.constant(rows.input_ids), tf.constant(rows.attention_mask)
    number = tokenizer.mask_token_id
    masked_lm = transformers.TFBertForMaskedLM(config)

    def gradient() -> Any:
        with tf.GradientTape() as tape:
            loss = masked_lm(ids, mask, training=True).loss
        return tape.gradient(loss, masked_lm.trainable_variables)

    article_000 = {
        "the batch's mask_token_id": attempt(lambda: rows.mask_token_id),
        "model(lists, number)": attempt(
            lambda: masked_lm(rows.input_ids, number, training=True).loss
        ),
        "model(tensor, number)": attempt(
            lambda: masked_lm(ids, number, training=True).loss
        ),
        "model(tensor, attention mask)": attempt(
            lambda: masked_lm(ids, mask, training=True).loss
        ),
        "the gradient of that": attempt(gradient),
    }

    keras = tf.keras
    encoder = transformers.TFBertModel(config)
    given = keras.Input((None,), dtype="int32")
    states, pooled = encoder(given)[:2]

    def classifier(body: Any) -> Any:
        model = keras.Sequential(
            [body, keras.layers.Dense(2, activation="softmax")]
        )
        model.compile("adam", "categorical_crossentropy")
        model.fit(ids, tf.constant([[1.0, 0.0], [0.0, 1.0]]), verbose=0)
        return f"trains; the output has shape {tuple(model(ids).shape)}"

    bodies = {
        "Sequential(TFBertModel)": encoder,
        "Sequential(both outputs)": keras.Model(given, [states, pooled]),
        "Sequential(last states)": keras.Model(given, states),
        "Sequential(pooled state)": keras.Model(given, pooled),
    }
    article_003 = {
        "load_model('bert_model')": attempt(
            lambda: keras.models.load_model("bert_model")
        )
    }
    for name, body in bodies.items():
        article_003[name] = attempt(partial(classifier, body))
    record = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": f"{platform.machine()}, CPU only",
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "transformers": transformers.__version__,
        },
        "seed": 0,
        "article 000": article_000,
        "article 003": article_003,
    }
    print(json.dumps(record, indent=2, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
