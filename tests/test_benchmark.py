"""The benchmark's runner, without Ray: which runs a suite has, what one leaves, how it goes on after a kill."""

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

PROGRAM = """
import json, os, pathlib, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(words.get("--resume") or words["--runs-dir"] + "/run")
folder.mkdir(parents=True, exist_ok=True)
(folder / "args.json").write_text("{}")
with open(folder / "calls.txt", "a") as file:
    file.write(json.dumps([sys.argv[1:], os.environ["OMP_NUM_THREADS"]]) + "\\n")
print("some output")
if "--fail" in words and "--resume" not in words:
    sys.exit(3)
(folder / "encoder.safetensors").write_text("weights")
(folder / "metrics.csv").write_text("global_step\\n" + (folder / "calls.txt").read_text())
(folder / "evaluation.json").write_text("{}")
"""


def load(name, monkeypatch):
    """A script of benchmark/ as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmark" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runner(monkeypatch, tmp_path):
    """benchmark/run.py as a module, with folders and a suite of its own."""
    module = load("run", monkeypatch)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    suite = {"program": f"{program} --lr 1", "methods": {"one method": "--x 2", "failing": "--fail 1"}}
    monkeypatch.setitem(module.SUITES, "tiny", suite)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    return module


def execute(runner, run, cpus=2):
    return runner.execute(run.command, run.flags, run.folder(runner.WORK), cpus)


# What each suite's flags come to, all arguments of all methods: a change of a default would make kept results another
# command's. Print `digest(suite)` for a new suite.
DIGESTS = {
    "jump-rates": "e7cc75cf29a7",
    "jump-baselines": "ef1232c56ed5",
    "jump-loss-rates": "039eda73fc7d",
    "jump-prior": "017ad930511d",
    "jump-cells": "b8db3358b8e8",
    "jump-noise": "39cc556fe0c7",
    "jump-long": "da4790c9c2b8",
    "jump-state-rates": "ac8161ad78d7",
    "jump-state-baselines": "868b40418be7",
    "quickstart": "cae1438ee1e6",
    "quickstart-two-cores": "cae1438ee1e6",
    "jump-grid": "bb6e3afc65f0",
    "dmc-small": "8c9840080f0e",
    "dmc-small-two-cores": "989ae020ddce",
    "jump-sources": "92d4a8f2e429",
    "jump-impala-sources": "d291e28a5fa2",
    "jump-impala-rates": "14348e4f9582",
    "jump-impala": "f8e10e49ca4f",
    "dmc-sparse": "ddf528af3452",
    "dmc-swingup-gate": "95a0b4c43742",
    "dmc-official": "c1a3fbdb854f",
    "dmc-source": "caaedd03b9ff",
    "dmc-transfer": "8bd15853512e",
}


# Arguments that came later, with the values that change nothing
ADDED = [("resume", None), ("eval_max_steps", 27_000), ("head_layers", 0), ("eval_grid", True)]


def digest(suite):
    """Checksum of the arguments, seed 1, of all methods of a suite, the encoder's file without its folder."""
    import linear_state

    import drqv2_pisco
    import ppo_pisco

    resolved = []
    for flags in suite["methods"].values():
        program, *flags = f"{suite['program']} {flags} --seed 1".split()
        assert (ROOT / program).exists()
        module = drqv2_pisco if program == "drqv2_pisco.py" else ppo_pisco  # all others run ppo_pisco.py
        own = linear_state.FLAGS if program == "benchmark/linear_state.py" else []
        args = asdict(module.parse_args(own + flags))
        args["encoder_weights"] = Path(args["encoder_weights"]).name
        resolved.append({key: args[key] for key in sorted(args) if (key, args[key]) not in ADDED})
    return hashlib.sha256(json.dumps(resolved).encode()).hexdigest()[:12]


def test_suites_come_to_the_same_arguments_as_ever(runner):
    suites = {name: suite for name, suite in runner.SUITES.items() if name != "tiny"}
    assert {name: digest(suite) for name, suite in suites.items()} == DIGESTS


def test_cells_begin_with_the_encoders_of_their_splits(monkeypatch):
    """And the noise is that of the same runs' networks: file names are all that the digests leave out."""
    module = load("run", monkeypatch)
    suites = sys.modules["suites"]
    for name in suites.CELLS:
        cell, method = name.split(", ", 1)
        split, encoder = cell.rsplit(" encoder ", 1)
        source = module.Run("jump-sources", split, int(encoder)).folder(Path("benchmark/results"))
        assert int(encoder) in suites.seeds_of("jump-sources", split, module.SUITES["jump-sources"]["n"])
        run = module.Run("jump-cells", name, suites.seeds_of("jump-cells", name, 1)[0])
        assert (f"{source}/encoder.safetensors" in run.flags) == (method != "from scratch") and suites.SPLITS[split][
            1
        ] in run.flags
        if name in module.SUITES["jump-noise"]["methods"]:
            noise = module.Run("jump-noise", name, run.seed)
            assert ["ppo_pisco.py", *noise.flags[1:]] == run.flags
    commands = [module.Run("jump-cells", name, suites.CELL_SEEDS[name]).command for name in suites.CELLS]
    assert len(set(commands)) == len(commands) == 72  # from scratch too is run in every cell


def manifests_of(pattern):
    """{path: manifest} of the kept runs of all suites whose names fit the pattern."""
    paths = (ROOT / "benchmark" / "results").glob(f"{pattern}/*/*/manifest.json")
    return {path: json.loads(path.read_text()) for path in paths}


def test_an_encoder_is_the_same_in_all_kept_runs():
    """One that was made again on another machine is another encoder under the same name. jump-noise's heads begin with
    encoders of jump-cells' runs, which are not kept."""
    found = {}
    for path, manifest in manifests_of("jump-*").items():
        if manifest.get("encoder_sha256") and "jump-noise" not in path.parts:
            command = manifest["command"].split()
            where = [word for flag, word in zip(command, command[1:]) if flag == "--encoder-weights"]
            file = where[0] if where else "encoders/jump-v0__nature__rl.safetensors"
            found.setdefault(file, set()).add(manifest["encoder_sha256"])
    assert found == {file: {hashlib.sha256((ROOT / file).read_bytes()).hexdigest()} for file in found}


def test_a_cells_runs_differ_in_nothing_but_method_and_seed():
    """One kind of CPU, one commit: arms that are compared stand on the same ground, cells need not."""
    grounds = {}
    for path, manifest in (manifests_of("jump-cells") | manifests_of("jump-noise") | manifests_of("jump-long")).items():
        ground = [manifest[key] for key in ("hardware", "commit", "versions", "cores_per_run")]
        grounds.setdefault((path.parts[-3].split(",")[0], "jump-long" in path.parts), []).append(ground)
    assert all(ground == of_cell[0] for of_cell in grounds.values() for ground in of_cell)


def test_noise_is_that_of_the_kept_runs(monkeypatch):
    """Without noise a run's policy solves what its last evaluation says; and the fresh head on a frozen encoder, whose
    flags but for the length are the run's own, learns as in the run."""
    plot = load("plot", monkeypatch)
    for path in manifests_of("jump-noise"):
        name, seed = path.parts[-3:-1]
        run = ROOT / "benchmark" / "results" / "jump-cells" / name / seed
        tables = json.loads((path.parent / "evaluation.json").read_text())["noise"]
        columns = ("global_step", "eval/greedy_success")
        curves = [dict(plot.read_curve(folder, columns).T.tolist()) for folder in (run, path.parent)]
        assert tables["trained"]["0"] == list(curves[0].values())[-1]
        assert tables["fresh head"]["0"] == list(curves[1].values())[-1]
        if name.endswith("frozen,_MLP_head"):
            common = curves[0].keys() & curves[1].keys()
            assert len(common) == 5 and all(curves[0][step] == curves[1][step] for step in common)


def test_kept_results_are_those_of_their_suites(monkeypatch):
    module = load("run", monkeypatch)
    manifests = manifests_of("*")
    for path in manifests:
        suite, method, seed = path.parts[-4:-1]
        (name,) = [name for name in module.SUITES[suite]["methods"] if name.replace(" ", "_") == method]
        assert module.is_finished(module.Run(suite, name, int(seed)), ROOT / "benchmark" / "results")
    assert len(manifests) > 100


def test_runs_go_seed_by_seed(runner, capsys, tmp_path):
    runs = runner.choose_runs(runner.Args(suite="tiny", seeds=2, results=tmp_path))
    assert [(run.method, run.seed) for run in runs] == [
        ("one method", 1), ("failing", 1), ("one method", 2), ("failing", 2)
    ]  # fmt: skip
    some = runner.choose_runs(runner.Args(suite="tiny", seeds=1, methods=("fail*", "one method"), results=tmp_path))
    assert [run.method for run in some] == ["one method", "failing"]
    assert [run.seed for run in runner.choose_runs(runner.Args(suite="tiny", results=tmp_path))] == [1, 1, 2, 2, 3, 3]
    runner.SUITES["tiny"] |= {"n": 2, "first_seed": {"one method": 101, "failing": 201}}
    late = runner.choose_runs(runner.Args(suite="tiny", results=tmp_path))
    assert [(run.method, run.seed) for run in late] == [
        ("one method", 101), ("failing", 201), ("one method", 102), ("failing", 202)
    ]  # fmt: skip
    runner.SUITES["tiny"] |= {"n": 1, "first_seed": 1}
    assert runs[0].command.startswith("python /") and runs[0].command.endswith("program.py --lr 1 --x 2 --seed 1")
    assert runner.main(["tiny", "--seeds", "1", "--methods", "failing", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tiny: 1 runs, 0 of them finished"
    assert lines[1].startswith("OMP_NUM_THREADS=1 python /") and lines[1].endswith("--lr 1 --fail 1 --seed 1")


@pytest.mark.parametrize(
    "flags",
    [
        "bogus",
        "tiny --methods bogus",
        "tiny --seeds 0",
        "tiny --cpus 0",
        "tiny --gpus -1",
        f"tiny --results {__file__}",
    ],
)
def test_bad_input(runner, capsys, flags):
    assert runner.main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("run.py: error: ")


def test_finished_run_is_kept_and_skipped(runner, capsys, tmp_path):
    run = runner.Run("tiny", "one method", 1)
    assert not runner.is_finished(run, runner.RESULTS)
    code, files, about, output = execute(runner, run)
    assert code == 0 and output == "some output\n"
    runner.keep(run, runner.RESULTS, files, {"commit": "abc", **about})
    folder = runner.RESULTS / "tiny" / "one_method" / "1"
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.json", "manifest.json", "metrics.csv"]
    words, threads = json.loads((folder / "metrics.csv").read_text().splitlines()[1])
    assert words[:6] == ["--lr", "1", "--x", "2", "--seed", "1"] and threads == "2"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["command"] == run.command and manifest["resumed"] is False and manifest["wall_seconds"] >= 0
    assert set(manifest["versions"]) == {"python", *runner.PACKAGES} and "cores" in manifest["hardware"]
    assert manifest["commit"] == "abc"
    assert not run.folder(runner.WORK).exists()
    runner.SUITES["tiny"]["encoders"] = True
    runner.keep(run, tmp_path, files, about)
    assert (run.folder(tmp_path) / "encoder.safetensors").read_bytes() == files["encoder.safetensors"]
    weights = runner.weights_folder(runner.WORK, run.flags)
    assert sorted(path.name for path in weights.iterdir()) == ["args.json", "command.txt", "encoder.safetensors"]
    assert (weights / "command.txt").read_text() == run.command + "\n"
    assert runner.is_finished(run, runner.RESULTS)
    only = ["tiny", "--seeds", "1", "--methods", "one method"]
    assert runner.main(only) == 0
    assert capsys.readouterr().out == "tiny: 1 runs, 1 of them finished\n"
    assert runner.main([*only, "--dry-run", "--cpus", "2"]) == 0  # to doubt a run takes its command
    assert capsys.readouterr().out.splitlines()[1] == f"OMP_NUM_THREADS=2 {run.command}"


def test_commit_tells_of_changed_programs(runner, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "README.md").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    commit = runner.commit_of_code()
    (tmp_path / "README.md").write_text("2")
    (tmp_path / "new.py").write_text("2")
    assert len(commit) == 40 and runner.commit_of_code() == commit
    (tmp_path / "a.py").write_text("2")
    assert runner.commit_of_code() == f"{commit}-changed"


def test_suite_is_repeated_in_a_folder_of_its_own(runner, monkeypatch, capsys, tmp_path):
    run = runner.Run("tiny", "one method", 1)
    runner.keep(run, runner.RESULTS, *execute(runner, run)[1:3])
    kept = (run.folder(runner.RESULTS) / "metrics.csv").read_bytes()
    ran = []
    monkeypatch.setattr(runner, "run_all", lambda runs, args: ran.extend((run, args.results) for run in runs))
    again = ["tiny", "--seeds", "1", "--methods", "one method", "--cpus", "2", "--results", str(tmp_path / "again")]
    assert runner.main(again) == 0
    assert capsys.readouterr().out == "tiny: 1 runs, 0 of them finished\n" and ran == [(run, tmp_path / "again")]
    runner.keep(run, tmp_path / "again", *execute(runner, run)[1:3])
    assert runner.main(again) == 0
    assert capsys.readouterr().out == "tiny: 1 runs, 1 of them finished\n" and len(ran) == 1
    assert (run.folder(runner.RESULTS) / "metrics.csv").read_bytes() == kept


def test_results_of_another_command_are_not_taken_for_this_ones(runner, capsys):
    run = runner.Run("tiny", "one method", 1)
    runner.keep(run, runner.RESULTS, *execute(runner, run)[1:3])
    runner.SUITES["tiny"]["methods"]["one method"] = "--x 3"
    assert runner.main(["tiny", "--seeds", "1"]) == 2
    assert "delete the folder" in capsys.readouterr().err


def test_same_command_of_another_suite_is_not_run_again(runner, monkeypatch, capsys):
    first = runner.Run("tiny", "one method", 1)
    runner.keep(first, runner.RESULTS, *execute(runner, first)[1:3])
    monkeypatch.setitem(
        runner.SUITES, "twin", {**runner.SUITES["tiny"], "methods": {"renamed": "--x 2", "new": "--x 3"}}
    )
    monkeypatch.setattr(runner, "run_all", lambda runs, args: [])
    assert runner.main(["twin", "--seeds", "1", "--cpus", "4"]) == 0  # on other cores the numbers differ
    assert capsys.readouterr().out == "twin: 2 runs, 0 of them finished\n"
    assert runner.main(["twin", "--seeds", "1", "--cpus", "2", "--dry-run"]) == 0
    assert not (runner.RESULTS / "twin").exists()
    capsys.readouterr()
    assert runner.main(["twin", "--seeds", "1", "--cpus", "2"]) == 0
    assert capsys.readouterr().out == "twin: 2 runs, 1 of them finished\n"
    copy = runner.RESULTS / "twin" / "renamed" / "1"
    for path in first.folder(runner.RESULTS).iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes()
    assert not (runner.RESULTS / "twin" / "new").exists()


def test_killed_run_goes_on_and_one_of_other_flags_does_not(runner):
    run = runner.Run("tiny", "failing", 1)
    code, files, _, _ = execute(runner, run)
    assert code == 3 and not files
    code, files, about, _ = execute(runner, run)
    calls = [json.loads(line)[0] for line in files["metrics.csv"].decode().splitlines()[1:]]
    assert code == 0 and about["resumed"] and len(calls) == 2
    assert calls[1] == ["--resume", str(run.folder(runner.WORK) / "run")]

    runner.SUITES["tiny"]["methods"]["failing"] = "--x 4"
    code, files, about, _ = execute(runner, run)
    calls = [json.loads(line)[0] for line in files["metrics.csv"].decode().splitlines()[1:]]
    assert code == 0 and not about["resumed"] and len(calls) == 1 and "4" in calls[0]


# --- Figures and tables (their statistics need rliable: the gate draws them) ----------------------------------------
@pytest.fixture
def plot(monkeypatch, tmp_path):
    module = load("plot", monkeypatch)
    suite = {"program": "ppo_pisco.py", "methods": {"one method": "", "no results": ""}}
    monkeypatch.setitem(module.SUITES, "tiny", suite)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    for seed, scores in ((1, (0.25, 0.5)), (10, (0.75, 1.0)), (2, (0.0, 0.125))):
        folder = tmp_path / "tiny" / "one_method" / str(seed)
        folder.mkdir(parents=True)
        lines = ["global_step,eval/greedy_success,other", f"10,{scores[0]},", "15,,3", f"20,{scores[1]},"]
        (folder / "metrics.csv").write_text("\n".join(lines))
        if seed != 2:  # an unfinished run has no manifest
            manifest = {"wall_seconds": 60 if seed == 1 else 6, "resumed": seed == 10}
            (folder / "manifest.json").write_text(json.dumps(manifest))
    return module


def test_suite_is_read_seed_by_seed_without_unfinished_runs(plot):
    results = plot.read_suite("tiny")
    assert list(results) == ["one method"]
    seeds, steps, scores = results["one method"]
    assert seeds == [1, 10] and steps.tolist() == [10, 20] and scores.tolist() == [[0.25, 0.5], [0.75, 1.0]]


def test_a_run_has_its_last_and_its_mean_score(plot):
    assert plot.read_suite("tiny")["one method"].both.tolist() == [[0.5, 0.375], [1.0, 0.875]]


def test_score_per_minute_by_hand(plot):
    """Evaluations after 1, 3 and 4 minutes with 0.5, 1.0 and 0.25: by minute 5 (0.5 * 2 + 1 * 1 + 0.25 * 1) / 5."""
    minutes, scores = np.array([1.0, 3.0, 4.0]), np.array([0.5, 1.0, 0.25])
    assert plot.mean_until(minutes, scores, 5.0) == pytest.approx(2.25 / 5)
    assert plot.mean_until(minutes, scores, 3.5) == pytest.approx((0.5 * 2 + 1 * 0.5) / 3.5)
    assert plot.mean_until(minutes, scores, 0.5) == 0.0


def test_minutes_are_those_of_the_training(plot, tmp_path):
    for seed in (1, 10):
        rows = ["global_step,charts/SPS,eval/greedy_success", "60,1,", "120,2,0.5", f"240,{seed},1.0"]
        (tmp_path / "tiny" / "one_method" / str(seed) / "metrics.csv").write_text("\n".join(rows))
    assert plot.read_minutes("tiny", "one method").tolist() == [[1.0, 4.0], [1.0, 0.4]]


def test_freezings_gain_for_the_large_encoder_by_hand(plot, tmp_path, monkeypatch):
    """Every run is evaluated after 60 and 120 steps. Frozen runs take 1 and 2 minutes for them, finetuned ones twice as
    long: by minute 2, when the frozen ones are done, they have only just their first score. With the second encoder all
    of this goes twice as fast, as on another machine, and changes no score."""
    scores = {  # method: both scores of four runs, two with each encoder
        "impala, 7 frozen": [(0.5, 1.4), (0.5, 1.2), (0.7, 1.2), (0.3, 1.4)],
        "impala, 0 frozen": [(0.2, 0.4), (0.2, 0.2), (0.4, 0.2), (0.0, 0.4)],
        "nature, frozen bottom": [(0.2, 0.6), (0.2, 0.4), (0.4, 0.4), (0.4, 1.0)],
        "nature, finetuned": [(0.2, 0.2), (0.2, 0.4), (0.4, 0.4), (0.0, 0.2)],
    }
    methods = {f"encoder {seed}, {name}": "" for seed in (1, 2) for name in scores}
    monkeypatch.setitem(plot.SUITES, "large", {"program": "ppo_pisco.py", "methods": methods})
    for name, runs in scores.items():
        for run, (first, last) in enumerate(runs):
            sps = (0.5 if name.endswith(("0 frozen", "finetuned")) else 1) * (1 + run // 2)
            folder = tmp_path / "large" / f"encoder {1 + run // 2}, {name}".replace(" ", "_") / str(run)
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("{}")
            rows = ["global_step,charts/SPS,eval/greedy_success", f"60,{sps},{first}", f"120,{sps},{last}"]
            (folder / "metrics.csv").write_text("\n".join(rows))
    step, minute = (row.split(" | ") for row in plot.write_freezing("large", plot.read_suite("large")).splitlines()[2:])
    # Means over the run: 0.9, 0.25, 0.45 and 0.25. Within 2 minutes half of the first score for frozen runs, 0.25 and
    # 0.15, and nothing for the others, whose first score comes at that moment.
    assert step[2].startswith("+0.45 [") and step[3:] == ["+0.65", "+0.20", "4, 4, 4, 4 |"]
    assert minute[2].startswith("+0.10 [") and minute[3:5] == ["+0.25", "+0.15"]
    a, b, c, d = (np.array(x) for x in ([0.25, 0.25, 0.35, 0.15], [0.0] * 4, [0.1, 0.1, 0.2, 0.2], [0.0] * 4))
    assert minute[2] == plot.with_interval(*plot.difference([a, d], [b, c]), 2, "+")  # its p is the larger one
    a, b, c, d = (np.array([np.mean(run) for run in runs]) for runs in scores.values())
    assert (
        step[2] == plot.with_interval(*plot.difference([a, d], [b, c], 1 - 0.05 / 2), 2, "+") and step[1] == "supported"
    )


def test_a_panel_of_one_cell_is_titled_by_it(plot, monkeypatch):
    """Its methods have the same colours in every panel and every run as a thin line, as three are few."""
    runs = plot.Runs([1, 2, 3], np.array([1.0, 2.0]), np.array([[0.0, 0.0], [0.5, 1.0], [1.0, 0.5]]))
    panels = [[f"{cell}, {method}" for method in ("a, b", "c")] for cell in ("one", "two")]
    monkeypatch.setitem(plot.PANELS, "tiny", panels)
    monkeypatch.setattr(plot, "aggregate", lambda scores: (scores.mean(0), np.zeros((2, scores.shape[1]))))
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, name: figures.append(figure))
    plot.draw_curves("tiny", {name: runs for panel in panels for name in panel})
    one, two = figures[0].axes
    assert (one.get_title(), two.get_title()) == ("one", "two")
    for axes in (one, two):
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a, b (n = 3)", "c (n = 3)"]
        assert len(axes.lines) == 2 * (3 + 1)
    assert [line.get_color() for line in one.lines] == [line.get_color() for line in two.lines]


def test_large_encoders_curves_are_over_steps_and_minutes(plot, tmp_path, monkeypatch):
    monkeypatch.setitem(plot.SUITES, "jump-impala", {"program": "ppo_pisco.py", "methods": {}})
    for seed, plus in ((1, ""), (2, ""), (1, " + PiSCO")):
        name = f"encoder {seed}, impala, 4 frozen{plus}"
        plot.SUITES["jump-impala"]["methods"][name] = ""
        folder = tmp_path / "jump-impala" / name.replace(" ", "_") / "1"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        rows = ["global_step,charts/SPS,eval/greedy_success", f"60,{seed},0.5", f"120,{seed},{seed / 2}"]
        (folder / "metrics.csv").write_text("\n".join(rows))
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, name: figures.append((figure, name)))
    plot.draw_steps_and_minutes("jump-impala", plot.read_suite("jump-impala"))
    ((figure, name),) = figures
    steps, minutes = ([line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes[:2])
    assert name == "jump-impala" and [axes.get_title() for axes in figure.axes[::2]] == ["without a loss", "with PiSCO"]
    assert steps == [[[60, 0.5], [120, 0.5]], [[60, 0.5], [120, 1.0]], [[60, 0.5], [120, 0.75]]]  # each run, the mean
    assert minutes == [[[1, 0.5], [2, 0.5]], [[0.5, 0.5], [1, 1.0]], [[0.75, 0.5], [1.5, 0.75]]]


def test_interquartile_mean_leaves_out_a_quarter_at_each_end(plot):
    three, five = (
        np.array([[1.0], [6.0], [2.0]]),
        np.array([[9.0, 0.0], [2.0, 1.0], [3.0, 2.0], [4.0, 3.0], [-7.0, 9.0]]),
    )
    assert plot.interquartile_mean(three).tolist() == [3.0]
    assert plot.interquartile_mean(five).tolist() == [3.0, 2.0]


def test_minutes_leave_out_resumed_runs(plot, monkeypatch):
    monkeypatch.setattr(plot, "FEW", 2)
    monkeypatch.setattr(plot, "aggregate", lambda both: (both.mean(0), np.zeros((2, 2))))
    table = plot.write_table("tiny", plot.read_suite("tiny"))
    assert table.endswith("| one method | 2 | 0.75 [0.00, 0.00] | 0.62 [0.00, 0.00] | - | 0.50 1.00 | 1.0 |")
    (plot.RESULTS / "tiny" / "one_method" / "1" / "manifest.json").write_text('{"wall_seconds": 60, "resumed": true}')
    assert plot.write_table("tiny", plot.read_suite("tiny")).endswith("| 0.50 1.00 | - |")


def test_few_runs_have_no_interval(plot, monkeypatch):
    monkeypatch.setattr(plot, "aggregate", lambda both: (both.mean(0), np.zeros((2, 2))))
    table = plot.write_table("tiny", plot.read_suite("tiny"))
    assert table.endswith("| one method | 2 | 0.75 | 0.62 | - | 0.50 1.00 | 1.0 |")


def test_suite_may_name_its_score(plot, monkeypatch):
    monkeypatch.setitem(plot.SUITES["tiny"], "score", "other")
    assert plot.read_suite("tiny")["one method"].scores.tolist() == [[3.0], [3.0]]


@pytest.mark.parametrize(
    "low, high, margin, expected",
    [
        (0.01, 0.2, 0.0, "supported"),
        (-0.01, 0.2, 0.0, "inconclusive"),
        (-0.2, -0.01, 0.0, "contradicted"),
        (-0.04, 0.1, 0.05, "supported"),
        (-0.06, 0.1, 0.05, "inconclusive"),
        (-0.2, -0.04, 0.05, "inconclusive"),
        (-0.2, -0.06, 0.05, "contradicted"),
        (-0.09, 0.09, 0.0, "no difference"),
        (-0.11, 0.09, 0.0, "inconclusive"),
        (-0.09, 0.09, 0.1, "supported"),
        (np.nan, np.nan, 0.0, "inconclusive"),
    ],
)
def test_verdict(plot, low, high, margin, expected):
    assert plot.verdict(low, high, margin, 0.1) == expected


def test_claims_and_gains_name_methods_of_their_suites(plot):
    claims = plot.PREDICTIONS.values()
    pairs = [prediction[:3] for found in claims for predictions in found.values() for prediction in predictions]
    pairs += [(suite, *pair) for suite in plot.TWO_SIDED for pair in plot.TWO_SIDED[suite]]
    pairs += [(suite, *pair) for suite in plot.CONTRASTS for four in plot.CONTRASTS[suite].values() for pair in four]
    for suite, method, other in pairs:
        methods = plot.SUITES[suite]["methods"]
        if plot.SUITES[suite].get("cells"):
            methods = {name.split(", ", 1)[1] for name in methods}
        if suite == "jump-noise":
            methods = {f"{name}{score}" for name in methods for score in (", fresh head", *plot.UNDER_NOISE)}
        assert {method, other} <= set(methods)
        assert method != other


def test_difference_has_welchs_interval(plot):
    gain, (low, high) = plot.difference([np.array([1.0, 3.0])], [np.array([0.0, 2.0])])
    # Both samples' variance is 2, so the standard error is sqrt(2/2 + 2/2), with 2 degrees of freedom: t = 4.302653
    half = 4.302653 * 2**0.5
    assert gain == 1.0 and (low, high) == pytest.approx((1 - half, 1 + half), abs=1e-5)
    gain, interval = plot.difference([np.array([1.0, 1.0])], [np.array([0.5, 0.5])])
    assert gain == 0.5 and np.isnan(interval).all()
    assert (
        plot.with_interval(gain, interval, 2, "+") == "+0.50 [?, ?]"
        and plot.verdict(*interval, 0.0, 0.1) == "inconclusive"
    )
    random = np.random.default_rng(0)
    unequal = random.normal(1, 0.1, 8), random.normal(0, 0.3, 5)
    welch = plot.stats.ttest_ind(*unequal, equal_var=False)
    assert plot.difference(unequal[:1], unequal[1:], 0.9)[1] == pytest.approx(tuple(welch.confidence_interval(0.9)))
    assert plot.compare(*unequal, 0.0)[0] == pytest.approx(welch.pvalue)
    shifted = plot.stats.ttest_ind(unequal[0] - 0.9, unequal[1], equal_var=False)
    assert plot.compare(*unequal, -0.9)[0] == pytest.approx(shifted.pvalue)


def test_difference_of_differences_by_hand(plot):
    """Four samples of variance 2 and two runs each: a standard error of sqrt(4), four degrees of freedom. Then one of
    variance 8: squares 1, 1, 1 and 4, so 49 / (1 + 1 + 1 + 16) = 2.578947 degrees of freedom, t = 3.497566."""
    up, down, wide = np.array([3.0, 5.0]), np.array([0.0, 2.0]), np.array([-1.0, 3.0])
    _, (low, high) = plot.difference([up, down], [down, wide])
    assert (high - low) / 2 == pytest.approx(3.497566 * 7**0.5, abs=1e-4)
    gain, (low, high) = plot.difference([up, down], [down, down])
    assert gain == 3.0 and (low, high) == pytest.approx((3 - 2 * 2.776445, 3 + 2 * 2.776445), abs=1e-5)


def test_gains_without_a_direction_and_their_difference(plot, monkeypatch):
    """Two gains under Holm's correction, one clear and one clearly negative, and the first less the second."""
    random = np.random.default_rng(0)
    a, b, c, d = random.normal(0, 0.1, (4, 6, 2)) + np.array([1.0, 0.0, 0.0, 2.0])[:, None, None]
    scores = {"with": a, "without": b, "other with": c, "other without": d}
    monkeypatch.setattr(plot, "read_scores", lambda suite: scores)
    monkeypatch.setitem(plot.TWO_SIDED, "tiny", [("with", "without"), ("other with", "other without")])
    monkeypatch.setitem(
        plot.CONTRASTS, "tiny", {"first less second": (("with", "without"), ("other with", "other without"))}
    )
    gain, loss, contrast = (row.split(" | ") for row in plot.write_two_sided("tiny").splitlines()[2:])
    means = [x[:, 1].mean() for x in (a, b, c, d)]
    assert gain[:2] == ["| with - without", "a gain"] and loss[1] == "a loss"
    assert gain[2] == plot.with_interval(*plot.difference([a[:, 1]], [b[:, 1]]), 2, "+")  # its p is the larger one
    assert loss[3] == plot.with_interval(*plot.difference([c[:, 0]], [d[:, 0]], 1 - 0.05 / 2), 2, "+")
    assert gain[4:] == [f"{means[0]:.2f} for {means[1]:.2f}", "6, 6 |"]
    assert contrast[0] == "| first less second"
    for cell, i in zip(contrast[2:4], (1, 0)):
        assert cell == plot.with_interval(*plot.difference([a[:, i], d[:, i]], [b[:, i], c[:, i]]), 2, "+")
    monkeypatch.setattr(plot, "read_scores", lambda suite: {})
    assert len(plot.write_two_sided("tiny").splitlines()) == 2


def test_pages_have_a_place_for_every_table_of_verdicts_and_gains(monkeypatch):
    plot = load("plot", monkeypatch)
    page = (ROOT / "benchmark" / "README.md").read_text()
    names = ["verdicts", "one cell"]
    judged = [suite for suite in plot.SUITES if "n" in plot.SUITES[suite] and plot.read_scores(suite)]
    names += [f"{suite} gains" for suite in plot.TWO_SIDED if suite in judged]
    names += [suite for suite in judged if suite.endswith(("-baselines", "-cells"))]
    names += ["noise"] * ("jump-noise" in judged) + ["freezing"] * ("jump-impala" in judged)
    names += ["control"] * ("dmc-sparse" in judged)
    assert all(f"<!-- {name} -->" in page and f"<!-- /{name} -->" in page for name in names)


@pytest.mark.parametrize(
    "pvalues, levels",
    [
        ([0.001, 0.04, 0.01], [0.05 / 3, 0.05, 0.05 / 2]),
        ([0.001, 0.04, 0.03], [0.05 / 3, 0.05 / 2, 0.05 / 2]),  # 0.03 fails at 0.025, so 0.04 has no chance at 0.05
        ([0.02, 0.01], [0.05, 0.05 / 2]),
        ([0.03, 0.9, 0.9, 0.9], [0.05 / 4] * 4),
        ([0.0, 0.0, 0.04], [0.05 / 3, 0.05 / 3, 0.05]),  # equal ones don't depend on their order
    ],
)
def test_holms_levels(plot, pvalues, levels):
    assert plot.holm_levels(pvalues) == pytest.approx(levels)


def test_a_claims_predictions_share_its_error(plot):
    """Two predictions, the clear one tested at 0.05 / 2 and the other then at 0.05; a third has too few runs."""
    random = np.random.default_rng(0)
    low, high = random.normal(0, 0.1, (2, 6, 2)) + np.array([[[0.0]], [[1.0]]])
    scores = {"tiny": {"low": low, "high": high, "same": low + 0.01, "few": high[:4]}}
    predictions = [("tiny", "high", "low", 0.0), ("tiny", "same", "low", 0.0), ("tiny", "few", "low", 0.0)]
    (first, mean, end, counts), (second, other_mean, _, _) = plot.judge(predictions, scores)
    assert (first, second, counts) == (*predictions[:2], (6, 6, 1))
    assert mean == plot.difference([high[:, 1]], [low[:, 1]], 1 - 0.05 / 2)
    assert end == plot.difference([high[:, 0]], [low[:, 0]], 1 - 0.05 / 2)
    assert other_mean == plot.difference([low[:, 1] + 0.01], [low[:, 1]], 0.95)


def test_a_measurement_has_no_end_and_no_part_in_its_error(plot):
    random = np.random.default_rng(0)
    low, high = random.normal(0, 0.1, (2, 6, 2)) + np.array([[[0.0]], [[1.0]]])
    noise = plot.UNDER_NOISE[0]
    scores = {"tiny": {"low": low, "high": high, f"low{noise}": low, f"high{noise}": high}}
    predictions = [("tiny", "high", "low", 0.0), ("tiny", f"high{noise}", f"low{noise}", 0.0)]
    (_, mean, end, _), (_, _, no_end, _) = plot.judge(predictions, scores)
    assert mean == plot.difference([high[:, 1]], [low[:, 1]], 1 - 0.05 / 2) and no_end is None
    assert end == plot.difference([high[:, 0]], [low[:, 0]], 0.95)


def test_margin_enters_the_test(plot):
    """A gain of about zero comes last without a margin and, with one that large, first."""
    random = np.random.default_rng(1)
    base, better = random.normal(0, 0.1, (8, 2)), random.normal(0.3, 0.1, (8, 2))
    scores = {"tiny": {"base": base, "better": better, "same": base[::-1]}}
    predictions = [("tiny", "same", "base", 1.0), ("tiny", "better", "base", 0.0)]
    found = plot.judge(predictions, scores)
    assert found[0][1] == plot.difference([base[::-1, 1]], [base[:, 1]], 1 - 0.05 / 2)


def test_gains_in_sentences_stand_in_tables():
    """In those that plot.py writes from the kept runs; or a commit is named that has the runs."""
    gain = r"[+-]\d\.\d\d \[[+-]\d\.\d\d, [+-]\d\.\d\d\]"
    page = (ROOT / "benchmark" / "README.md").read_text()
    tables = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    prose = " ".join(line for line in page.splitlines() if not line.startswith("|")) + (ROOT / "README.md").read_text()
    gains = re.findall(rf"({gain})( \(commit \w{{7}})?", " ".join(prose.split()))
    assert len(gains) > 5 and not [gain for gain, commit in gains if not commit and gain not in tables]


def test_cells_are_drawn_and_then_seeds_in_them(plot):
    """Gains of 0 and 1 in two cells without spread: a mean of 0, 0.5 and 1 with chances 1/4, 1/2 and 1/4, as with two
    seeds of one cell. With both, four draws of 0 or 1 which are all in the upper cell with a chance of 1/4."""
    for gains in (np.array([[0.0], [1.0]]), np.array([[0.0, 0.0], [1.0, 1.0]]), np.array([[0.0, 1.0]])):
        samples = plot.resample(gains)
        assert [np.mean(samples == x) for x in (0.0, 0.5, 1.0)] == pytest.approx([0.25, 0.5, 0.25], abs=0.02)
    samples = plot.resample(np.array([[0.0, 1.0], [2.0, 3.0]]))
    # 0: both draws of a cell are the lower one and both seeds of both draws too, 1/4 * (1/4 * 1/4)
    assert np.mean(samples == 0.0) == pytest.approx(1 / 64, abs=0.005)


def test_simulated_gains_and_their_misses(plot, monkeypatch):
    """Both cells of a split share its effect, 100 times what a run's noise adds; a gain of 1 in all runs is missed by
    no interval, nor is noise about zero."""
    monkeypatch.setitem(sys.modules, "plot", plot)
    coverage = load("coverage", monkeypatch)
    gains = coverage.draw_gains(np.random.default_rng(0), 0, 100 * 3**0.5)
    assert gains.shape == (8, 3)
    splits = gains.reshape(4, 6)
    assert np.ptp(splits, axis=1).max() < 6 and 20 < splits.mean(1).std() < 300
    noise = np.random.default_rng(0).uniform(-0.01, 0.01, (8, 3))
    assert coverage.misses(noise - noise.mean() + 1, 0.05) == [True] * 3
    assert coverage.misses(noise - noise.mean(), 0.05) == [False] * 3


def test_gain_over_cells_has_the_wider_of_two_intervals(plot, monkeypatch):
    """Gains by cell and seed 1, 2 and 2, 5, so cells' means of 1.5 and 3.5: Student's t with a standard error of 1 and
    one degree of freedom is tan(pi / 4) = 1 at a level of 0.5 and 3.077684 at 0.8."""
    ours, others = np.array([[1.0, 2.0], [3.0, 6.0]]), np.array([[0.0, 0.0], [1.0, 1.0]])
    by_hand = {((1.0, 2.0), (2.0, 5.0)): np.arange(-1.0, 9.0)}  # samples -1, 0, ..., 8
    monkeypatch.setattr(plot, "resample", lambda gains: by_hand[tuple(map(tuple, gains))])
    pvalue, interval = plot.compare(ours, others, 0.0)
    assert pvalue == pytest.approx(2 * 2 / 10)  # two of ten samples are no gain; Student's p is smaller, 0.242
    assert interval(0.5) == (2.5, pytest.approx((1.25, 5.75)))  # the quartiles of the samples are wider than 1.5, 3.5
    by_hand[(1.0, 2.0), (2.0, 5.0)] = np.arange(1.0, 11.0)
    pvalue, interval = plot.compare(ours, others, 0.0)
    assert pvalue == pytest.approx(2 * np.arctan(1 / 2.5) / np.pi)  # Cauchy's tail beyond 2.5
    assert interval(0.8) == (2.5, pytest.approx((2.5 - 3.077684, 9.1)))  # one side from each


def test_predictions_over_cells_are_judged(plot):
    """By cell and seed. All gains over "low" are positive: tested first, at 0.05 / 2; those over "same" at 0.05."""
    random = np.random.default_rng(0)
    ours, low, same = random.uniform(0, 1, (3, 4, 3, 2)) + np.array([2.0, 0.0, 2.0])[:, None, None, None]
    scores = {"tiny": {"ours": ours, "low": low, "same": same}}
    predictions = [("tiny", "ours", "same", 0.0), ("tiny", "ours", "low", 0.0)]
    for (_, mean, end, counts), others, level in zip(plot.judge(predictions, scores), (same, low), (0.05, 0.025)):
        assert counts == (12, 12, 4)
        for (gain, interval), column in ((mean, 1), (end, 0)):
            gains = (ours - others)[..., column]
            _, student = plot.difference([gains.mean(1)], [], 1 - level)
            samples = np.quantile(plot.resample(gains), [level / 2, 1 - level / 2])
            assert gain == pytest.approx(gains.mean())
            assert interval == pytest.approx((min(samples[0], student[0]), max(samples[1], student[1])))


def test_suite_is_judged_when_it_has_all_its_seeds(plot, tmp_path, monkeypatch):
    methods = {f"cell {cell}, {method}": "" for cell in (1, 2) for method in ("a, b", "c")}
    first = {name: 1 if name.startswith("cell 1") else 3 for name in methods}  # the second cell has seeds of its own
    suite = {"program": "ppo_pisco.py", "n": 2, "first_seed": first, "cells": True, "methods": methods}
    monkeypatch.setitem(plot.SUITES, "cells", suite)

    def put(name, seed, scores):
        folder = tmp_path / "cells" / name.replace(" ", "_") / str(seed)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        lines = [f"{10 * (i + 1)},{score}" for i, score in enumerate(scores)]
        (folder / "metrics.csv").write_text("\n".join(["global_step,eval/greedy_success", *lines]))

    for seed in (1, 2):
        for i, name in enumerate(methods):
            assert plot.read_scores("cells") == {}
            put(name, seed + 2 * (i >= 2), (i, seed))
    scores = plot.read_scores("cells")
    assert list(scores) == ["a, b", "c"] and scores["a, b"].shape == (2, 2, 2)
    assert scores["c"].tolist() == [[[1, 1.0], [2, 1.5]], [[1, 2.0], [2, 2.5]]]  # cell, seed: end, mean
    put("cell 1, c", 5, (0, 0))  # no arm is topped up
    assert plot.read_scores("cells") == {}


def test_what_is_predicted_has_a_number_of_seeds(plot):
    claims = [predictions for found in plot.PREDICTIONS.values() for predictions in found.values()]
    for suite in {prediction[0] for predictions in claims for prediction in predictions}:
        assert plot.SUITES[suite]["n"] >= plot.FEW or plot.SUITES[suite]["cells"]
        assert (ROOT / "benchmark" / "results" / suite / "PROTOCOL.md").exists()


@pytest.fixture
def cells(plot, monkeypatch):
    """Two splits with two encoders each: b gains 0.5 over a in the first split and 0.25 in the second, in one of its
    cells nothing at the end."""
    names = [f"{split} encoder {seed}" for split in ("one", "two") for seed in (1, 2)]
    methods = {f"{cell}, {method}": "" for cell in names for method in "ab"}
    monkeypatch.setitem(plot.SUITES, "cells", {"program": "ppo_pisco.py", "n": 2, "cells": True, "methods": methods})
    gains = [(0.5, 0.5), (0.5, 0.5), (0.25, 0.25), (0.5, 0.0)]  # at both evaluations, in every cell
    scores = {f"{cell}, a": np.full((2, 2), 0.25) for cell in names}
    scores |= {f"{cell}, b": 0.25 + np.array([gain, gain]) for cell, gain in zip(names, gains)}
    results = {name: plot.Runs([1, 2], np.array([10.0, 20.0]), scores[name]) for name in methods}
    monkeypatch.setattr(plot, "read_suite", lambda suite: results)
    return results


def test_cells_have_both_scores_and_every_splits_own(plot, cells, monkeypatch):
    monkeypatch.setattr(plot, "resample", lambda scores: np.array([[0.0, 0.5]] * 3))
    assert plot.write_cells_table("cells", cells).splitlines() == [
        "| method | n | at the end | mean over the run | one | two |",
        "|---|---|---|---|---|---|",
        "| a | 8 | 0.25 [0.00, 0.00] | 0.25 [0.50, 0.50] | 0.25 | 0.25 |",
        "| b | 8 | 0.56 [0.00, 0.00] | 0.62 [0.50, 0.50] | 0.75 | 0.50 |",
    ]


def test_splits_that_a_verdict_hinges_on_are_named(plot, monkeypatch):
    """b's gains are 0.5 to 0.62 in two splits and 0 and 0.05 in the third. Student's 95% intervals: [0.09, 0.68] of all
    six cells, [-0.21, 0.80] without the first split, [0.46, 0.66] without the third."""
    methods = {f"{split} encoder {i}, {m}": "" for split in ("one", "two", "three") for i in (1, 2) for m in "ab"}
    monkeypatch.setitem(plot.SUITES, "cells", {"program": "ppo_pisco.py", "methods": methods})
    gains = np.array([0.5, 0.6, 0.52, 0.62, 0.0, 0.05])
    a = np.zeros((6, 2, 2))
    monkeypatch.setattr(plot, "read_scores", lambda suite: {"a": a, "b": a + gains[:, None, None]})
    predictions = [("cells", "b", "a", 0.0), ("cells", "b", "a", -0.3)]
    found = [plot.gains_in_splits(prediction, plot.read_scores("cells")) for prediction in predictions]
    assert [hinges for _, hinges in found] == [["one", "two"], ["three"]]
    for by_split, _ in found:
        assert by_split == pytest.approx({"one": 0.55, "two": 0.57, "three": 0.025})


def test_verdicts_that_hinge_on_a_split_are_fragile(plot, monkeypatch):
    """The same gains, and the same in every cell; and a suite of one cell, which has no splits."""
    methods = {f"{split} encoder {i}, {m}": "" for split in ("one", "two", "three") for i in (1, 2) for m in "abc"}
    monkeypatch.setitem(plot.SUITES, "cells", {"program": "ppo_pisco.py", "cells": True, "methods": methods})
    noise = np.random.default_rng(0).uniform(-0.01, 0.01, (6, 2, 2))
    b = noise + np.array([0.5, 0.6, 0.52, 0.62, 0.0, 0.05])[:, None, None]
    scores = {
        "cells": {"a": np.zeros((6, 2, 2)), "b": b, "c": noise + 0.5},
        "tiny": {"a": noise[:, 0], "b": noise[:, 1] + 1},
    }
    monkeypatch.setattr(plot, "read_scores", lambda suite: scores[suite])
    predictions = [("cells", "b", "a", 0.0), ("cells", "c", "a", 0.0), ("tiny", "b", "a", 0.0)]
    judged, splits = plot.judge_all({"a claim": predictions, "without runs": [("tiny", "x", "a", 0.0)]})
    assert [row[0] for row in judged["a claim"]] == predictions and list(judged) == ["a claim"]
    assert {prediction: hinges for prediction, (_, hinges) in splits.items()} == {
        predictions[0]: ["one", "two"], predictions[1]: []
    }  # fmt: skip


def test_pair_without_spread_passes_no_test(plot):
    """It must not take the strictest level from a pair that has a test."""
    clear = np.array([[0.0, 0.1], [0.1, 0.0]] * 3)
    scores = {"tiny": {"one": np.ones((5, 2)), "half": np.full((5, 2), 0.5), "low": clear, "high": clear + 1}}
    flat, found = plot.judge([("tiny", "one", "half", 0.0), ("tiny", "high", "low", 0.0)], scores)
    assert flat[1][0] == 0.5 and np.isnan(flat[1][1]).all()
    assert found[1] == plot.difference([clear[:, 1] + 1], [clear[:, 1]], 1 - 0.05 / 2)


def test_verdicts_table_and_forest(plot, monkeypatch):
    monkeypatch.setitem(plot.SUITES, "other", {"program": "drqv2_pisco.py", "methods": {}})
    judged = {
        "a claim": [
            (("tiny", "one", "two", 0.0), (0.25, (0.125, 0.375)), (0.5, (0.25, 0.75)), (5, 6, 1)),
            (("other", "one", "two", 0.1), (-0.25, (-0.5, 0.0)), (0.0, (np.nan, np.nan)), (14, 14, 2)),
            (("tiny", "a, relative change", "b", 0.0), (0.5, (0.25, 0.75)), None, (5, 5, 2)),
        ]
    }
    noise = judged["a claim"][2][0]
    splits = {("other", "one", "two", 0.1): ({"x": -0.5, "y": 0.0}, ["x"]), noise: ({"x": 0.5, "y": 0.5}, [])}
    head, _, *rows = plot.write_verdicts(judged, splits).splitlines()
    assert head.endswith("| runs | cells | x | y |")
    assert rows == [
        "| a claim | one > two | supported | +0.25 [+0.12, +0.38] | +0.50 [+0.25, +0.75] | 5, 6 | 1 | - | - |",
        "|  | one > two - 0.10 | inconclusive, fragile (x) | -0.25 [-0.50, +0.00] | +0.00 [?, ?] | 14, 14 | 2 | "
        "-0.50 | +0.00 |",
        "|  | a, relative change > b | supported | +0.50 [+0.25, +0.75] | - | 5, 5 | 2 | +0.50 | +0.50 |",
    ]
    assert plot.write_verdicts(judged, {}).splitlines()[0].endswith("| runs | cells |")
    figures = []
    monkeypatch.setattr(plot, "save", lambda figure, name: figures.append((figure, name)))
    plot.draw_forest(judged, splits)
    ((figure, name),) = figures
    (axes,) = figure.axes
    assert name == "readme" and [text.get_text() for text in axes.get_yticklabels()] == [
        "a claim", "one > two", "one > two - 0.10", "a, relative change > b"
    ]  # fmt: skip
    points = [line for line in axes.lines if line.get_marker() == "o" and line.get_markersize() == 7]
    clear, unclear = plot.VERDICTS["supported"], plot.VERDICTS["inconclusive"]
    assert [(line.get_xdata()[0], line.get_color(), line.get_markerfacecolor()) for line in points] == [
        (0.25, clear, clear), (-0.25, unclear, "white"), (0.5, clear, clear)
    ]  # fmt: skip
    assert [list(line.get_xdata()) for line in axes.lines if line.get_linewidth() == 2.5] == [
        [0.125, 0.375],
        [-0.5, 0.0],
        [0.25, 0.75],
    ]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "|"] == [0.0, -0.1, 0.0]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_markersize() == 4] == [0.5, 0.0]
    assert [text.get_text() for text in axes.texts] == ["5, 6; 1", "14, 14; 2", "5, 5; 2", "runs; cells"]


def test_rates_table_has_a_row_per_method(plot, tmp_path, monkeypatch):
    monkeypatch.setitem(plot.SUITES, "a-rates", {"program": "ppo_pisco.py", "methods": {}})
    runs = [("a, b", "1e-3", (0.25, 0.75)), ("a, b", "1e-2", (0.5, 0.5))]
    runs += [("c", "1e-3", (0.5,)), ("c", "1e-2", (1.0,)), ("d", "1e-2", (1.0, 1.0))]
    for method, rate, scores in runs:
        plot.SUITES["a-rates"]["methods"][f"{method}, {rate}"] = ""
        for seed, score in enumerate(scores, 1):
            folder = tmp_path / "a-rates" / f"{method}, {rate}".replace(" ", "_") / str(seed)
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("{}")
            (folder / "metrics.csv").write_text(f"global_step,eval/greedy_success\n10,{score}\n20,0.75\n")
    assert plot.write_rates_table(plot.read_suite("a-rates"), 2).splitlines() == [
        "| method | 1e-3 | 1e-2 | n |",
        "|---|---|---|---|",
        "| a, b | **0.62 (0.75)** | 0.62 (0.75) | 2 |",  # the smaller one of two equals
        "| c | 0.62 (0.75) | 0.88 (0.75) | 1 |",  # too few runs
        "| d |  | 0.88 (0.75) | 2 |",  # not every rate
    ]


@pytest.mark.parametrize(
    "suite, seeds, rates",
    [
        ("jump-rates", [1, 2, 3, 4, 5], 5),
        ("jump-loss-rates", [1, 2, 3, 4, 5], 5),
        ("jump-impala-rates", [1, 2], 3),
        ("jump-state-rates", [1, 2, 3, 4, 5], 5),
    ],
)
def test_own_rates_are_those_that_the_protocol_chooses(monkeypatch, suite, seeds, rates):
    module = load("plot", monkeypatch)
    results, suites = module.read_suite(suite), sys.modules["suites"]
    assert results.keys() == module.SUITES[suite]["methods"].keys()
    assert all(runs.seeds == seeds for runs in results.values())
    means = {name: round(runs.scores.mean(), 9) for name, runs in results.items()}
    methods = {name.rsplit(", ", 1)[0] for name in results}
    for method in methods:
        # The smaller one of two equals, as the rates rise
        assert suites.OWN_RATE[method] == max(suites.RATES[:rates], key=lambda rate: means[f"{method}, {rate}"])
    for linear in (method for method in methods if method.endswith(", linear head")):
        mlp = linear.replace("linear", "MLP")
        assert means[f"{mlp}, {suites.OWN_RATE[mlp]}"] > means[f"{linear}, {suites.OWN_RATE[linear]}"]


def test_noise_by_hand(plot, tmp_path, monkeypatch):
    """Success without noise, under 8 and under 16, of fresh heads: one run loses half of 0.5, one gains 0.25, one has
    none to lose. The trained policies solve everything."""
    suite = {"program": "x", "cells": True, "n": 2, "methods": {"one, a": "", "two, a": ""}}
    monkeypatch.setitem(plot.SUITES, "jump-noise", suite | {"first_seed": {"one, a": 1, "two, a": 3}})
    shares = {
        ("one", 1): (0.5, 0.5, 0.25),
        ("one", 2): (0.5, 1.0, 0.75),
        ("two", 3): (0.0,) * 3,
        ("two", 4): (1.0, 1.0, 0.0),
    }
    for (cell, seed), values in shares.items():
        folder = tmp_path / "jump-noise" / f"{cell},_a" / str(seed)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        (folder / "metrics.csv").write_text("global_step,eval/greedy_success\n10,0.5\n")
        noise = {"fresh head": dict(zip(("0", "8", "16"), values)), "trained": dict.fromkeys(("0", "8", "16"), 1.0)}
        (folder / "evaluation.json").write_text(json.dumps({"noise": noise}))
    scores = plot.read_scores("jump-noise")
    assert list(scores) == ["a, fresh head", "a, change under noise", "a, relative change"]
    assert scores["a, fresh head"].tolist() == [[[0.5, 0.5]] * 2] * 2
    assert scores["a, change under noise"][..., 0].tolist() == [[-0.25, 0.25], [0.0, -1.0]]
    assert scores["a, relative change"][..., 1].tolist() == [[-0.5, 0.0], [0.0, -1.0]]
    names = "| method | n | noise 0 | noise 8 | noise 16 | solve nothing without noise |\n|---|---|---|---|---|---|\n"
    assert plot.write_noise_table("fresh head") == f"{names}| a | 4 | 0.50 | 0.62 | 0.25 | 1 |"
    assert plot.write_noise_table("trained") == f"{names}| a | 4 | 1.00 | 1.00 | 1.00 | 0 |"


def test_seeds_with_different_evaluations_are_refused(plot, tmp_path):
    path = tmp_path / "tiny" / "one_method" / "1" / "metrics.csv"
    path.write_text(path.read_text().replace("20,", "21,"))
    with pytest.raises(ValueError, match="not at the same steps"):
        plot.read_suite("tiny")


def test_table_goes_between_its_marks_alone(plot, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- tiny -->\nold\nlines\n<!-- /tiny -->\nb <!-- other -->\nc\n<!-- /other -->\n")
    monkeypatch.setattr(plot, "PAGES", [page])
    plot.insert_table("tiny", r"| new \1 |")
    assert page.read_text() == "a\n<!-- tiny -->\n| new \\1 |\n<!-- /tiny -->\nb <!-- other -->\nc\n<!-- /other -->\n"


def test_official_marks_are_those_of_the_task_within_the_run(plot, tmp_path, monkeypatch):
    rows = ["task,frames,mean,min,max", "a_b,50,400,300,600", "a_b,100,900,800,950", "a_bc,50,1,1,1"]
    (tmp_path / "drqv2_official.csv").write_text("\n".join(rows))
    monkeypatch.setitem(plot.SUITES, "control", {"program": "drqv2_pisco.py --env-id a-b --bf16", "methods": {}})
    axes = plot.plt.figure().subplots()
    plot.draw_official(axes, "control", 99.0)
    ((marks, caps, bars),) = axes.containers
    assert marks.get_xydata().tolist() == [[50.0, 400.0]] and axes.get_ylim() == (0, 1000)
    assert [cap.get_ydata().tolist() for cap in caps] == [[300.0], [600.0]]


def test_unknown_suite(plot, capsys):
    assert plot.main(["bogus"]) == 2
    assert capsys.readouterr().err.startswith("plot.py: error: suite 'bogus'")


# --- Speed's report --------------------------------------------------------------------------------------------------
def test_report_has_medians_and_their_ratios(monkeypatch, tmp_path, capsys):
    report = load("report", monkeypatch)
    numbers = {"ours": iter([1.0, 3.0, 2.0]), "peer": iter([4000.4, 6000.0, 9000.0])}
    calls = []
    measured = {
        name: (lambda name=name: calls.append(name) or next(numbers[name]), unit)
        for name, unit in (("ours", "s"), ("peer", "steps/s"))
    }
    samples = report.take_samples(measured, 3)
    assert samples == {"ours": [1.0, 3.0, 2.0], "peer": [4000.4, 6000.0, 9000.0]} and calls == ["ours", "peer"] * 3
    path = tmp_path / "report.csv"
    report.write_report(samples, {"ours": "s", "peer": "steps/s"}, [("peer", "ours", "x")], "a machine", path)
    assert path.read_text().split() == [
        "what,value,unit", "or", "meaning", "ours,2,s", "peer,6000,steps/s", "peer", "/", "ours,4000.40,x",
        "machine,a", "machine,3", "repeats",
    ]  # fmt: skip
    assert "peer / ours" in capsys.readouterr().out
