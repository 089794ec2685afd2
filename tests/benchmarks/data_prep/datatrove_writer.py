"""datatrove's own writer of Megatron binaries, as in its examples: TEXT cut into eight files, eight tasks.

    python datatrove_writer.py TEXT TOKENIZER OUT WORKERS

Cutting the file is not part of its work, but the row includes the time for it (about a second per 100 MB).
"""

import sys
from pathlib import Path


def main(text: str, tokenizer: str, out: str, workers: str) -> None:
    """Runs the pipeline."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer

    folder = Path(out) / "parts"
    folder.mkdir()
    lines = open(text, "rb").readlines()
    for number in range(8):
        (folder / f"{number}.jsonl").write_bytes(
            b"".join(lines[number * len(lines) // 8 : (number + 1) * len(lines) // 8])
        )
    del lines
    writer = MegatronDocumentTokenizer(
        output_folder=f"{out}/bin", tokenizer_name_or_path=tokenizer, eos_token="<|end_of_text|>", save_filename="text"
    )
    LocalPipelineExecutor(
        pipeline=[JsonlReader(str(folder)), writer], tasks=8, workers=int(workers), logging_dir=f"{out}/logs"
    ).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
