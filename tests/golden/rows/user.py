"""What a user's own file gives: rewards, one of which leaves completions unscored, an environment, a map of rows."""


def odd_digits(completion, *, share: float = 0.5):
    """None where there is nothing to score."""
    digits = [c for c in completion.text if c.isdigit()]
    return None if len(digits) < 2 else share * sum(c in "13579" for c in digits)


def last_turn(completion, turns):
    return len(turns) - 0.1 * len(completion.text)


def reply(text, turns, example):
    """A reply as long as what was said, so that episodes of one prompt differ in length from the second turn on."""
    if len(turns) > 2 or text.endswith("9"):
        return None
    return f"{example['prompt'][:1]}{len(text) % 10}" + "+" * (len(text) % 4)


def harder(row):
    return {**row, "prompt": row["prompt"].replace("0", "9")}
