"""README.md, docs/ and kernels/README.md: their commands, unchanged, in bash and in zsh, and their links.

Each shell runs every sh block with stand-in programs that only record their words. That shows what a shell does to them (zsh expands brackets). Then each
command runs: as it is if a CPU takes seconds, as its plan or dry run if it would need GPUs, a cluster, a download or hours. NOT_RUN has the rest.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from data_prep.cli import main as data_prep
from data_prep.cli import read_config as read_data_config
from ssa_pretrain.bench.options import read_options
from ssa_pretrain.cli import read_config
from ssa_pretrain.experiments.options import read_options as read_experiments
from ssa_pretrain.huggingface.options import ExportOptions, ImportOptions
from ssa_pretrain.huggingface.options import read_options as read_folder_options
from ssa_pretrain.launch.__main__ import main as launch
from support.processes import ROOT

GUIDES = [ROOT / "README.md", ROOT / "kernels" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [*GUIDES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
VENV = Path(sys.prefix)
SHELLS = [["bash"], *([["zsh", "-f"]] if shutil.which("zsh") else [])]
# Why a command is run neither as it stands nor as a dry run; its words are still checked.
NOT_RUN = {
    "make": "is the quickstart, or the tests themselves (test_commands.py)",
    "pip": "would change the environment",
    "wandb": "asks for a key",
    "deepspeed": "starts one process per GPU; its settings are planned",
    "torchrun": "needs two GPUs; its settings are read",
    "sbatch": "needs a cluster",
    "scancel": "needs a cluster",
    "kubectl": "needs a cluster; the files that it takes exist",
    "sky": "needs a cloud; the files that it takes exist",
    "docker": "needs its daemon; the targets that it builds exist",
}
PROGRAMS = (*NOT_RUN, "python", "srun", "scontrol")
NO_DATA = "model.vocab_size=4096"  # in place of the tokenizer of data that does not exist here
COMMAND = re.compile(rf"^\s*(?:{'|'.join(PROGRAMS)}|source|launchers/\w+\.sh)\s")
# Blocks that run as typed, one after the other, in what `make quickstart` leaves behind.
TYPED = {
    "README.md": ["source .venv"],
    "docs/configuration.md": ["mkdir -p my_conf"],
}


def name(page: Path) -> str:
    """Returns a page's path relative to the root."""
    return str(page.relative_to(ROOT))


def fences(page: Path) -> Iterator[tuple[str, str]]:
    """Yields (language, text) of a page's fenced blocks."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    return [(name(page), text) for page in GUIDES for language, text in fences(page) if language == "sh"]


def environment(**changes: str) -> dict[str, str]:
    """Returns the variables of a new shell on a machine without a GPU."""
    kept = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
    return kept | {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | changes


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone after `make quickstart`: its environment, and a dataset of other text instead of the quickstart's."""
    folder = tmp_path_factory.mktemp("clone")
    for path in ROOT.iterdir():
        if path.name not in ("outputs", "data", ".venv", ".git"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text(f'PATH="{VENV / "bin"}:$PATH"\n')
    (folder / "hosts").write_text("node0 slots=8\nnode1 slots=8\n")
    words, random = (ROOT / "docs" / "data.md").read_text().split(), Random(0)
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": " ".join(random.choices(words, k=120))}) + "\n" for _ in range(1000))
    command = [sys.executable, "-m", "data_prep", "source=jsonl", "source.paths=[text.jsonl]", "tokenizer=bpe4k"]
    command += ["out=outputs/quickstart/data"]
    subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True)
    return folder


def words_of(shell: list[str], folder: Path) -> list[list[str]]:
    """Returns the words of every command of every block, as a shell passes them."""
    notes, programs = folder / "notes", folder / "programs"
    programs.mkdir(parents=True)
    note = f'#!/bin/sh\n{{ printf "%s\\0" "${{0##*/programs/}}" "$@"; printf "\\n\\0"; }} >> {notes}\n'
    for program in PROGRAMS:
        (programs / program).write_text(note)
    (folder / "launchers").symlink_to(programs)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    for program in ("torchrun.sh", "deepspeed.sh", "quickstart.sh", "stages.sh"):
        (programs / program).write_text(note.replace("${0##*/programs/}", "launchers/${0##*/}"))
    for path in programs.iterdir():
        path.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "n[0-3]"}
    path = f"{programs}:{os.environ['PATH']}"
    for number, (page, text) in enumerate(blocks()):
        shown = [*(["bash"] if text.startswith("#!/bin/bash") else shell), "-c", text]
        done = subprocess.run(shown, cwd=folder, env=environment(PATH=path, **slurm), capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, f"{page}, block {number} in {shell[0]}: {done.stderr}"
    return [command.split("\0")[:-1] for command in notes.read_text().split("\n\0")[:-1]]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """The words of each distinct command, which are the same in every shell."""
    found = [words_of(shell, tmp_path_factory.mktemp(shell[0])) for shell in SHELLS]
    assert all(sorted(words) == sorted(found[0]) for words in found)
    return [list(words) for words in dict.fromkeys(map(tuple, found[0]))]


def test_every_command_is_in_a_tested_block() -> None:
    for page in GUIDES:
        for language, text in fences(page):
            if language != "sh":
                assert not any(COMMAND.match(line) for line in text.splitlines()), f"{name(page)}: ```sh\n{text}"


def spans(page: Path) -> list[str]:
    """Returns a page's inline code, tables included."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def test_inline_commands_name_existing_things() -> None:
    for page in PAGES:
        for span in spans(page):
            if found := re.match(r"(?:python|torchrun .*) -m ([a-z_.]+)(?: |$)", span):
                module = ROOT / ("kernels" if found[1].startswith("ssa_kernels") else "") / found[1].replace(".", "/")
                assert module.is_dir() or module.with_suffix(".py").is_file(), f"{name(page)}: {span}"
            if found := re.match(r"make ([a-z-]+)", span):
                assert re.search(rf"^{found[1]}:", (ROOT / "Makefile").read_text(), re.M), f"{name(page)}: {span}"
            if found := re.match(r"(?:launchers/|(?:PYTHONPATH=tests )?python tests/)[\w./]+", span):
                assert (ROOT / found[0].split()[-1]).exists(), f"{name(page)}: {span}"


def test_zsh_special_characters_are_quoted() -> None:
    """This holds for inline code too, and is tested on machines without zsh."""
    for page in GUIDES:
        lines = [line for language, text in fences(page) if language == "sh" for line in text.splitlines()]
        for span in spans(page) + lines:
            bare = re.sub(r"""'[^']*'|"[^"]*"|#.*""", "", span)
            assert not re.search(r"(^|\s)[\w.]+=[^\s=]*[\[\]*?]", bare), f"{name(page)}: {span}"


def test_readme_commands_have_no_comments() -> None:
    """At a prompt, zsh passes a comment after a command as arguments."""
    assert not [
        line
        for language, text in fences(ROOT / "README.md")
        if language == "sh"
        for line in text.splitlines()
        if "#" in line
    ]


@pytest.fixture(scope="module")
def typed(clone: Path) -> subprocess.CompletedProcess[str]:
    """Runs TYPED in one shell: zsh if it is installed, because bash accepts everything that zsh does."""
    found = [text for page, text in blocks() if any(text.startswith(start) for start in TYPED.get(page, ()))]
    assert len(found) == 2
    lines = "\n".join(found)
    return subprocess.run(
        [*SHELLS[-1], "-e"], input=lines, cwd=clone, env=environment(), capture_output=True, text=True
    )


def test_first_blocks_of_the_readme_work_as_typed(clone: Path, typed: subprocess.CompletedProcess[str]) -> None:
    assert typed.returncode == 0, typed.stdout + typed.stderr
    for run, steps in (("mine", 10), ("mine_full", 5)):
        assert f"-> outputs/{run}\n" in typed.stderr
        last = (clone / "outputs" / run / "metrics.jsonl").read_text().splitlines()[-1]
        assert json.loads(last)["step"] == steps
    assert (clone / "outputs" / "mine" / "report.html").is_file()


def test_launchers_accept_every_documented_command(clone: Path, commands: list[list[str]]) -> None:
    called = re.compile(r"launchers/\w+\.sh")
    found = [words[words.index(word) :] for words in commands for word in words if called.fullmatch(word)]
    assert len(found) >= 10
    lines = "\n".join(shlex.join([words[0], "--dry-run", *words[1:]]) for words in found if "--dry-run" not in words)
    lines = lines.replace("/shared/venv/bin/python", "python")
    done = subprocess.run(
        ["bash", "-e"],
        input=f"source .venv/bin/activate\n{lines}",
        cwd=clone,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("typed")
def test_programs_accept_every_documented_command(
    clone: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checks the settings, flags, options and files of all other commands, in this process."""
    monkeypatch.chdir(clone)
    for words in commands:
        if words[0] in ("python", "torchrun", "deepspeed"):
            check_python(words, capsys)
        elif words[0] == "pip":
            check_extras(words)
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        else:
            assert words[0] in NOT_RUN or words[0].startswith("launchers/") or words[0] in ("srun", "scontrol"), words
            if words[:2] == ["docker", "build"]:
                target = words[words.index("--target") + 1]
                assert re.search(rf"^FROM .* AS {target}$", (ROOT / "Dockerfile").read_text(), re.M), words
            assert all((ROOT / word).is_file() for word in words[1:] if word.startswith("launchers/")), words


def check_python(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Checks the words of a command that runs a module or a launcher."""
    start = next((i for i, word in enumerate(words) if word in ("-m", "--module")), None)
    if start is None:
        program = ROOT / words[1]
        assert (program / "__main__.py" if program.is_dir() else program).is_file(), words
        return
    module, rest = words[start + 1], words[start + 2 :]
    assert (ROOT / module.replace(".", "/")).exists() or (ROOT / f"{module.replace('.', '/')}.py").exists(), words
    if module == "ssa_pretrain.launch":
        assert rest[0] == "render", words  # it starts nothing
        assert launch(rest, {}) == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"
    elif module == "data_prep" and rest[0] == "--explain":
        assert data_prep(rest) == 0
    elif module == "data_prep":
        read_data_config(rest)
    elif module == "ssa_pretrain.bench":
        read_options(rest, int(words[words.index("--nproc-per-node") + 1]) if words[0] == "torchrun" else 1)
    elif module == "ssa_pretrain.experiments":
        read_experiments(rest)
    elif module in ("ssa_pretrain.export", "ssa_pretrain.import_hf"):
        settings = ExportOptions if module.endswith("export") else ImportOptions
        read_folder_options(settings, module, "a folder", [str(ROOT), *rest[1:]])
    elif module in ("ssa_pretrain.train", "ssa_pretrain.evaluate", "ssa_pretrain.plan"):
        entry = module.split(".")[1]
        if not any(word in ("--help", "--cfg", "--info", "--explain", "-sc") for word in rest):
            entry, rest = "plan" if entry == "train" else entry, [*rest, NO_DATA, "dry_run=true"]
        with pytest.raises(SystemExit) as left:
            read_config(entry, rest)
        assert left.value.code == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"


def check_extras(words: list[str]) -> None:
    """Checks that pip's extras exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for named in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(named.split(",")) <= set(extras), words


def test_documented_error_list_equals_the_printed_one(clone: Path) -> None:
    (text,) = [text for _, text in fences(ROOT / "docs" / "configuration.md") if text.startswith("$ ")]
    command, *lines = text.splitlines()
    python = shlex.split(command)[2:]
    done = subprocess.run([sys.executable, *python], cwd=clone, env=environment(), capture_output=True, text=True)
    assert done.returncode == 3
    printed = done.stderr.splitlines()
    for line, found in zip(lines, printed, strict=False):
        assert re.fullmatch(".*".join(map(re.escape, line.split("…"))), found), f"{line}\n{found}"


def test_links_have_existing_targets() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            found = page.parent / path if path else page
            assert found.exists(), f"{name(page)} links to {target}"
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.M) if anchor else []
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, f"{name(page)} links to {target}; its headings are {slugs}"


def test_readme_links_to_every_guide() -> None:
    readme = (ROOT / "README.md").read_text()
    linked = {(ROOT / target).resolve() for target in re.findall(r"\]\(([\w/.-]+)\)", readme)}
    assert {page for page in PAGES if page.name != "README.md" or page.parent != ROOT} <= linked
