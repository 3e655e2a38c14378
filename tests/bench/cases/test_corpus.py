"""The text of lorafast-bench model: the same split everywhere, and a library without sources."""

import pytest

from lorafast.bench.cases import corpus
from lorafast.bench.errors import BenchError


def test_the_split_is_deterministic_and_disjoint(monkeypatch):
    found = corpus.corpus()
    with monkeypatch.context() as patch:
        # The examples of a label depend on no other label.
        patch.setattr(corpus, "LABELS", corpus.LABELS[:4])
        again = corpus.corpus.__wrapped__()
    assert again == tuple(tuple(e for e in side if e.label < 4) for side in found)
    train, held_out = found
    assert not {e.text for e in train} & {e.text for e in held_out}
    every_label = set(range(len(corpus.LABELS)))
    assert {e.label for e in train} == {e.label for e in held_out} == every_label
    assert 0.15 < len(held_out) / (len(train) + len(held_out)) < 0.25
    assert len(train) > 1000
    assert not [e for e in train if corpus.LABELS[e.label] in e.text]


def test_a_library_without_sources_is_an_error(tmp_path):
    with pytest.raises(BenchError, match="carries no sources"):
        corpus.corpus(tmp_path)
    text = '"""Short."""\nclass A:\n    """Long enough to say something of its module, ssl."""\n'
    (tmp_path / "ssl.py").write_text(text)
    # One text cannot be on both sides.
    with pytest.raises(BenchError, match="carries no sources"):
        corpus.corpus(tmp_path)
