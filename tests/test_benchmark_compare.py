"""The comparison on a task of one's own: its arms, what it refuses, and a whole one that is killed and goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from benchmark_common import load
from conftest import ROOT, heed_ctrl_c

GAME = """
import gymnasium as gym
import numpy as np

class MyGame(gym.Env):  # shows a bar that action 1 makes longer; the return is its length in the end
    observation_space, action_space = gym.spaces.Box(0, 255, (36, 36, 1), np.uint8), gym.spaces.Discrete(2)

    def image(self):
        image = np.zeros((36, 36, 1), np.uint8)
        image[: self.length] = 255
        return image

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length = self.t = 0
        return self.image(), {}

    def step(self, action):
        self.length, self.t = self.length + int(action), self.t + 1
        return self.image(), float(action), self.t == 6, False, {}

gym.register("MyGame-v0", MyGame, max_episode_steps=50)
"""
TINY = (
    "--num-envs 4 --num-steps 8 --num-minibatches 2 --total-timesteps 64 --eval-interval 32 --feature-dim 32 "
    "--eval-episodes 1 --torch-threads 1"
).split()


@pytest.fixture
def compare(monkeypatch):
    return load("compare", monkeypatch)


def test_arms_are_all_combinations_named_by_what_sets_them_apart(compare):
    _, flags = compare.parse_args("--freeze_layers 0 2 --ssl none pisco --ssl-coef=3 --bf16 -- --gamma 0.9".split())
    arms = compare.make_arms(flags, from_scratch=True)
    assert list(arms) == [
        "freeze-layers 0, ssl none", "freeze-layers 0, ssl pisco", "freeze-layers 2, ssl none",
        "freeze-layers 2, ssl pisco", "from scratch",
    ]  # fmt: skip
    words = " ".join(compare.words_of(arms["freeze-layers 2, ssl pisco"]))
    assert words == "--gamma 0.9 --freeze-layers 2 --ssl pisco --ssl-coef 3 --bf16"
    scratch = " ".join(compare.words_of(arms["from scratch"]))
    assert scratch == "--gamma 0.9 --freeze-layers 0 --ssl none --ssl-coef 3 --bf16 --encoder-weights none"
    _, flags = compare.parse_args("--encoder nature impala --ssl none".split())
    assert list(compare.make_arms(flags, True)) == [
        "encoder nature", "encoder impala", "from scratch, encoder nature", "from scratch, encoder impala"
    ]  # fmt: skip


def test_a_file_of_weights_has_its_whole_path(compare, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compare.words_of({"--encoder-weights": "mine.safetensors"})[1] == str(tmp_path / "mine.safetensors")
    for words in (["none"], ["timm"], []):  # no files
        assert compare.words_of({"--encoder-weights": (words or [None])[0]}) == ["--encoder-weights", *words]


def test_finetuning_without_a_loss_is_what_the_others_are_compared_with(compare):
    arms = {"a": {"--freeze-layers": "2", "--ssl": "none"}, "from scratch": compare.SCRATCH, "b": {"--ssl": "none"}}
    assert compare.reference_of(arms, list(arms)) == "b" and compare.reference_of(arms, ["from scratch"]) != "b"


@pytest.mark.parametrize(
    "line, message",
    [
        ("--bogus 3", "--bogus"),
        ("--freeze-layers 0 9", "freeze-layers 9: --freeze-layers 9: this encoder has 0 to 4 layers"),
        ("--ssl none wrong", "ssl wrong: .*invalid choice"),
        ("--freeze-layers 2 --encoder-weights none", "the weights are random"),
        ("--encoder-weights missing.safetensors", "missing.safetensors"),
        ("--env-id Nope-v0", "unknown environment"),
        ("--seeds 2 -- --eval-episodes 0", "--eval-episodes: nothing to compare"),
        ("--env-id Jump-v0 Pong-v5", "set by compare.py"),
        ("-- --total-timesteps 10", "less than num_envs"),
        ("-- --ssl none pisco", "compare before"),
        ("--seed 3", "--seed: set by compare.py"),
        ("--ssl none --ssl pisco", "given twice"),
        ("--gamma 0.9 -- --gamma 0.99", "--gamma: .*several values"),
        ("3 --ssl none", "a value without a flag"),
        ("--freeze-layers 2", "nothing to compare: give a flag several values"),
        ("--encoder-weights --freeze-layers 0 2", "--encoder-weights"),
        ("--seeds x", "--seeds"),
        ("--seeds 0", "must be positive"),
    ],
)
def test_bad_input_is_one_line_before_the_first_run(compare, capsys, monkeypatch, tmp_path, line, message):
    monkeypatch.setattr(compare.runner, "run_all", lambda *args: 1 / 0)
    assert compare.main([*line.split(), "--results", str(tmp_path)] if "--" not in line.split() else line.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("compare.py: error: ") and re.search(message, error), error


def test_what_so_many_runs_can_tell(compare):
    few = compare.certainty("a", "b", np.array([1.0, 3.0]), np.array([0.0, 2.0]), 2, 1)
    assert few.startswith("a less b is +1.00; with 2 runs an arm that is a point") and "about 32 runs" in few
    ours, others = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    text = compare.certainty("a", "b", ours, others, 2, 1)
    assert text.startswith("a less b is +1.00 [-1.31, +3.31] and can't be told from chance: 5 runs an arm tell")
    assert "of about 2.31." in text and text.endswith("about 40 runs an arm.")  # 15.7 times a variance of 2.5
    # The standard error is 1; t(8) of 0.975 is 2.31, of 0.9917 3.02
    assert "stands out" in compare.certainty("a", "b", ours + 1.5, others, 2, 1)
    assert "+2.50 [-0.52, +5.52] and can't" in compare.certainty("a", "b", ours + 1.5, others, 2, 3)  # the best of four


@pytest.mark.parametrize("edited", ["ppo_pisco.py", "edited_game.py", "mine.safetensors"])
def test_an_edited_program_environment_or_encoder_has_results_of_its_own(
    compare, capsys, monkeypatch, tmp_path, edited
):
    program, game, weights = (tmp_path / name for name in ("ppo_pisco.py", "edited_game.py", "mine.safetensors"))
    for path in (program, game, weights):
        path.write_text("1")
    module = SimpleNamespace(__name__="ppo_pisco", __file__=str(program))
    monkeypatch.setitem(sys.modules, "edited_game", SimpleNamespace(__file__=str(game)))
    arms = {"an arm": {"--env-id": "edited_game:Game-v0"}}, {"an arm": {None: ["--encoder-weights", str(weights)]}}
    monkeypatch.setattr(compare, "prepare", lambda args, flags: (module, *arms))
    monkeypatch.setattr(compare, "finish", lambda *args: 1 / 0)
    names = []
    for text in ("1", "1", "2"):
        (tmp_path / edited).write_text(text)
        with pytest.raises(ZeroDivisionError):
            compare.compare(*compare.parse_args([]))
        names.append(capsys.readouterr().out.splitlines()[0].split("results: ")[1])
    assert names[0] == names[1] != names[2]


def test_no_run_of_another_comparison_is_taken(compare, tmp_path, monkeypatch):
    """Its environment may have been another one under the same name."""
    from benchmark_common import put_run

    (run,) = compare.make_runs("new", "ppo_pisco.py", {"an arm": ["--ssl", "none"]}, 1, 1)
    put_run(tmp_path / "old", "an arm", 1, (0.5, 1.0), command=run.command, commit="abc")
    monkeypatch.setattr(compare.runner, "commit_of_code", lambda: "abc")
    monkeypatch.setattr(compare.runner, "run_all", lambda runs, args, bar: runs)
    args = SimpleNamespace(results=tmp_path, cpus=1)
    assert compare.finish([run], args, SimpleNamespace(initial=0, update=lambda n: None)) == [run]


def start(folder):
    """compare.py on the game in the folder: two depths, two rates, a seed each."""
    words = "--env-id my_game:MyGame-v0 --encoder-weights none --freeze-random --freeze-layers 0 1 --ssl none".split()
    half = os.cpu_count() / 2  # two runs at a time, on any machine
    words += f"--learning-rate 1e-3 3e-3 --seeds 1 --rate-seeds 1 --cpus {half}".split() + ["--", *TINY]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "benchmark" / "compare.py"), *words], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip


def test_comparison_on_a_game_of_ones_own_is_killed_and_goes_on(tmp_path):
    for package in ("ray", "rliable"):  # of benchmark/requirements.txt: the gate has them
        pytest.importorskip(package)
    (tmp_path / "my_game.py").write_text(GAME)
    process = start(tmp_path)
    until = time.time() + 240
    while time.time() < until and not (found := list(tmp_path.glob("runs/compare/*-rates/runs.csv"))):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.endswith("compare.py: interrupted; the same command goes on\n")
    before = found[0].read_text()
    assert 1 <= before.count("my_game") < 4

    process = start(tmp_path)
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert found[0].read_text().startswith(before) and found[0].read_text().count("my_game") == 4
    (folder,) = (path.parent for path in tmp_path.glob("runs/compare/*/compare.md"))
    page = (folder / "compare.md").read_text()
    names = ["arm", "learning rate", "n", "at the end", "mean over the run", "wall minutes a run"]
    assert page.startswith(f"| {' | '.join([*names, 'P(better than freeze-layers 0)'])} |\n")
    rows = [line.split(" | ") for line in page.splitlines()[2:4]]
    assert [row[0] for row in rows] == ["| freeze-layers 0", "| freeze-layers 1"]
    assert all(row[1] in ("1e-3", "3e-3") and row[2] == "1" and float(row[3]) >= 0 for row in rows)
    assert "a point, not a finding" in page and page.count("python ppo_pisco.py --env-id my_game:MyGame-v0") == 1
    assert page.split("\n\n![")[0] in output and (folder / "curves.png").exists()

    tables = {path: path.read_bytes() for path in tmp_path.glob("runs/compare/*/*.csv*")}
    output, _ = start(tmp_path).communicate(timeout=300)
    assert page.split("\n\n![")[0] in output
    assert len(tables) == 4 and tables == {path: path.read_bytes() for path in tables}  # nothing runs anew


def test_a_failed_run_is_named_and_does_not_end_the_others(compare, tmp_path, monkeypatch, capsys):
    """Without Ray: of two arms one has a run; the table has that one, and the exit code tells of the other."""
    pytest.importorskip("rliable")
    from benchmark_common import put_run

    def run_all(runs, args, bar):
        for run in runs:
            if run.method == "ssl none":
                put_run(args.results / run.suite, run.method, run.seed, (0.5, 1.0), command=run.command)
        return [run for run in runs if run.method != "ssl none"]

    monkeypatch.setattr(compare.runner, "run_all", run_all)
    assert compare.main(f"--ssl none pisco --seeds 2 --results {tmp_path}".split()) == 1
    output = capsys.readouterr().out
    assert "| ssl none | default | 2 | 1.00 | 0.75 |" in output and "| ssl pisco" not in output
    assert "mean until minute 2 of training" in output
