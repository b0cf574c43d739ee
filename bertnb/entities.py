"""Named entities: a class for every token.

Written by tools/extract.py from notebooks/19_entities.md: edit that notebook, not this file.
"""

from torch import Tensor

from bertnb.classification import BertClassifier
from bertnb.masked_lm import mean_cross_entropy

__all__ = ["BertForTokenClassification"]


# %% The code
class BertForTokenClassification(BertClassifier):
    """BERT with a linear classifier on each token's vector, (19.2).

    `labels` of the call are int64 (B, L), -100 for tokens without a class.
    """

    pooled = False

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the tokens that have a class, (19.3)."""
        return mean_cross_entropy(logits, labels, "labels")
