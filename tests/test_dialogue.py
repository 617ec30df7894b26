"""dialogue.py: gymnasium's contract, one dialogue a seed, pairs of numbers that no other split has.

Gymnasium itself is asked where it is installed.
"""

import inspect
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanokl import UserError
from nanokl.chat import CHAT_SPECIALS
from nanokl.dialogue import SPLITS, WORDS, Arithmetic, arithmetic, last_number, right, split_of
from nanokl.tokenizer import train_bpe

TOKENIZER = train_bpe("what is 7 plus 5? " * 9, 300, specials=CHAT_SPECIALS)
START = TOKENIZER.special("<|endoftext|>")


def test_a_dialogue_from_the_article():
    env = Arithmetic(languages=("zh",))
    obs, info = env.reset(seed=0, options={"a": 2, "b": 3, "question": 0})
    assert obs == ({"role": "user", "content": "如何计算两个数的和:2和3?"},)
    assert info == {"a": 2, "b": 3, "language": "zh", "model_reply": "2 + 3 = 5"}
    obs, reward, terminated, truncated, info = env.step(info["model_reply"])
    assert [m["content"] for m in obs[1:]] == ["2 + 3 = 5", "谢谢。"]
    assert (reward, terminated, truncated) == (1.0, True, False)
    with pytest.raises(UserError, match="is over: call reset"):
        env.step("5")


def test_wrong_replies_get_another_try_and_then_it_is_cut_off():
    env = Arithmetic(turns=2, languages=("en",))
    with pytest.raises(UserError, match="has not begun"):
        env.step("5")
    _, info = env.reset(seed=1)
    wrong = str(info["a"] + info["b"] + 1)
    obs, *rest = env.step(wrong)
    assert rest[:3] == [0.0, False, False] and obs[-1]["content"] == "No, try again."
    assert env.step("no idea")[1:4] == (0.0, False, True)
    env.reset(seed=1)
    env.step(wrong)
    assert env.step(info["model_reply"])[1:4] == (1.0, True, False)  # solved at the last try
    assert len(env.messages) == 5


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.sampled_from(list(SPLITS)))
def test_all_chance_is_in_the_seed(seed, split):
    one, two = Arithmetic(split, turns=3), Arithmetic(split, turns=3)
    assert one.reset(seed=seed) == two.reset(seed=seed)
    for reply in ("1000", "x", "7"):
        a, b = one.step(reply), two.step(reply)
        assert a == b
        if a.terminated or a.truncated:
            break
    _, info = one.reset(seed=seed)
    assert split_of(info["a"], info["b"]) == split


def test_splits_share_no_pair():
    """A hash of 5,050 pairs: its shares are off by .025 with odds below 1e-6."""
    pairs = list(itertools.combinations_with_replacement(range(100), 2))
    splits = [split_of(a, b) for a, b in pairs]
    assert splits == [split_of(b, a) for a, b in pairs]
    for name, (low, high) in SPLITS.items():
        assert abs(splits.count(name) / len(pairs) - (high - low)) < 0.025
    seen = {tuple(sorted((info["a"], info["b"]))) for seed in range(300)
            for info in [Arithmetic("test").reset(seed=seed)[1]]}
    assert {split_of(*pair) for pair in seen} == {"test"} and len(seen) > 100


def test_every_question_can_be_asked():
    env, asked = Arithmetic(), set()
    for seed in range(200):
        obs, info = env.reset(seed=seed)
        asked.add((info["language"], re.sub(r"\d+", "#", obs[0]["content"])))
    wanted = {(name, q.format(a="#", b="#")) for name, w in WORDS.items() for q in w.questions}
    assert wanted <= asked


@pytest.mark.parametrize(("text", "number"), [
    ("2 + 3 = 5", 5), ("5", 5), ("the sum is 05.", 5), ("５", 5), ("5 + 2", 2), ("", None),
    ("five", None), ("9" * 30, None), ("-5", -5), ("1,234", 234), ("7-5", 5), ("0.3", None),
    ("1 + 2 = -3", -3), ("12。", 12),
])  # fmt: skip
def test_last_number(text, number):
    assert last_number(text) == number


def ids_of(text: str) -> list[int]:
    """A text's ids, its special tokens as such, behind the one that starts it."""
    parts = re.split(r"(<\|\w+\|>)", text)
    return [START, *(i for part in parts for i in (
        [TOKENIZER.special(part)] if part in CHAT_SPECIALS else TOKENIZER.encode(part)))]


def test_the_reward_of_a_written_dialogue():
    ask, reply = "<|user|> What is 7 plus 5?", "<|assistant|> 7 + 5 = "
    texts = [f"{ask}{reply}12", f"{ask}{reply}13", f"{ask}{reply}", ask, "12",
             f"{ask}{reply}13<|user|> No, try again.<|assistant|> 12",
             "<|user|> 7加5等于多少?<|assistant|> 12。", f"{ask}<|assistant|> 12 + 0"]
    assert right(list(map(ids_of, texts)), texts) == [1, 0, 0, 0, 0, 0, 1, 0]
    assert right([[]], [texts[0]]) == [0]  # no text begins without a token
    for seed in range(50):  # the environment agrees
        env = Arithmetic()
        obs, info = env.reset(seed=seed)
        for reply in (info["model_reply"], "7"):
            env.reset(seed=seed)
            text = f"<|user|> {obs[0]['content']}<|assistant|> {reply}"
            assert right([ids_of(text)], [text]) == [env.step(reply).reward]


def test_a_reply_that_asks_itself_something_easier_earns_nothing():
    question, end = "<|user|> 255 + 191 = ?<|assistant|>", "<|endoftext|>"
    texts = [f"{question} 0 0<|assistant|> 0{end}", f"{question} 0 0<|assistant|> 0",
             f"{question} 1<|user|> 2 + 2<|assistant|> 4", f"{question} 446{end}",
             f"{question} 1{end}<|user|> 2 + 2<|assistant|> 4{end}", f"<|user|> {'9' * 5000} + 1"]
    ids = list(map(ids_of, texts))
    assert right(ids, [text.replace(end, "") for text in texts]) == [0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(("first", "says", "second", "score"), [
    ("27 + 5 = 22", "No, try again.", "27 + 5 = 32", 1), ("27 + 5 = 32", "Thank you.", "37", 0),
    ("27 + 5 = 22", "No, try again.", "27 + 5 = 27", 0), ("32", "That is 1.", "32", 1),
    ("27 + 5 = 32", "And 1 more: 32 + 1?", "33", 1), ("22", "9 and 9?", "18", 1),
])  # fmt: skip
def test_a_second_reply_answers_what_the_user_asked(first, says, second, score):
    text = (f"<|user|> 27 + 5 = ?<|assistant|> {first}<|endoftext|><|user|> {says}"
            f"<|assistant|> {second}<|endoftext|>")
    assert right([ids_of(text)], [text.replace("<|endoftext|>", "")]) == [score]


def test_bad_settings():
    for fields, says in (({"split": "all"}, "split is 'all'"), ({"languages": ("fr",)}, "en, zh"),
                         ({"languages": ()}, "languages"), ({"highest": 3}, "highest is 3"),
                         ({"turns": 0}, "turns 0")):
        with pytest.raises(UserError, match=says):
            Arithmetic(**fields)
    for options, says in (({"a": "x"}, "a is 'x'"), ({"b": 1.5}, "b 1.5: give whole numbers"),
                          ({"a": True}, "a is True"), ({"language": []}, "language is .*give one"),
                          ({"question": 9}, "question is 9: give 0 to 3"),
                          ({"question": 1.0}, "question is 1.0: give 0 to 3")):
        with pytest.raises(UserError, match=says):
            Arithmetic().reset(seed=0, options=options)
    with pytest.raises(UserError, match="language is 'fr': give one of en, zh"):
        Arithmetic().reset(seed=0, options={"language": "fr"})


def test_sums_are_as_large_as_those_of_the_data(tmp_path):
    make = lambda: arithmetic(split="val", turns=2, data=tmp_path, score=None)  # noqa: E731
    assert make().highest == Arithmetic.highest
    (tmp_path / "meta.json").write_text('{"settings": {"highest": 20}}')
    env = make()
    assert (env.highest, env.turns, env.split) == (20, 2, "val")
    assert 10 < max(env.reset(seed=seed)[1]["a"] for seed in range(200)) <= 20


def test_gymnasiums_signatures():
    reset = inspect.signature(Arithmetic.reset).parameters
    assert [(p.name, p.kind.name) for p in reset.values()][1:] == [
        ("seed", "KEYWORD_ONLY"), ("options", "KEYWORD_ONLY")]
    gymnasium = pytest.importorskip("gymnasium")
    theirs = inspect.signature(gymnasium.Env.reset).parameters
    assert {n: p.kind for n, p in theirs.items()} == {n: p.kind for n, p in reset.items()}
    assert list(inspect.signature(gymnasium.Env.step).parameters) == ["self", "action"]
