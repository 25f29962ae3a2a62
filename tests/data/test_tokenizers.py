import pytest
from transformers import AutoTokenizer

from rlpost.data.codec import make_codec
from rlpost.data.params import Tokenizer, TokenizerKind
from rlpost.data.tokenizers import make_tokenizer
from rlpost.errors import DataError, ModelError, RecipeError

TEXTS = ["the cat sat on the mat. ", "A cat's “tail” — naïve\n\n  two  spaces\t!", "12 + 34 = 46 <eos>"]


def bpe(size=320, texts=TEXTS * 5):
    return make_tokenizer(Tokenizer(kind=TokenizerKind.bpe, vocab_size=size), texts)


def characters(alphabet):
    return make_tokenizer(Tokenizer(kind=TokenizerKind.characters, alphabet=alphabet))


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def test_characters_have_one_token_each_in_the_order_of_the_alphabet():
    tokenizer = characters("ab\n é")
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert ids(tokenizer, "ba\n é a") == [5, 4, 6, 7, 8, 7, 4]
    assert tokenizer.encode("ab") == [4, 5]  # nothing added on its own
    assert len(tokenizer) == 9


@pytest.mark.parametrize("text", ["a b . , 'a", " a", "a ", "a  b", "\n\na", "don 't ."])
def test_characters_round_trip(text):
    tokenizer = characters("ab.,' \ndont")
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_an_unknown_character_is_named():
    codec = make_codec(characters("ab"))
    with pytest.raises(DataError, match=r"row 3: the tokenizer has no token for 'é'.*alphabet"):
        codec.ids("abéb", "row 3")


@pytest.mark.parametrize("text", [*TEXTS, "日本語 🙂 never seen", " lead", "trail ", "a\r\nb\x00"])
def test_bpe_round_trips_any_text(text):
    tokenizer = bpe()
    assert tokenizer.decode(ids(tokenizer, text)) == text


def test_bpe_has_fixed_specials_its_size_and_merges():
    tokenizer = bpe(size=270)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 270
    assert tokenizer.encode("") == []
    assert len(ids(tokenizer, "the")) < 3
    assert ids(tokenizer, "a<eos>")[-1] == 2


def test_bpe_is_the_same_every_time():
    assert bpe().get_vocab() == bpe().get_vocab()


@pytest.mark.parametrize("make", [bpe, lambda: characters("the cats.")])
def test_saved_and_loaded(make, tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    text = "the  cat sat ."
    assert ids(loaded, text) == ids(tokenizer, text)
    assert loaded.decode(ids(loaded, text)) == text
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert loaded.unk_token_id == tokenizer.unk_token_id
    assert loaded.encode("") == []


def test_refusals():
    with pytest.raises(RecipeError, match="alphabet is empty"):
        characters("")
    with pytest.raises(RecipeError, match="vocab_size is 258: give at least 259"):
        bpe(size=258)
    with pytest.raises(DataError, match="no text"):
        bpe(texts=[""])


def test_a_tokenizer_without_end_token_is_refused():
    tokenizer = characters("ab")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end token"):
        make_codec(tokenizer)
