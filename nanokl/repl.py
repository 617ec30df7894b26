"""A conversation in the terminal: prior and posterior answer each line, one after the other.

    python -m nanokl chat runs/sums-ppo

Lines come from a keyboard or a pipe. Where the tokenizer has turns they make a conversation, whose
oldest turns go when the context is full; where it has none each line is a text to continue. What
continues the conversation is the last answer, the sampler's. Left out: line editing beyond the
terminal's own, saving what was said.
"""

import errno
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, TextIO

import tyro

from nanokl import UserError, chat
from nanokl.answers import SAMPLERS, STREAMED, TILTED, Answers, open_answers
from nanokl.stream import Characters, visible

LONGEST = 1 << 16  # bytes that are read of a line
ENDLESS = 1 << 26  # bytes of one line, after which no end of it is waited for
INDENT = 11  # columns of the names
NOTHING = "(nothing)"  # of an answer that ends where it begins
KEYS = r"\x1b[\[O][0-9;]*[A-Za-z~]"  # what arrows and other such keys send
HELP = """/reset     forget what was said
/temp X    sample, and measure, at temperature X from here on
/beta X    the price of a nat that sir, mh and smc heed
/help      this
/quit      the end, as Ctrl-D; Ctrl-C stops an answer, and its turn is forgotten
//...      a line that starts with a slash
"""


class Terminal:
    """Lines in and text out, of a terminal or of pipes.

    A reader that has gone is BrokenPipeError, a terminal that has gone too.
    """

    def __init__(self, source: BinaryIO, sink: TextIO):
        self.source, self.sink = source, sink
        self.asks = source.isatty() and sink.isatty()  # a pipe wants no prompt in its text
        self._rest = False  # of a line that was cut is still to come
        self.within = False  # a line of text has begun and not ended

    @classmethod
    def standard(cls) -> "Terminal":
        """Standard input and output; what the latter's encoding lacks is replaced."""
        if sys.stdin is None or sys.stdout is None:
            raise UserError("standard input or output is closed: open both")
        sys.stdout.reconfigure(errors="replace")
        return cls(sys.stdin.buffer, sys.stdout)

    def say(self, text: str) -> None:
        self.within = not text.endswith("\n") if text else self.within
        try:
            self.sink.write(text)
            self.sink.flush()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise BrokenPipeError(errno.EPIPE, "the terminal has gone") from None

    def read(self) -> str | None:
        """The next line, at most LONGEST bytes of it; None at the end."""
        if self.asks:
            self.say("you> ")
        try:
            self._skip()
            line = self.source.readline(LONGEST)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return None
        self._rest = len(line) == LONGEST and not line.endswith(b"\n")
        if self._rest:
            self.say(f"(a long line: what comes after {LONGEST:,} bytes is left out)\n")
        return line.decode("utf-8", "replace") if line else None

    def _skip(self) -> None:
        """Reads to the end of a line that was cut; UserError where none comes."""
        skipped = 0
        while self._rest:
            piece = self.source.readline(LONGEST)
            self._rest, skipped = bool(piece) and not piece.endswith(b"\n"), skipped + len(piece)
            if skipped > ENDLESS:
                raise UserError(f"a line has no end after {ENDLESS >> 20} MiB: give lines")


class Repl:
    """A conversation as it goes on: what was said, and the commands."""

    def __init__(self, answers: Answers, terminal: Terminal, messages: Sequence[dict] = ()):
        self.terminal, self.say, self.read = terminal, terminal.say, terminal.read
        self.answers = answers
        self.asks, self.tokenizer = terminal.asks, answers.stage.tokenizer
        self.talks = set(chat.TURNS.values()) <= set(self.tokenizer.specials)
        if messages and not self.talks:
            raise UserError("a conversation to start from, and a tokenizer without turns: give a "
                            "run of train_rlhf.py sft, or one that started there, or no --file")
        self.messages, self.turn, self.full = list(messages), 0, False
        self.commands: dict[str, Callable[[str], None] | None] = {
            "/reset": self._reset, "/temp": self._temp, "/beta": self._beta,
            "/help": lambda _: self.say(HELP), "/quit": None}

    def run(self) -> None:
        """Answers lines until their end; Ctrl-C in an answer stops it, elsewhere ends with 130."""
        self._begin()
        going = True
        while going:
            try:
                line = self.read()
            except KeyboardInterrupt:
                self.say("\ninterrupted\n")
                raise SystemExit(130) from None
            if line is None and self.asks:
                self.say("\n")
            going = line is not None and self._guard(self._take, line) is not False

    def _guard(self, do: Callable, *args):
        """A mistake is a line, and Ctrl-C the end of this one alone."""
        try:
            return do(*args)
        except UserError as error:
            begun = "\n" * self.terminal.within
            self.say(f"{begun}error: {' '.join(str(error).split())}\n")
        except KeyboardInterrupt:
            self.say("\n(stopped, and forgotten)\n")

    def _begin(self) -> None:
        answers, config = self.answers, self.answers.stage.config
        beta = f", beta {answers.beta:g}" if answers.beta else ""
        kind = "a conversation" if self.talks else (
            "no turns in this tokenizer: each line is a text to continue, by itself")
        self.say(f"{kind}; {' and '.join(answers.names)} at temperature {config.temperature:g}"
                 f"{beta}; /help has the commands\n")
        for message in self.messages:
            self._head(message["role"])
            self.say(_indented(visible(message["content"])) + "\n")
        if self.messages and self.messages[-1]["role"] == "user":
            self._guard(self._converse, self.messages)

    def _take(self, line: str) -> bool:
        """One line: a command or something said; False: it was the last."""
        text = chat.clean(re.sub(KEYS, "", line))
        if any(unicodedata.category(c) == "Cc" and not c.isspace() for c in line):
            self.say("(control characters are left out)\n")
        name, _, rest = text.partition(" ")
        if not text:
            self.say("(nothing to answer: say something, or /help)\n")
        elif text.startswith("//") or not text.startswith("/"):
            self._answer(text.removeprefix("/"))
        elif name not in self.commands:
            raise UserError(f"{visible(name)[:40]} is no command: give one of "
                            f"{', '.join(self.commands)}, or // for a line that starts with /")
        elif name != "/quit":
            self.commands[name](rest)
        return name != "/quit"

    # ------------------------------------------------------------------------------ the commands
    def _reset(self, _: str) -> None:
        self.messages, self.full = [], False
        self.say("(forgotten)\n")

    def _temp(self, value: str) -> None:
        self.answers = self.answers.at(temperature=_number("/temp", value))
        self.say(f"(temperature {self.answers.stage.config.temperature:g})\n")

    def _beta(self, value: str) -> None:
        if self.answers.stage.reward is None:
            raise UserError("there is no reward to weigh against a nat: start with --reward")
        self.answers = self.answers.at(beta=_number("/beta", value))
        sampler = self.answers.sampler
        heeds = "" if sampler in TILTED else f"; {sampler} does not heed it"
        self.say(f"(beta {self.answers.beta:g}{heeds})\n")

    # ------------------------------------------------------------------------------- the answers
    def _answer(self, text: str) -> None:
        if self.talks:
            self._converse([*self.messages, {"role": "user", "content": text}])
            return
        ids, room = self.tokenizer.encode(text), self.answers.room - 1
        if len(ids) > room:
            self.say(f"(too long: its last {room} tokens are continued)\n")
        self._all_answer([self.answers.stop, *ids[-room:]])

    def _converse(self, messages: list[dict]) -> None:
        """What is said is remembered when it has been answered."""
        room = self.answers.room
        prompt, dropped = chat.prompt(self.tokenizer, messages, room)
        if dropped and not self.full:
            self.say("(the context is full: the oldest turns are forgotten from here on)\n")
            self.full = True
        turn = chat.encode_turn(self.tokenizer, "user", messages[-1]["content"])
        if len(turn) > room - 2:
            self.say(f"(too long: its last {room - 3} tokens are answered)\n")
        reply = self._all_answer(prompt)
        self.messages = [*messages[dropped:], {"role": "assistant", "content": reply}]

    def _all_answer(self, prompt: list[int]) -> str:
        """Prior and posterior, one after the other; the last one's text."""
        self.turn += 1
        for name in self.answers.names:
            self._head(name)
            show = self._stream if name in STREAMED else self._choose
            ids, numbers = show(name, prompt)
            self.say(f"\n{'':{INDENT}}{numbers}\n" if numbers else "\n")
        return chat.reply_text(self.tokenizer, ids)

    def _head(self, name: str) -> None:
        self.say(f"{name:{INDENT}}")

    def _stream(self, name: str, prompt: list[int]) -> tuple[list[int], str]:
        """Token by token; its ids, and what they are worth in words."""
        ids, characters, begun = [], Characters(), False
        for token in self.answers.stream(name, prompt, self.turn):
            ids.append(token)
            if token != self.answers.stop:
                text = characters.add(self.tokenizer.decode_bytes([token]))
                self.say(_indented(text if begun else self._first(text)))
                begun = begun or bool(text)
        self.say(characters.end() or ("" if begun else NOTHING))
        return ids, self.answers.judge(name, prompt, ids)

    def _choose(self, name: str, prompt: list[int]) -> tuple[list[int], str]:
        """A whole text, chosen among many."""
        draws = self.answers.draw(prompt, self.turn)
        ids = draws.rollout.responses()[0]
        text = visible(self.tokenizer.decode([i for i in ids if i != self.answers.stop]))
        self.say(_indented(self._first(text)) or NOTHING)
        return ids, self.answers.tell(draws)

    def _first(self, text: str) -> str:
        """How an answer begins: where it goes on with a text, a space there says something."""
        return text.removeprefix(" ") if self.talks or not text else "\u2026" + text


def _indented(text: str) -> str:
    return text.replace("\n", "\n" + INDENT * " ")


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise UserError(f"{name} {visible(value)[:40]!r}: give a number above 0, as in {name} .5"
                        ) from None


def load_messages(path: Path, line: int | None) -> list[dict]:
    """The conversation of a chat file's line, None: of its first; UserError for a file or line.

    Lines count from 1, as in the errors of `chat.load_conversations`, and empty ones too.
    """
    talks = chat.load_conversations(path, None)
    path = path / chat.FILE if path.is_dir() else path
    rows = path.read_bytes().split(b"\n")
    numbers = [i for i, row in enumerate(rows, 1) if row.strip()]
    if line is not None and line not in numbers:
        raise UserError(f"{path} has no conversation in line {line}: give one of 1 to "
                        f"{numbers[-1]}")
    return talks[0 if line is None else numbers.index(line)].messages


@dataclass
class Chat:
    """A conversation in the terminal: prior and posterior answer each line, with reward and KL."""

    run: Annotated[Path, tyro.conf.Positional]  # of train_rlhf.py ppo or sft, or any GPT
    sampler: Literal[SAMPLERS] = "policy"  # who answers beside the reference
    n: int = 64  # of best-of-n; proposals of sir, steps of mh, particles of smc
    reward: str | None = None  # a reward run, or FILE.py:FUNCTION; a run of ppo has its own
    beta: float | None = None  # price of a nat for sir, mh and smc; a run of ppo has its own
    temperature: float | None = None  # the run's own, or 1
    max_new_tokens: int | None = None  # longest answer; the run's own, or 40
    file: Path | None = None  # a chat file whose first conversation goes on
    line: int | None = None  # the conversation in this line of it
    seed: int = 0  # same seed, same lines, same answers
    device: str = "auto"  # auto, cpu, cuda or mps

    def __call__(self) -> None:
        if self.line is not None and self.file is None:
            raise UserError(f"line is {self.line} and there is no file: give --file, too")
        messages = [] if self.file is None else load_messages(self.file, self.line)
        given = {f.name: getattr(self, f.name) for f in fields(self)
                 if f.name not in ("run", "file", "line")}
        Repl(open_answers(self.run, **given), Terminal.standard(), messages).run()
