"""Beside other programs, on random data; needs what the extra "parity" installs."""

import random
import re
import shutil
import string

import pytest

from paligemma_jax.evaluation.caption_metrics import stem
from paligemma_jax.evaluation.metrics import (
    BLEU,
    CIDEr,
    RougeL,
    anls_score,
    indel_similarity,
    levenshtein,
    text_recognition,
    tokenize,
)

pytestmark = pytest.mark.parity
WORDS = (
    "a can't the man dog cats cat riding rides ride red big bike on in of street tree trees".split()
)


def sentences(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(count)]


def test_captions_beside_pycocoevalcap():
    cider = pytest.importorskip("pycocoevalcap.cider.cider", reason="pycocoevalcap is not here")
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    captions, others = sentences(200, 0), sentences(600, 1)
    references = [others[3 * i : 3 * i + 1 + i % 3] for i in range(200)]
    theirs = {i: [caption] for i, caption in enumerate(captions)}
    truth = dict(enumerate(references))
    value, each = cider.Cider().compute_score(truth, theirs)
    metric = CIDEr(tokenizer=str.split).add_all(captions, references)
    assert metric.result()["cider"] == pytest.approx(value)
    assert list(metric.example_scores.values()) == pytest.approx(list(each))
    values, _ = bleu.Bleu(4).compute_score(truth, theirs, verbose=0)
    result = BLEU(tokenizer=str.split).add_all(captions, references).result()
    assert [result[f"bleu-{n}"] for n in range(1, 5)] == pytest.approx(values)
    value, _ = rouge.Rouge().compute_score(truth, theirs)
    result = RougeL(tokenizer=str.split).add_all(captions, references).result()
    assert result["rouge-l"] == pytest.approx(value)


@pytest.mark.skipif(not shutil.which("java"), reason="Java is not installed")
def test_words_beside_java():
    module = pytest.importorskip(
        "pycocoevalcap.tokenizer.ptbtokenizer", reason="pycocoevalcap is not here"
    )
    rng = random.Random(0)
    marks = ["", "", "", ",", ".", "!", "?", "'s", "'ll", ' "x"', " (y)", ";", " - ", "-a"]
    texts = [
        " ".join(word + rng.choice(marks) for word in sentence.split())
        for sentence in sentences(300, 2)
    ]
    theirs = module.PTBTokenizer().tokenize({i: [{"caption": t}] for i, t in enumerate(texts)})
    same = [tokenize(text) == theirs[i][0].split() for i, text in enumerate(texts)]
    assert sum(same) >= 0.97 * len(texts), [t for t, s in zip(texts, same, strict=True) if not s]


def test_edits_beside_rapidfuzz():
    distance = pytest.importorskip("rapidfuzz.distance", reason="the extra eval has rapidfuzz")
    rng = random.Random(0)
    for _ in range(500):
        a, b = ("".join(rng.choices("abc ", k=rng.randint(0, 90))) for _ in range(2))
        assert levenshtein(a, b) == distance.Levenshtein.distance(a, b)
        expected = distance.Indel.normalized_similarity(a, b)
        assert indel_similarity(a, b) == pytest.approx(expected)


def test_error_rates_beside_jiwer():
    jiwer = pytest.importorskip("jiwer", reason="jiwer is not here")
    right, read = sentences(50, 3), sentences(50, 4)
    result = text_recognition(read, right)
    assert result["wer"] == pytest.approx(jiwer.wer(right, read))
    assert result["cer"] == pytest.approx(jiwer.cer(right, read))


def test_anls_beside_anls():
    anls = pytest.importorskip("anls", reason="anls is not here")
    rng = random.Random(0)
    for _ in range(500):
        read, *right = ("".join(rng.choices("abAB ", k=rng.randint(1, 8))) for _ in range(3))
        expected = anls.anls_score(prediction=read, gold_labels=right, threshold=0.5)
        assert anls_score(read, right) == pytest.approx(expected), (read, right)


def test_stems_beside_nltk():
    snowball = pytest.importorskip("nltk.stem.snowball", reason="nltk is not here")
    theirs = snowball.SnowballStemmer("english")
    text = " ".join(string.__doc__ or "") + (random.__doc__ or "") + (re.__doc__ or "")
    words = {*re.findall("[a-z]{3,}", text.lower()), *WORDS}
    assert len(words) > 100
    assert [w for w in sorted(words) if stem(w) != theirs.stem(w)] == []
