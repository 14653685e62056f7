"""Accidents of files, names, terminals and clocks: each is made good, or said in one line."""

from __future__ import annotations

import ast
import codecs
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from jaxdecoder.ablation import grid
from jaxdecoder.compression.options import Chart, Prune
from jaxdecoder.config import DataConfig, load
from jaxdecoder.data import corpora, tokenizers, vocabularies
from jaxdecoder.errors import UserError, shell_word
from jaxdecoder.files import as_label, as_markdown, make_room
from jaxdecoder.training.checkpoints import open_checkpoints
from jaxdecoder.training.devices import keep_programs
from jaxdecoder.training.logging import draw_losses
from jaxdecoder.training.runs import load_model
from jaxdecoder.training.single import train
from tests.runs import ROOT, here, write_config

BOM = codecs.BOM_UTF8
ODD = """a $x_$ [b] 'c' *? "q" \\d ü猫"""
"""A name with all that shells, patterns, formulas, markup and old locales take for something."""


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(path, overrides)
    return str(error.value)


class TestWhatAFileLeavesOut:
    def test_can_be_given_on_the_command_line(self, tmp_path):
        text = written(tmp_path / "c.toml", '[data]\nsource = "text"\n')
        assert load(text, ["--data.path", "x.txt"]).data.path == "x.txt"
        assert load(text, {"data.path": "x.txt"}).data.path == "x.txt"
        sparse = written(
            tmp_path / "s.toml",
            "[compression]\nsparsity = 0.5\nkeep_zeros = true\nsparsity_end = 90\n"
            "[train]\nsteps = 50\nbatch_size = 9\ngradient_accumulation = 2\n"
            "[model]\nd_model = 100\n",
        )
        given = ("--train.steps", "100", "--train.batch-size", "10", "--model.n-heads", "5")
        assert load(sparse, given).compression.sparsity_end == 90

    def test_is_blamed_on_whom_it_is_due_to(self, tmp_path):
        path = written(tmp_path / "c.toml", '[data]\nsource = "text"\n[model]\nd_model = 96\n')
        # In the file, whatever else the command line says.
        assert refused(path).startswith(f"{path}: data.path")
        assert refused(path, "--train.steps", "3").startswith(f"{path}: data.path")
        # On the command line.
        message = refused(path, "--data.path", "x", "--model.n-heads", "7")
        assert message.startswith("command line: model.d_model = 96")
        # A value by itself, even if the command line has another.
        path = written(tmp_path / "d.toml", "[train]\nsteps = -5\n")
        assert refused(path, "--train.steps", "3").startswith(f"{path}: train.steps = -5")

    @pytest.mark.parametrize("option", ["--train.gradient-accumulation", "--model.n-heads"])
    def test_a_zero_to_divide_by_is_refused_by_name(self, tmp_path, option):
        key = option[2:].replace("-", "_")
        message = refused(written(tmp_path / "c.toml", ""), option, "0")
        assert message == f"command line: {key} = 0: should be greater than 0"

    def test_can_be_given_by_an_ablation(self, tmp_path):
        written(tmp_path / "base.toml", '[data]\nsource = "text"\n')
        path = written(
            tmp_path / "ablation.toml",
            'base = "base.toml"\n[overrides]\ndata.path = "x.txt"\n[factors]\n'
            "model.n_layers = [1, 2]\n",
        )
        assert {m.config.data.path for m in grid.read(path).members} == {"x.txt"}


def test_a_byte_order_mark_is_not_text(tmp_path):
    config = written(tmp_path / "c.toml", BOM + b"[train]\nsteps = 7\n")
    assert load(config).train.steps == 7
    ablation = BOM + b'base = "c.toml"\n[factors]\nmodel.n_layers = [1, 2]\n'
    assert len(grid.read(written(tmp_path / "a.toml", ablation)).arms) == 2
    known = vocabularies.build(DataConfig(tokenizer="char"), lambda: ["abc"])
    tokenizers.save(known, tmp_path / "t.json")
    written(tmp_path / "t.json", BOM + (tmp_path / "t.json").read_bytes())
    assert tokenizers.load(tmp_path / "t.json") == known
    corpus = written(tmp_path / "corpus.txt", BOM + b"abc")
    assert list(corpora.documents(DataConfig(source="text", path=str(corpus)))) == ["abc"]


def test_a_prompt_is_read_as_a_corpus_is(tmp_path):
    import sample

    file = written(tmp_path / "p.txt", BOM + "one\r\ntwo\rü\n".encode())
    (text,) = corpora.documents(DataConfig(source="text", path=str(file)))
    assert sample._read(str(file)) == text == "one\r\ntwo\rü\n"


def said_by(
    *command: object, stdin: bytes = b"", **environment: str
) -> subprocess.CompletedProcess:
    """What a process says, in bytes; `stdout` of "/dev/full" or "" (closed) is where it goes."""
    stdout = environment.pop("stdout", None)
    words = shlex.join([sys.executable, *map(os.fsdecode, map(os.fspath, map(_bytes, command)))])
    if stdout is not None:
        words += f" >{stdout or '&-'}"
    return subprocess.run(
        ["sh", "-c", os.fsencode(words)],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


def _bytes(word: object) -> str | bytes:
    return word if isinstance(word, bytes) else str(word)


TALKS = """
import sys
from rich.console import Console
from jaxdecoder.errors import friendly
@friendly
def main():
    print("kätzchen 猫 \\udcff", flush="now" in sys.argv)
    Console().print("猫")
    sys.stdout.write("")  # as libraries do
main()
"""


full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


class TestOutput:
    @pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
    def test_shows_what_it_can(self, encoding):
        said = said_by("-c", TALKS, PYTHONIOENCODING=encoding)
        assert (said.returncode, said.stderr) == (0, b"")
        shown = "kätzchen 猫 ?\n猫\n".encode(encoding, "replace")
        assert said.stdout == shown

    @full
    @pytest.mark.parametrize("buffered", ["", "1"])
    @pytest.mark.parametrize("when", ["now", "later"])
    def test_on_a_full_disk_is_said_to_be_lost(self, when, buffered):
        said = said_by("-c", TALKS, when, stdout="/dev/full", PYTHONUNBUFFERED=buffered)
        assert said.returncode == 1
        assert said.stderr == b"error: the output cannot be written: No space left on device\n"

    def test_may_be_closed(self):
        said = said_by("-c", TALKS, stdout="")
        assert (said.returncode, said.stderr) == (0, b"")

    @pytest.mark.parametrize(
        "script", [["train.py"], ["sample.py"], ["ablate.py"], ["compress.py", "prune"]]
    )
    def test_of_help_is_as_robust(self, script):
        said = said_by(*script, "--help", PYTHONIOENCODING="ascii")
        assert (said.returncode, said.stderr) == (0, b"")
        assert b"--" in said.stdout

    @full
    def test_of_help_may_be_lost(self):
        said = said_by("sample.py", "--help", stdout="/dev/full")
        assert (said.returncode, said.stderr.count(b"\n")) == (1, 1)

    def test_of_a_whole_sample_needs_no_home_no_locale_and_no_letters(self, tiny_run):
        said = said_by(
            *("sample.py", tiny_run, "--max-new-tokens", "3", "--prompt", "ü猫"),
            HOME="/nonexistent",
            LC_ALL="C",
            PYTHONIOENCODING="ascii",
        )
        assert (said.returncode, said.stderr) == (0, b"")
        assert said.stdout.startswith(b"??")


class TestNames:
    def test_of_runs_may_be_odd(self, tmp_path):
        """A run of no steps is trained there, drawn, read again and gone on with."""
        run = tmp_path / ODD / ODD
        overrides = ["--train.steps", "0", "--train.out", str(run)]
        config = write_config(tmp_path)
        assert train(load(config, overrides))["steps"] == 0
        assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
        assert load_model(run).step == 0
        assert train(load(config, overrides))["steps"] == 0

    def test_do_not_draw_formulas(self, tmp_path):
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        names = ["$\\frac$", "a$b$c$", "_x", "[b]", "\\$"]
        figure = Figure()
        legend = figure.legend(handles=[Line2D([], [], label=as_label(name)) for name in names])
        figure.canvas.draw()
        assert len(legend.get_texts()) == len(names)
        run = tmp_path / "$\\frac$"
        run.mkdir()
        written(run / "metrics.jsonl", '{"step": 1, "train_loss": 2.0}\n')
        draw_losses(run)

    def test_do_not_break_tables(self):
        assert as_markdown([["a"], ["b|c"]]).splitlines()[2] == "| b\\|c |"

    @given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
    def test_in_commands_are_one_word_and_no_option(self, name):
        (word,) = shlex.split(shell_word(name))
        assert word in (name, f"./{name}")
        assert not word.startswith("-")

    def test_of_data_folders_are_no_patterns(self, tmp_path):
        (tmp_path / "a*").mkdir()
        data = DataConfig(source="huggingface", path=str(tmp_path / "a*"))
        with pytest.raises(UserError, match="would be a pattern; rename it"):
            list(corpora.documents(data))


def test_a_tilde_is_the_home_folder_wherever_a_path_stands(tmp_path, tiny_run, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = '[data]\npath = "~/p"\ncache = "~/c"\ntokenizer_path = "~/t"\n'
    text += '[train]\nout = "~/o"\n[distillation]\nteacher = "~/d"\n'
    written(tmp_path / "c.toml", text)
    config = load("~/c.toml", ["--train.init-from", "~/i"])
    d, t = config.data, config.train
    paths = [d.path, d.cache, d.tokenizer_path, t.out, config.distillation.teacher, t.init_from]
    assert paths == [str(tmp_path / name) for name in "pctodi"]
    pruned = tyro.cli(Prune, args=["~/a", "~/b"])
    assert (pruned.run, pruned.out) == (str(tmp_path / "a"), str(tmp_path / "b"))
    drawn = tyro.cli(Chart, args=["~/a", "~/b", "--out=~/c"])
    assert (drawn.runs, drawn.out) == ((pruned.run, pruned.out), str(tmp_path / "c"))
    (tmp_path / "run").symlink_to(tiny_run)
    assert load_model("~/run").step > 0


class TestPrompts:
    def test_may_begin_with_a_dash(self, tiny_run):
        words = ("--prompt", "-5 degrees", "b", "--prompt=--seed", "--prompt=-x")
        said = here("sample.py", tiny_run, "--max-new-tokens", "1", *words)
        starts = ["-5 degrees", "b", "--seed", "-x"]
        assert said.returncode == 0
        for start, text in zip(starts, said.output.split("\n---\n"), strict=True):
            assert text.startswith(start)

    def test_that_look_like_options_are_told_how(self, tmp_path):
        said = said_by("sample.py", "run", "--prompt", "-x y")
        assert said.returncode == 2
        assert b"write '--prompt=-x y'" in said.stderr
        config = written(tmp_path / "c.toml", "")
        said = said_by("train.py", config, "--train.sample-prompt", "--help")
        assert said.returncode == 2
        assert b"write --train.sample-prompt=--help" in said.stderr

    @pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
    def test_that_are_not_utf_8_are_refused(self, tmp_path, locale):
        file = written(tmp_path / "p.txt", b"caf\xe9")
        wrong = b"byte 3 (0xe9) does not belong there"
        for words, stdin, told in [
            (["--prompt", b"caf\xe9"], b"", b"--prompt 'caf\\udce9': not UTF-8 text"),
            (["--prompt-file", file], b"", os.fsencode(file) + b": not UTF-8 text: " + wrong),
            (["--prompt-file", "-"], b"caf\xe9", b"standard input: not UTF-8 text: " + wrong),
        ]:
            said = said_by("sample.py", "run", *words, stdin=stdin, LC_ALL=locale)
            assert said.returncode == 1
            assert told in said.stderr
            assert said.stderr.count(b"\n") == 1

    def test_in_a_config_are_refused_too(self, tmp_path):
        message = refused(written(tmp_path / "c.toml", ""), "--train.sample-prompt", "\udce9")
        assert message == 'command line: train.sample_prompt = "\\udce9": is not UTF-8 text'


SEEDS = [-1, 2**31, 2**32, 2**63, 2**70]


class TestSeeds:
    @pytest.mark.parametrize("seed", SEEDS)
    def test_out_of_range_are_refused_by_name(self, tmp_path, seed):
        said = here("sample.py", "run", "--seed", seed)
        assert said.output == f"error: --seed {seed}: must be from 0 to 2147483647\n"
        base = written(tmp_path / "c.toml", "")
        for key in ("train.seed", "data.seed"):
            assert f"{key} = {seed}: should be " in refused(base, f"--{key}", str(seed))
        ablation = 'base = "c.toml"\n[factors]\nmodel.n_layers = [1]\n'
        path = written(tmp_path / "a.toml", f"first_seed = {seed}\n" + ablation)
        with pytest.raises(UserError, match=r"(first_seed|train\.seed) = "):
            grid.read(path)

    def test_may_be_the_greatest(self, tiny_run):
        said = here("sample.py", tiny_run, "--seed", 2**31 - 1, "--max-new-tokens", "1")
        assert said.returncode == 0


class TestFolders:
    def test_that_take_no_file_are_named_before_any_work(self, tmp_path):
        file = written(tmp_path / "file", "")
        with pytest.raises(UserError, match=r"file/x\.png: cannot be written"):
            make_room(file / "x.png")
        (tmp_path / "run").mkdir()
        written(tmp_path / "run" / "checkpoints", "")
        with (
            pytest.raises(UserError, match="checkpoints/0: cannot be written"),
            open_checkpoints(tmp_path / "run"),
        ):
            pass
        for out in (file, file / "x"):
            message = here("train.py", write_config(tmp_path), "--train.out", out)
            assert message.returncode == 1
            assert message.output.startswith(f"error: {out}: ")

    def test_for_programs_may_be_impossible(self, monkeypatch):
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        keep_programs("/dev/null/cache")
        assert "JAX_COMPILATION_CACHE_DIR" not in os.environ

    def test_that_the_system_refuses_are_named(self, tmp_path):
        script = "from jaxdecoder.errors import friendly; friendly(lambda: open('/dev/null/x'))()"
        said = said_by("-c", script)
        assert said.stderr == b"error: /dev/null/x: Not a directory\n"


def test_no_clock_that_can_jump_is_asked():
    """Durations come from a monotonic clock, and the times of files mean nothing."""
    wall = {("time", "time"), ("datetime", "now"), ("datetime", "today"), ("datetime", "utcnow")}
    for path in [*(ROOT / "jaxdecoder").rglob("*.py"), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                of = node.value.id if isinstance(node.value, ast.Name) else ""
                assert (of, node.attr) not in wall, path
                assert node.attr not in ("st_mtime", "st_ctime", "getmtime", "getctime"), path
            if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
                assert not {"time", "datetime", "date"} & {name.name for name in node.names}, path


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (["--train.tune", "false"], False),
        (["--train.tune=False"], False),
        (["--train.no-tune"], False),
        (["--train.tune", "true"], True),
        (["--train.tune"], True),
        (["--train.tune", "--train.steps", "3"], True),
    ],
)
def test_a_flag_may_have_its_value_after_it(tmp_path, said, meant):
    assert load(write_config(tmp_path), said).train.tune is meant


def test_a_flag_that_is_neither_true_nor_false_is_named(tmp_path):
    with pytest.raises(UserError, match=r'model\.qkv_bias = "yes": should be true or false'):
        load(write_config(tmp_path), ["--model.qkv-bias", "yes"])
