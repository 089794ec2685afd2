"""Times only the encoder: reads TEXT, loads TOKENIZER, encodes with PROCESSES threads and prints the seconds for the encoding.

    python raw.py TEXT TOKENIZER PROCESSES hf|tiktoken|gigatoken

Documents are encoded in batches of about 1 MB and names of special tokens are text, both as in data_prep. So the ids
are the same. gigatoken's own threads are not limited.
"""

import json
import os
import resource
import sys
import time


def main(text: str, path: str, processes: str, name: str) -> None:
    """Encodes once and prints {"wall": …, "cpu": …}."""
    os.environ["RAYON_NUM_THREADS"] = processes
    documents = [json.loads(line)["text"] for line in open(text, "rb")]
    batches, batch, size = [], [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size > 1_000_000:
            batches.append(batch)
            batch, size = [], 0
    batches.append(batch)
    encode = _encoder(name, path, int(processes))
    before, started = _cpu(), time.monotonic()
    for batch in batches:
        encode(batch)
    print(json.dumps({"wall": time.monotonic() - started, "cpu": _cpu() - before}))


def _encoder(name: str, path: str, threads: int):
    if name == "hf":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(path)
        tokenizer.encode_special_tokens = True
        return lambda batch: tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    if name == "tiktoken":
        from data_prep.tokenizer.backends import TiktokenBackend

        encoding = TiktokenBackend(path, specials_as_text=True).encoding
        return lambda batch: encoding.encode_ordinary_batch(batch, num_threads=threads)
    import gigatoken

    fast = gigatoken.Tokenizer.from_json(open(path, encoding="utf-8").read())
    return lambda batch: fast.encode_batch(batch, parallel=threads > 1)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main(*sys.argv[1:])
