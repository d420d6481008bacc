"""The command line's manners: help, versions, overrides, refusals in one line, before anything heavy is loaded."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from capsfl.cli import COMMANDS, main
from capsfl.commands import doctor

ROOT = Path(__file__).resolve().parent.parent
DEMO = str(ROOT / "configs" / "demo.toml")


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch: pytest.MonkeyPatch):
    # `main` sets these for its process, which is that of the tests here.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(list(words))
    captured = capsys.readouterr()
    code = exit_.value.code
    return code if isinstance(code, int) else 0, captured.out, captured.err


def test_the_summary_lists_every_command(capsys):
    assert {path.stem for path in (ROOT / "capsfl" / "commands").glob("*.py")} == {"__init__", *COMMANDS}
    code, out, err = run(capsys, "--help")
    assert (code, err) == (0, "")
    for name in COMMANDS:
        assert name in out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(capsys, command: str):
    code, out, err = run(capsys, command, "--help")
    assert (code, err) == (0, "")
    assert f"capsfl {command}" in out


def test_help_shows_the_files_own_values_and_the_fields_own_words(capsys):
    _, out, _ = run(capsys, "train", DEMO, "--help")
    words = " ".join(out.replace("│", " ").split())
    assert "--privacy.clip-norm" in words
    assert "(default: 20.0)" in words
    assert "the L2 norm a hospital's whole update, or a patient's gradient, is clipped to" in words


def test_a_command_that_is_none_is_refused_with_the_ones_there_are(capsys):
    code, out, err = run(capsys, "tarin", DEMO)
    assert (code, out) == (2, "")
    assert err == f"capsfl: unknown command 'tarin'; one of {', '.join(COMMANDS)}\n"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--privacy.noise-multiplier", "-1"), ("privacy.noise_multiplier", "= -1.0")),
        (("--privacy.noise-multiplier", "nan"), ("privacy.noise_multiplier", "NaN", "finite")),
        (("--privacy.noise-multipler", "1"), ("--privacy.noise-multipler", "meant --privacy.noise-multiplier")),
        (("--segmentation.rounds", "1.5"), ("--segmentation.rounds", "'1.5'")),
        (("--segmentation.rounds", "True"), ("--segmentation.rounds", "'True'")),
        (("--segmentation.rounds", "0"), ("segmentation.rounds", "= 0", "greater than or equal to 1")),
        (("--segmentation.model.num-iters", "0"), ("--segmentation.model.num-iters", "'0'")),
        (("--privacy.sampler", "often"), ("--privacy.sampler", "'often'", "poisson")),
        (("--seed", "-3"), ("seed", "= -3")),
        (("--arms.1.clip-norm", "-2"), ("arms.1.clip_norm", "= -2.0")),
        (("--arms.0.clip-norm", "much"), ("--arms.0.clip-norm", "'much'")),
        (("--data.field", "8", "8"), ("--data.field",)),
        (("stray",), ("stray",)),
    ],
)
def test_a_bad_override_is_refused_in_one_line_that_names_it(capsys, words: tuple[str, ...], named: tuple[str, ...]):
    code, out, err = run(capsys, "train", DEMO, *words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith(f"capsfl train {DEMO}: ")
    for word in named:
        assert word in err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("epsilon",), ("missing", "--hospitals")),
        (("audit", "--noise-multiplier", "0"), ("privacy.noise_multiplier = 0.0", "above 0")),
        (("audit", "--noise-multiplier", "1", "--canaries", "10"), ("canaries", "10")),
        (("epsilon", "--hospitals", "10"), ("noise_multiplier: missing", "--target-epsilon")),
        (("epsilon", "--hospitals", "10", "--noise-multiplier", "1"), ("rounds: missing", "--rounds")),
        (("epsilon", "--hospitals", "10", "--target-epsilon", "1"), ("both missing",)),
        (
            ("epsilon", "--hospitals", "10", "--noise-multiplier", "-1", "--rounds", "1"),
            ("noise_multiplier = -1.0",),
        ),
        (
            ("epsilon", "--hospitals", "10", "--cohort", "11", "--noise-multiplier", "1", "--rounds", "1"),
            ("cohort = 11",),
        ),
        (
            ("epsilon", "--hospitals", "10", "--noise-multiplier", "1", "--rounds", "1", "--delta", "2"),
            ("delta = 2.0",),
        ),
        (("train",), ("name a configuration first",)),
        (("ingest", "only-one"), ("missing",)),
        (("ingest", "a", "b", "--preset", "huge"), ("'huge'", "--preset", "tiny")),
        (("phantom", "out", "--patients", "0"), ("patients = 0",)),
        (("phantom", "out", "--patients", "2"), ("patients=2", "hospitals=3")),
        (("phantom", "out", "--processes", "0"), ("processes=0",)),
        (("verify", "nowhere"), ("nowhere", "no study.json")),
    ],
)
def test_bad_words_are_refused_in_one_line(
    capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], named: tuple[str, ...]
):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    for word in named:
        assert word in err, err
    assert list(tmp_path.iterdir()) == []


def test_a_witness_that_is_not_there_is_refused_by_name(capsys, tmp_path: Path):
    code, _, err = run(capsys, "verify", str(tmp_path), "--witness", str(tmp_path / "head"))
    assert code == 2
    assert err.startswith(f"{tmp_path / 'head'}: No such file or directory; ")


def test_an_interruption_says_how_to_go_on(capsys, monkeypatch: pytest.MonkeyPatch):
    def interrupt(_: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupt)
    code, _, err = run(capsys, "doctor")
    assert code == 130
    assert "resume" in err


def test_help_loads_nothing_heavy():
    script = (
        "import sys\nfrom capsfl import cli\n"
        "for words in (['--help'], ['--version'], ['epsilon', '--help'], ['verify']):\n"
        "    try: cli.main(words)\n    except SystemExit: pass\n"
        "print([m for m in ('jax', 'orbax', 'matplotlib', 'tensorstore', 'pydicom', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
