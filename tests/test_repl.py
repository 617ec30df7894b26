"""repl.py: what is said, forgotten and refused; the program itself on pipes and on a terminal.

Models are tiny and real. What an answer must be is asked of `generate`, on prompts of `chat.py`.
"""

import errno
import io
import json
import os
import pty
import re
import runpy
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FORKS, ROOT, environment
from test_answers import run_of_ppo, tiny

from nanokl import UserError, chat, checkpoint
from nanokl.answers import open_answers
from nanokl.chat import CHAT_SPECIALS
from nanokl.generate import generate
from nanokl.gpt import GPT, GPTConfig
from nanokl.repl import ENDLESS, LONGEST, Repl, Terminal, load_messages
from nanokl.runtime import generator
from nanokl.stream import visible
from nanokl.tokenizer import SPECIALS, Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of ppo, GPTs without turns, with answers without end, empty, of no text."""
    folder = tmp_path_factory.mktemp("runs")
    run_of_ppo(folder)
    tiny(folder / "plain", specials=SPECIALS)
    constant(folder / "endless", range(ord("a"), ord("z") + 1))
    constant(folder / "silent", range(256, 257))
    constant(folder / "half", range(0xE4, 0xE5))  # begins a Chinese character
    return folder


def constant(path: Path, says: range) -> None:
    """A GPT that says these tokens, all equally likely, whatever it has read; 256 is the stop."""
    tokenizer = Tokenizer([bytes([b]) for b in range(256)], specials=CHAT_SPECIALS)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=8192, n_layer=1, n_head=1,
                          n_embd=2, bias=True, tied=False))
    with torch.no_grad():
        model.norm_final.weight.zero_()
        model.norm_final.bias.fill_(1.0)  # the last state, whatever was read
        model.head.weight.fill_(-100.0)
        model.head.weight[says] = 0
    checkpoint.save(path, model, tokenizer=tokenizer)


class Sink(io.StringIO):
    """A pipe's end; on the text that `at` finds it fails, once, as it is told."""

    def __init__(self, at: str | None = None, failure: BaseException | None = None):
        super().__init__()
        self.at, self.failure = at, failure

    def flush(self) -> None:
        if self.at is not None and self.at in self.getvalue():
            self.at = None
            raise self.failure


@pytest.fixture
def talk(folder, untuned, one_thread):
    """(lines, run, ...) -> the Repl, and its text without the first line."""
    def talk(lines, run="run", messages=(), sink=None, **flags):
        sink = sink or Sink()
        data = lines if isinstance(lines, bytes) else "".join(f"{x}\n" for x in lines).encode()
        answers = open_answers(folder / run, device="cpu", **flags)
        repl = Repl(answers, Terminal(io.BytesIO(data), sink), messages)
        repl.run()
        return repl, sink.getvalue().split("\n", 1)[1]

    return talk


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def mine(text: str) -> dict:
    return {"role": "assistant", "content": text}


def expected(answers, name: str, messages: list[dict], turn: int) -> str:
    """What `generate` says after these messages."""
    prompt, _ = chat.prompt(answers.stage.tokenizer, messages, answers.room)
    model = {"ref": answers.stage.ref, "policy": answers.policy}[name]
    rng, config = generator(answers.seed, "chat", turn), answers.stage.config
    rollout = generate(model, [prompt], config.max_new_tokens, temperature=config.temperature,
                       stop=answers.stop, rng=rng)
    ids = rollout.responses()[0]
    return answers.stage.tokenizer.decode([i for i in ids if i != answers.stop])


def reply(text: str) -> str:
    """What is remembered of it: a reply ends where it would begin somebody else's turn."""
    return re.split(r"<\|(?:user|assistant)\|>", text)[0].strip()


# ------------------------------------------------------------------------------ what is answered
def test_a_conversation_goes_on_with_the_policys_answers(talk):
    repl, said = talk(["how are you?", "", "你好"])
    answers, history, at = repl.answers, [], 0
    for turn, line in enumerate(("how are you?", "你好"), 1):
        history.append(user(line))
        for name in ("ref", "policy"):
            text = expected(answers, name, history, turn)
            shown = f"{name:11}" + visible(text).removeprefix(" ").replace("\n", "\n" + 11 * " ")
            at = said.index(shown, at) + len(shown)
            numbers = re.match(r"\n {11}reward (-\d+\.\d\d)  KL (\d\.\d\d) nats\n", said[at:])
            assert numbers, said[at : at + 99]
            assert name == "policy" or numbers[2] == "0.00"
        history.append(mine(reply(text)))
    assert repl.messages == history and len(history) == 4
    assert said.count("(nothing to answer: say something, or /help)\n") == 1


def test_same_seed_same_lines_same_answers(talk):
    lines = ["hello", "/temp .7", "and you?", "/reset", "hello"]
    for sampler in ("policy", "sir"):
        one, two = (talk(lines, sampler=sampler, n=4)[1] for _ in range(2))
        assert one == two and "(temperature 0.7)\n" in one and "(forgotten)\n" in one
        assert talk(lines, sampler=sampler, n=4, seed=1)[1] != one


@pytest.mark.parametrize("sampler", ["best-of-n", "sir", "mh", "smc", "ref"])
def test_every_sampler_answers(talk, sampler):
    repl, said = talk(["hello"], sampler=sampler, n=4)
    last = repl.messages[-1]
    assert last["role"] == "assistant" and repl.messages[0] == user("hello")
    told = {"best-of-n": "KL at most 0.64 nats  best of 4", "ref": "KL 0.00 nats",
            "mh": "of 4 steps"}.get(sampler, "one of 4, ESS ")
    assert told in said.split(f"{sampler:11}")[1]
    assert said.count("reward ") == (1 if sampler == "ref" else 2)
    if sampler == "ref":
        text = expected(repl.answers, "ref", repl.messages[:1], 1)
        assert visible(text).replace("\n", "\n" + 11 * " ") in said
        assert last["content"] == reply(text)


def test_without_turns_each_line_is_a_text_of_its_own(talk, folder):
    first = talk(["abc"], run="plain", max_new_tokens=9)[1]
    both = talk(["xyz", "abc"], run="plain", max_new_tokens=9)
    assert both[0].messages == [] and both[1].count("policy") == 2
    tokenizer = Tokenizer.load(folder / "plain")
    stop = tokenizer.special("<|endoftext|>")
    model = GPT.from_pretrained(folder / "plain").eval()
    rollout = generate(model, [[stop, *b"abc"]], 9, stop=stop, rng=generator(0, "chat", 1))
    text = tokenizer.decode([i for i in rollout.responses()[0] if i != stop])
    shown = visible(text).replace("\n", "\n" + 11 * " ")
    assert first == f"{'policy':11}…{shown}\n"
    long = talk(["a" * 99], run="plain", max_new_tokens=9)[1]
    assert "(too long: its last 54 tokens are continued)\n" in long and "policy" in long
    with pytest.raises(UserError, match="a tokenizer without turns: give a run"):
        talk([], run="plain", messages=[user("x")])


# ---------------------------------------------------------------------------------- what is said
def test_the_oldest_turns_go_and_that_is_said_once(talk):
    """A context of 64 bytes, 12 of them for the answer; memory is that of the context, too."""
    repl, said = talk([f"line {i}" for i in range(9)])
    note = "(the context is full: the oldest turns are forgotten from here on)\n"
    assert said.count(note) == 1 and said.count("policy") == 9
    assert len(repl.messages) < 9 and repl.messages[-2] == user("line 8")
    repl, said = talk([f"line {i}" for i in range(6)] + ["/reset"] + ["x"] * 6)
    assert said.count(note) == 2
    _, said = talk(["y" * 70])
    assert "(too long: its last 49 tokens are answered)\n" in said and note not in said


def test_commands_and_what_they_refuse(talk):
    lines = ["/temp", "/temp warm", "/temp 0", "/temp nan", "/temp inf", "/beta -1", "/beta 0.5",
             "/temp 2", "/sing", "/help", "//help", "/quit", "never"]  # fmt: skip
    repl, said = talk(lines)
    for line in ("error: /temp '': give a number above 0, as in /temp .5\n",
                 "error: /temp 'warm': give a number above 0, as in /temp .5\n",
                 *(f"error: temperature is {x}: give 0.001 or more\n" for x in (
                     "0.0", "nan", "inf")),
                 "error: beta is -1.0: give a number above 0\n",
                 "(beta 0.5; policy does not heed it)\n", "(temperature 2)\n",
                 "error: /sing is no command: give one of /reset, /temp, /beta, /help, /quit"):
        assert line in said, line
    assert "//...      a line that starts with a slash\n" in said
    assert repl.messages[0] == user("/help") and len(repl.messages) == 2
    assert (repl.answers.beta, repl.answers.stage.config.temperature) == (0.5, 2.0)
    assert "(beta 0.5)\n" in talk(["/beta .5"], sampler="mh")[1]
    assert "error: there is no reward" in talk(["/beta 1"], run="ref")[1]


def test_the_temperature_is_that_of_the_next_answer(talk):
    repl, said = talk(["hi", "/temp 0.01", "/reset", "hi"])
    text = expected(repl.answers, "policy", [user("hi")], 2)
    assert visible(text) in said and repl.messages[-1]["content"] == reply(text)
    _, said = talk(["/temp 0.01", "hi", "/reset", "hi", "/reset", "hi"], run="ref")
    assert len(set(re.findall(r"policy.*", said))) == 1  # next to greedy


def test_hostile_lines(talk):
    lines = [b"\x1b[2J\x00h\x1b[Ai\x07", b"\xff\xfe ok", b"\x00\x1b", b" \t\x1bOP", b"last"]
    repl, said = talk(b"\n".join(lines), max_new_tokens=3)
    assert [m["content"] for m in repl.messages if m["role"] == "user"] == [
        "hi", "\ufffd\ufffd ok", "last"]  # fmt: skip
    assert said.count("(control characters are left out)\n") == 3
    assert said.count("(nothing to answer") == 2
    assert not any(ord(c) < 32 and c not in "\n\t" for c in said)
    _, said = talk(b"/\x1b]0;x\x07" + b"z" * 99 + b"\n")
    assert re.search(r"error: /\]0;xz{35} is no command", said)


def test_a_long_line_is_cut_and_an_endless_one_is_refused(talk):
    repl, said = talk(b"a" * (LONGEST + 10) + b"\nb\n")
    assert said.count("(a long line: what comes after 65,536 bytes is left out)\n") == 1
    assert [m["content"] for m in repl.messages if m["role"] == "user"][-1] == "b"
    assert "long line" not in talk(b"a" * (LONGEST - 1) + b"\n")[1]

    class Endless(io.BytesIO):
        given = 0

        def readline(self, limit=-1):
            self.given += limit
            return b"a" * limit

    source = Endless()
    terminal = Terminal(source, Sink())
    assert terminal.read() == "a" * LONGEST
    with pytest.raises(UserError, match="a line has no end after 64 MiB: give lines"):
        terminal.read()
    assert source.given <= ENDLESS + 2 * LONGEST


def test_what_a_model_says_is_made_visible(talk, folder, tmp_path):
    """A model of all bytes at random: no control character of its reaches the terminal."""
    _, said = talk(["hi"] * 12, run="ref", max_new_tokens=40, temperature=9.0)
    assert "␛" in said or "␀" in said or "␇" in said  # 32 of 263 tokens, 480 draws: odds 1e-20
    assert not any(ord(c) < 32 and c not in "\n\t" or 127 <= ord(c) < 160 for c in said)


def test_an_answer_of_nothing(talk, tmp_path):
    repl, said = talk(["hi", "hi"], run="silent")
    assert said == 2 * f"{'policy':11}(nothing)\n"
    assert repl.messages == [user("hi"), mine("")] * 2
    (tmp_path / "r.py").write_text("def one(ids, texts): return [1] * len(ids)")
    _, said = talk(["hi"], run="silent", reward=f"{tmp_path / 'r.py'}:one", sampler="sir", beta=1)
    assert said == (f"{'ref':11}(nothing)\n{'':11}reward +1.00  KL 0.00 nats\n"
                    f"{'sir':11}(nothing)\n{'':11}reward +1.00  KL about 0.00 nats  one of 64, "
                    "ESS 64.0\n")


def test_an_answer_that_ends_in_mid_character(talk):
    assert talk(["hi"], run="half", max_new_tokens=3)[1] == f"{'policy':11}\ufffd\ufffd\ufffd\n"


# --------------------------------------------------------------------------------- what goes wrong
def test_ctrl_c_forgets_the_turn_and_goes_on(talk):
    repl, said = talk(["one", "two", "/quit"], sink=Sink("policy  ", KeyboardInterrupt()))
    assert said.count("\n(stopped, and forgotten)\n") == 1
    assert [m["content"] for m in repl.messages[::2]] == ["two"]


def test_ctrl_c_at_the_prompt_ends(talk, folder):
    class Interrupted(io.BytesIO):
        def readline(self, limit=-1):
            raise KeyboardInterrupt

    sink = Sink()
    repl = Repl(open_answers(folder / "ref", device="cpu"), Terminal(Interrupted(), sink))
    with pytest.raises(SystemExit) as ended:
        repl.run()
    assert ended.value.code == 130 and sink.getvalue().endswith("\ninterrupted\n")


@pytest.mark.parametrize("failure", [BrokenPipeError(errno.EPIPE, "x"), OSError(errno.EIO, "x")])
def test_a_reader_that_has_gone(talk, failure):
    with pytest.raises(BrokenPipeError):
        talk(["one"], sink=Sink("policy  ", failure))
    with pytest.raises(OSError, match="No space left"):
        talk(["one"], sink=Sink("policy  ", OSError(errno.ENOSPC, "No space left")))


def test_a_keyboard_that_has_gone_is_the_end():
    class Gone(io.BytesIO):
        def readline(self, limit=-1):
            raise OSError(errno.EIO, "x")

    assert Terminal(Gone(), Sink()).read() is None


def test_a_reward_that_fails_is_a_line(talk, tmp_path):
    (tmp_path / "picky.py").write_text(
        "def reward(ids, texts):\n    assert 'bad' not in texts[0], 'a bad word'\n    return [1]")
    repl, said = talk(["bad", "good"], reward=f"{tmp_path / 'picky.py'}:reward")
    assert said.count("error: the reward failed (AssertionError: a bad word): mend it") == 1
    assert [m["content"] for m in repl.messages[::2]] == ["good"]


# ------------------------------------------------------------------------------------- chat files
def test_a_file_to_start_from(talk, tmp_path):
    talks = [[user("a"), mine("b")], [user("c"), mine("d"), user("e")]]
    path = tmp_path / "talks.jsonl"
    rows = [json.dumps({"messages": talk}) for talk in talks]
    path.write_text(f"{rows[0]}\n\n{rows[1]}\n")
    assert load_messages(path, None) == load_messages(path, 1) == talks[0]
    assert load_messages(path, 3) == talks[1]
    for line in (0, 2, 4, -1):
        with pytest.raises(UserError, match=f"no conversation in line {line}: give one of 1 to 3"):
            load_messages(path, line)
    repl, said = talk(["f"], messages=talks[0])
    assert said.startswith("user       a\nassistant  b\nref")
    assert repl.messages[:3] == [*talks[0], user("f")]
    text = expected(repl.answers, "policy", repl.messages[:3], 1)
    assert repl.messages[3]["content"] == reply(text)
    repl, said = talk([], messages=talks[1])  # a question that waits is answered
    assert len(repl.messages) == 4 and said.count("policy") == 1
    path.write_text(f"{rows[0]}\n{{\n")
    with pytest.raises(UserError, match="talks.jsonl line 2 is no conversation: give"):
        load_messages(path, None)


# ------------------------------------------------------------------------------ the program itself
def on(source: str, sink: str, err: str, words: list[str], deaf: bool) -> None:
    """`python WORDS...` in a session of its own; `deaf` to the terminal's hanging up."""
    os.setsid()  # the first terminal that is opened is its own then, with Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if deaf else signal.SIG_DFL)
    modes = ((source, os.O_RDONLY), (sink, os.O_WRONLY), (err, os.O_WRONLY | os.O_CREAT))
    for fd, (path, mode) in enumerate(modes):
        os.dup2(os.open(path, mode), fd)
    # what the fork server has are those of another kind of file
    sys.stdin, sys.stdout, sys.stderr = (
        open(fd, mode, encoding="utf-8", closefd=False)  # noqa: SIM115
        for fd, mode in enumerate("rww"))
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT))
    sys.argv = words
    runpy.run_module("nanokl", run_name="__main__", alter_sys=True)


class Typist:
    """The program on a pseudo-terminal, and who sits there."""

    def __init__(self, folder: Path, *words: str, deaf: bool = False):
        self.master, slave = pty.openpty()
        self.err = folder / "err"
        name = os.ttyname(slave)
        self.process = FORKS.Process(target=on, args=(
            name, name, str(self.err), ["nanokl", "chat", *words, "--device", "cpu"], deaf))
        self.process.start()
        self.slave, self.seen = slave, ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str) -> str:
        """Reads until the pattern is found in what is new."""
        while not (found := re.search(pattern, self.seen, flags=re.S)):
            assert select.select([self.master], [], [], 30)[0], (self.seen, self.err.read_text())
            self.seen += os.read(self.master, 4096).decode("utf-8", "replace")
        self.seen = self.seen[found.end() :]
        return found[0]

    def hang_up(self) -> None:
        os.close(self.slave)
        os.close(self.master)

    def end(self) -> int:
        self.process.join(60)
        assert self.process.exitcode is not None, "it goes on"
        assert self.err.read_text() == ""
        return self.process.exitcode


@pytest.fixture
def typist(folder, tmp_path):
    return lambda **more: Typist(tmp_path, str(folder / "endless"), "--max_new_tokens", "8000",
                                 **more)


def test_ctrl_c_on_a_terminal(typist):
    """In mid-answer it stops the answer, at the prompt the program."""
    at = typist()
    at.wait_for(r"/help has the commands\r\nyou> ")
    at.type("hello\n")
    at.wait_for(r"policy     [a-z]{20}")
    at.type("\x03")
    at.wait_for(r"\(stopped, and forgotten\)\r\nyou> ")
    at.type("/temp 2\n")
    at.wait_for(r"\(temperature 2\)\r\nyou> ")
    at.type("\x03")
    at.wait_for(r"interrupted\r\n")
    assert at.end() == 130


def test_ctrl_d_on_a_terminal(typist):
    at = typist()
    at.wait_for("you> ")
    at.type("\x04")
    assert at.end() == 0


@pytest.mark.parametrize(("deaf", "status"), [(False, -signal.SIGHUP), (True, 1)])
def test_a_terminal_that_goes_away_in_mid_stream(typist, deaf, status):
    """The hang-up signal ends it, or, where that is ignored, the next token that cannot be shown.
    """
    at = typist(deaf=deaf)
    at.wait_for("you> ")
    at.type("hello\n")
    at.wait_for(r"policy     [a-z]{20}")
    at.hang_up()
    assert at.end() == status


def test_a_file_of_lines_and_no_terminal(folder, tmp_path):
    """No prompts between the answers."""
    lines, out, err = (tmp_path / name for name in ("lines", "out", "err"))
    lines.write_text("你好\n/temp 2\nbye")
    out.touch()
    words = ["nanokl", "chat", str(folder / "endless"), "--max_new_tokens", "5", "--device", "cpu"]
    process = FORKS.Process(target=on, args=(str(lines), str(out), str(err), words, False))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and err.read_text() == ""
    assert re.fullmatch(r"a conver[^\n]*\npolicy     [a-z]{5}\n\(temperature 2\)\n"
                        r"policy     [a-z]{5}\n", out.read_text())  # fmt: skip


def test_a_reader_that_goes_away_in_mid_stream(folder):
    """As from a shell, `| head -c 100`: status 1, and no traceback."""
    words = [sys.executable, "-m", "nanokl", "chat", str(folder / "endless"), "--device", "cpu",
             "--max_new_tokens", "8000"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(words, cwd=ROOT, env=environment(), **pipes) as process:
        process.stdin.write("你好\n".encode())
        process.stdin.flush()
        assert b"a conversation; policy at temperature 1" in process.stdout.readline()
        assert re.fullmatch(rb"policy     [a-z]{9}", process.stdout.read(20))
        process.stdout.close()
        assert process.wait(60) == 1 and process.stderr.read() == b""
