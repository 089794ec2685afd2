"""Checks that a faster backend gives the same ids as Hugging Face's `tokenizers`: a process beside the workers encodes samples again.

There are two kinds of samples. One is taken from all over the corpus before the first shard is made. It decides whether
the backend is used at all. The other is one document of every batch that a worker encodes. The process loads
`tokenizers` while its parent loads the faster backend, and it compares while the workers run, so the run does not wait
for it. No shard is committed before its samples and the sample of the corpus are confirmed (data_prep/shards/pool.py).

Requests wait in a queue on the parent's side until the previous one is answered: a full pipe would block its writer.
"""

import signal
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from data_prep.errors import InputError
from data_prep.processes import FORK, exit_with_parent, run_in_own_heap
from data_prep.tokenizer.backends import Backend, Encoded, HuggingFaceBackend, split_ids

CORPUS_SAMPLE = -1  # the number of the corpus sample; the samples of a shard have the shard's number

MAX_SAMPLE_CHARACTERS = 4_000  # of a document of a batch


class BackendMismatch(Exception):
    """A backend's ids for a document differ from those of `tokenizers`; `corpus` is true for the sample of the corpus."""

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
        """Returns a sample of all documents of a batch."""
        return cls(texts, split_ids(encoded))

    def add_first(self, texts: list[str], encoded: Encoded) -> None:
        """Adds the first document of a batch that is not too long."""
        for number, text in enumerate(texts):
            if len(text) <= MAX_SAMPLE_CHARACTERS:
                ids, lengths = encoded
                start = int(lengths[:number].sum())
                self.texts.append(text)
                self.ids.append(ids[start : start + int(lengths[number])].copy())
                return


class Parity:
    """The parent's side of the process.

    Args:
        path: the tokenizer.json.
        specials_as_text: whether names of special tokens are text.
        reference: `tokenizers`, if it is loaded already.
    """

    def __init__(self, path: str, specials_as_text: bool, reference: Backend | None = None) -> None:
        self.pipe, there = FORK.Pipe()
        self._process = FORK.Process(
            target=_process_main, args=(path, specials_as_text, reference, there, self.pipe), daemon=True
        )
        self._process.start()
        there.close()
        self._queue: deque[tuple[int, Sample]] = deque()
        self._busy = True  # the process is loading
        self._submitted: set[int] = set()
        self._confirmed: set[int] = set()

    def submit(self, number: int, sample: Sample, backend: str) -> None:
        """Queues a sample for comparison.

        Args:
            number: the shard's, or CORPUS_SAMPLE.
            sample: what to compare.
            backend: name of the backend, for messages.
        """
        self._backend = backend
        self._submitted.add(number)
        self._queue.append((number, sample))
        self._send()

    def is_confirmed(self, number: int) -> bool:
        """Returns whether a sample was compared and its ids were right."""
        return number in self._confirmed

    def receive(self, seconds: float = 0.0) -> None:
        """Handles the answers that have arrived, after waiting at most `seconds` for one.

        Raises:
            BackendMismatch: the ids of a sample were wrong.
            InputError: the process cannot load the tokenizer, or was killed.
        """
        while self.pipe.poll(seconds):
            seconds = 0.0
            answer = self._read()
            if answer is not None:
                number, problem = answer
                if problem is not None:
                    self._reset()
                    raise BackendMismatch(
                        f"{self._backend} and hf give different ids for {problem}", number == CORPUS_SAMPLE
                    )
                self._confirmed.add(number)
            self._busy = False
            self._send()

    def wait_for(self, number: int) -> None:
        """Waits until a sample is confirmed; returns at once if it was never submitted. Raises as `receive`."""
        while number in self._submitted and number not in self._confirmed:
            self.receive(1.0)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def _reset(self) -> None:
        """Prepares for another backend."""
        self._queue.clear()
        self._submitted.clear()
        self._confirmed.clear()
        self._busy = False

    def _send(self) -> None:
        if self._queue and not self._busy:
            self._busy = True
            try:
                self.pipe.send(self._queue.popleft())
            except ConnectionError:
                raise self._exit_error() from None

    def _read(self) -> Any:
        try:
            answer = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise self._exit_error() from None
        if isinstance(answer, InputError):
            raise answer
        return answer

    def _exit_error(self) -> Exception:
        self._process.join()
        code = self._process.exitcode or 0
        if code > 0:
            return RuntimeError(f"the process that compares ids ended with code {code}")
        return InputError(
            f"the process that compares ids with hf was killed (signal {-code}), most often because memory ran out; run the same "
            "command again with fewer workers: finished shards are kept"
        )


def first_mismatch(sample: Sample, reference: Backend) -> str | None:
    """Returns the first document of a sample that `reference` encodes differently, or None."""
    for text, ids, right in zip(sample.texts, sample.ids, split_ids(reference.encode(sample.texts)), strict=True):
        if not np.array_equal(ids, right):
            return f"a document that begins {text[:40]!r}"
    return None


def _process_main(
    path: str, specials_as_text: bool, reference: Backend | None, pipe: Connection, parents_end: Connection
) -> None:
    parents_end.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    exit_with_parent()
    run_in_own_heap(_answer, path, specials_as_text, reference, pipe)


def _answer(path: str, specials_as_text: bool, reference: Backend | None, pipe: Connection) -> None:
    try:
        reference = reference or HuggingFaceBackend(path, specials_as_text)
    except InputError as error:
        pipe.send(error)
        return
    pipe.send(None)
    for number, sample in _requests(pipe):
        pipe.send((number, first_mismatch(sample, reference)))


def _requests(pipe: Connection) -> Iterable[tuple[int, Sample]]:
    while True:
        yield pipe.recv()
