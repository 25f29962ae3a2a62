from stubs import Letters

from rlpost.engine.stopping import StopStrings, finished

A, B, C, END = 0, 1, 2, 40


def test_an_end_token_is_kept_in_the_ids_and_left_out_of_the_text():
    c = finished([A, B, END], [-1.0, -2.0, -3.0], True, (END,), StopStrings(Letters(eos=7), []))
    assert (tuple(c.ids), tuple(c.action), c.text, c.finish) == ((A, B, END), (True, True, True), "ab", "stop")
    assert tuple(c.logprobs) == (-1.0, -2.0, -3.0)


def test_running_out_of_length():
    c = finished([A, B], [-1.0, -2.0], False, (END,), StopStrings(Letters(eos=END), ["c"]))
    assert (c.text, c.finish) == ("ab", "length")


def test_the_text_ends_before_the_first_stop_string():
    stops = StopStrings(Letters(), ["ca", "b"])
    assert finished([A, C, B, A], [0.0] * 4, True, (), stops).text == "ac"
    assert finished([A, C, A, B], [0.0] * 4, True, (), stops).text == "a"


def test_a_special_token_can_be_named_as_a_stop_string():
    stops = StopStrings(Letters(eos=END), ["</s>"])
    assert stops.hit([A, END])
    assert not stops.hit([A, B])
    assert finished([A, END], [0.0] * 2, True, (), stops).text == "a"


def test_no_stop_strings_is_false_and_the_empty_one_is_ignored():
    assert not StopStrings(Letters(), [])
    assert not StopStrings(Letters(), [""])
    assert StopStrings(Letters(), ["x"])


def test_the_tail_reaches_over_a_stop_string_of_one_token_a_byte():
    assert StopStrings(Letters(), ["é" * 10, "a"]).tail >= 40
