"""Texts, vocabularies and batches of the demo."""

import pytest
import torch

from adaqn_cuda.demo.data import Batches, DataError, load_corpus


def test_default_corpus_is_the_same_every_time():
    a, b = (load_corpus(None, "char") for _ in range(2))
    assert a.fingerprint == b.fingerprint
    assert 80 <= len(a.vocabulary) <= 120
    sizes = torch.tensor([len(part) for part in (a.train, a.valid, a.test)])
    torch.testing.assert_close(sizes / sizes.sum(), torch.tensor([0.9, 0.05, 0.05]))


def test_file_is_split_in_order(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a" * 900 + "b" * 50 + "a" * 50)
    corpus = load_corpus(str(file), "char")
    decoded = ["".join(corpus.vocabulary[i] for i in part) for part in (corpus.train, corpus.test)]
    assert decoded == ["a" * 900, "a" * 50]
    assert set(corpus.valid.tolist()) == {0}, "what training never saw is <unk>"


def test_folder_of_splits_at_word_level(tmp_path):
    for name, text in (("train", "the cat\nthe dog\n"), ("valid", "the <unk>\n"), ("test", "cat")):
        (tmp_path / f"ptb.{name}.txt").write_text(text)
    corpus = load_corpus(str(tmp_path), "word", vocabulary_size=4)
    assert corpus.vocabulary == ["<unk>", "<eos>", "the", "cat"]
    assert corpus.train.tolist() == [2, 3, 1, 2, 0, 1]
    assert corpus.valid.tolist() == [2, 0, 1]
    (tmp_path / "ptb.train.txt").unlink()
    assert "trained on valid" in load_corpus(str(tmp_path), "word").name


def test_unusable_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("  \n")
    for path in ("missing.txt", "empty.txt", "."):
        with pytest.raises(DataError, match="--data"):
            load_corpus(str(tmp_path / path), "char")
    for name, content in (("latin", b"caf\xe9 " * 99), ("zeros", b"text\0" * 99)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"--data .*{name}.*name a text file"):
            load_corpus(str(tmp_path / name), "char")
    with pytest.raises(DataError, match="--data"):
        load_corpus("n" * 300, "char")
    with pytest.raises(DataError, match="too few"):
        Batches(torch.arange(10), batch=4, bptt=3)


def test_batches_walk_through_parallel_streams():
    batches = Batches(torch.arange(21), batch=2, bptt=3)
    assert len(batches) == 3
    rows = [batches.next() for _ in range(4)]
    assert rows[0][0].tolist() == [[0, 10], [1, 11], [2, 12]]
    assert rows[1][1].tolist() == [[4, 14], [5, 15], [6, 16]]
    assert torch.equal(rows[3][0], rows[0][0])
    batches.position = 3
    assert torch.equal(batches.next()[0], rows[1][0])
