"""data/arithmetic/prepare.py: right answers, and slips of a stated kind at a stated rate."""

import json
import runpy
from pathlib import Path

import pytest

from nanokl import UserError
from nanokl.dialogue import numbers, split_of

PROGRAM = runpy.run_path(str(Path(__file__).parents[1] / "data" / "arithmetic" / "prepare.py"))
Flags, dialogues, without_carry = (PROGRAM[k] for k in ("Flags", "dialogues", "without_carry"))


def digit_sum(n: int) -> int:
    return sum(map(int, str(n)))


def test_a_forgotten_carry():
    for a, b, slip in ((27, 5, 22), (95, 7, 92), (178, 264, 332), (250, 270, 420), (199, 1, 190),
                       (5, 7, 12), (295, 299, 484), (2, 3, 5), (0, 0, 0), (1234, 90, 1224)):
        assert without_carry(a, b) == without_carry(b, a) == slip, (a, b)
    for a in range(300):  # each carry takes 10 out of a column and brings 1 to the next
        for b in range(a, 300):
            carries, rest = divmod(digit_sum(a) + digit_sum(b) - digit_sum(a + b), 9)
            at_first = a + b >= 10 ** len(str(b))  # out of the first column: written all the same
            assert rest == 0 and (without_carry(a, b) == a + b) == (carries == at_first), (a, b)


@pytest.mark.parametrize("slips", [0.0, 0.5, 1.0])
def test_slips_come_first_and_the_right_sum_last(slips):
    corpus = dialogues(Flags(train=1500, held_out=100, slips=slips))
    rows = [json.loads(line) for line in corpus.files["conversations.jsonl"].splitlines()]
    said = chance = high = 0
    for row in rows:
        a, b = numbers(row["messages"][0]["content"])[-2:]
        replies = [numbers(m["content"]) for m in row["messages"] if m["role"] == "assistant"]
        assert split_of(a, b) == row["split"] and replies[-1] == [a, b, a + b]
        assert replies[:-1] in ([], [[a, b, without_carry(a, b)]]) and len(row["messages"]) % 2
        if without_carry(a, b) != a + b:
            chance, said = chance + 1, said + len(replies) - 1
            high += (len(replies) - 1) * (a + b >= 300)
        else:
            assert len(replies) == 1
    # 5 standard deviations: one false alarm in 1.7 million; and no bond with the size of the sum
    assert abs(said - slips * chance) <= 5 * (chance * slips * (1 - slips)) ** 0.5
    if slips == 0.5:
        of_high = sum(without_carry(*q) != sum(q) and sum(q) >= 300 for q in
                      (numbers(row["messages"][0]["content"])[-2:] for row in rows))
        assert of_high > 400 and abs(high - of_high / 2) <= 5 * (of_high / 4) ** 0.5


def test_a_share_has_bounds():
    for slips in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=f"slips is {slips}: give 0 to 1"):
            Flags(slips=slips)
