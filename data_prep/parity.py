"""Whether a faster backend gives the ids of Hugging Face's `tokenizers`: a process beside the workers that encodes samples again.

Two kinds of samples go to it. One is taken from all over the corpus before the first shard is made; it decides whether the backend is
used at all. The other is a document of every batch that a worker encodes. The process loads `tokenizers` while its parent loads the
faster backend, and compares while the workers are under way, so that neither costs the run its time. Nothing is committed meanwhile:
a shard gets its record, and so exists, when its samples and that of the corpus have been found right (data_prep/pool.py).

Requests lie in a queue of this side until the process has answered the one before: a pipe that is full would hold up its writer.
"""

import signal
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from data_prep.errors import InputError
from data_prep.processes import FORK, end_with_parent, in_own_memory
from data_prep.tokenizer.backends import Backend, Encoded, HuggingFaceBackend, split_ids

CORPUS = -1  # number of the sample of the corpus; shards have theirs

LONGEST_SAMPLE = 4_000  # characters of a document of a batch


class BackendMismatch(Exception):
    """A backend gave other ids than `tokenizers` for a document; `corpus` says that it was one of the first sample."""

    def __init__(self, message: str, corpus: bool) -> None:
        super().__init__(message)
        self.corpus = corpus


@dataclass(slots=True)
class Sample:
    """Documents and the ids that a backend gave for them."""

    texts: list[str]
    ids: list[np.ndarray]

    @classmethod
    def of(cls, texts: list[str], encoded: Encoded) -> "Sample":
        """Returns all documents of a batch."""
        return cls(texts, split_ids(encoded))

    def add_one_of(self, texts: list[str], encoded: Encoded) -> None:
        """Takes the first document of a batch that is not too long."""
        for number, text in enumerate(texts):
            if len(text) <= LONGEST_SAMPLE:
                ids, lengths = encoded
                start = int(lengths[:number].sum())
                self.texts.append(text)
                self.ids.append(ids[start : start + int(lengths[number])].copy())
                return


class Parity:
    """The process, from this side.

    Args:
        path: the tokenizer.json.
        specials_as_text: whether names of special tokens are text.
        exact: `tokenizers`, where it is loaded already.
    """

    def __init__(self, path: str, specials_as_text: bool, exact: Backend | None = None) -> None:
        self.pipe, there = FORK.Pipe()
        self._process = FORK.Process(target=_serve, args=(path, specials_as_text, exact, there, self.pipe), daemon=True)
        self._process.start()
        there.close()
        self._queue: deque[tuple[int, Sample]] = deque()
        self._busy = True  # it is loading
        self._asked: set[int] = set()
        self._right: set[int] = set()

    def ask(self, number: int, sample: Sample, backend: str) -> None:
        """Has a sample compared.

        Args:
            number: of the shard, or CORPUS.
            sample: what to compare.
            backend: name of the backend, for messages.
        """
        self._backend = backend
        self._asked.add(number)
        self._queue.append((number, sample))
        self._send()

    def found_right(self, number: int) -> bool:
        """Returns whether a sample has been compared, and was right."""
        return number in self._right

    def listen(self, seconds: float = 0.0) -> None:
        """Takes in the answers that are there, after waiting at most `seconds` for one.

        Raises:
            BackendMismatch: a sample was wrong.
            InputError: the process cannot load the tokenizer, or was killed.
        """
        while self.pipe.poll(seconds):
            seconds = 0.0
            answer = self._receive()
            if answer is not None:
                number, problem = answer
                if problem is not None:
                    self._forget()
                    raise BackendMismatch(f"{self._backend} gives other ids than hf for {problem}", number == CORPUS)
                self._right.add(number)
            self._busy = False
            self._send()

    def wait_for(self, number: int) -> None:
        """Returns when a sample has been found right, or at once if it was never asked about; raises as `listen`."""
        while number in self._asked and number not in self._right:
            self.listen(1.0)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def _forget(self) -> None:
        """Readies this side for another backend."""
        self._queue.clear()
        self._asked.clear()
        self._right.clear()
        self._busy = False

    def _send(self) -> None:
        if self._queue and not self._busy:
            self._busy = True
            try:
                self.pipe.send(self._queue.popleft())
            except ConnectionError:
                raise self._death() from None

    def _receive(self) -> Any:
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise self._death() from None
        if isinstance(answer, InputError):
            raise answer
        return answer

    def _death(self) -> Exception:
        self._process.join()
        code = self._process.exitcode or 0
        if code > 0:
            return RuntimeError(f"the process that compares ids ended with code {code}")
        return InputError(
            f"the process that compares ids with hf was killed (signal {-code}), most often because memory ran out; run the same "
            "command again with fewer workers: finished shards are kept"
        )


def objection(sample: Sample, exact: Backend) -> str | None:
    """Returns which document of a sample `exact` encodes otherwise, None if there is none."""
    for text, ids, right in zip(sample.texts, sample.ids, split_ids(exact.encode(sample.texts)), strict=True):
        if not np.array_equal(ids, right):
            return f"a document that begins {text[:40]!r}"
    return None


def _serve(path: str, specials_as_text: bool, exact: Backend | None, pipe: Connection, parents_end: Connection) -> None:
    """The life of the process."""
    parents_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    end_with_parent()
    in_own_memory(_answer, path, specials_as_text, exact, pipe)


def _answer(path: str, specials_as_text: bool, exact: Backend | None, pipe: Connection) -> None:
    try:
        exact = exact or HuggingFaceBackend(path, specials_as_text)
    except InputError as error:
        pipe.send(error)
        return
    pipe.send(None)
    for number, sample in _requests(pipe):
        pipe.send((number, objection(sample, exact)))


def _requests(pipe: Connection) -> Iterable[tuple[int, Sample]]:
    while True:
        yield pipe.recv()
