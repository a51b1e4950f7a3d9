import pytest

from paligemma_jax.errors import InvalidPromptError
from paligemma_jax.processing import prompts


def test_task_language():
    assert prompts.caption() == "caption en"
    assert prompts.caption("pt-BR") == "caption pt-BR"
    assert prompts.answer(" what is it? ", "de") == "answer de what is it?"
    assert prompts.count("red cats") == "answer en how many red cats are there?"
    assert prompts.ocr() == "ocr"
    assert prompts.detect("cat") == "detect cat"
    assert prompts.detect(["cat", " big dog "]) == "detect cat ; big dog"
    assert prompts.detect("cat;big dog") == "detect cat ; big dog"
    assert prompts.segment(("cat", "dog")) == "segment cat ; dog"


@pytest.mark.parametrize("language", ["", "e", "english please", "en\n", None, "en;"])
def test_bad_language(language):
    with pytest.raises(InvalidPromptError, match="no language code"):
        prompts.caption(language)


@pytest.mark.parametrize("text", ["", "  \n", None, 3])
def test_empty_text(text):
    for build in (prompts.answer, prompts.count):
        with pytest.raises(InvalidPromptError, match="Words fit"):
            build(text)


@pytest.mark.parametrize(
    "labels", ["", [], ["cat", ""], ["cat ; dog"], "a;", "a\nb", ["a\nb"], [None]]
)
def test_bad_labels(labels):
    for build in (prompts.detect, prompts.segment):
        with pytest.raises(InvalidPromptError, match="fit"):
            build(labels)
