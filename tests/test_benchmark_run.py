"""The benchmark's runner, without Ray: which runs a suite has, what one leaves, how it goes on after a kill."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from benchmark_common import load
from conftest import ROOT

PROGRAM = """
import json, os, pathlib, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(words.get("--resume") or words["--runs-dir"] + "/run")
folder.mkdir(parents=True, exist_ok=True)
(folder / "args.json").write_text("{}")
with open(folder / "calls.txt", "a") as file:
    file.write(json.dumps([sys.argv[1:], os.environ["OMP_NUM_THREADS"]]) + "\\n")
assert os.environ["LP_NUM_THREADS"] == os.environ["OMP_NUM_THREADS"]
print("some output")
if "--fail" in words and "--resume" not in words:
    sys.exit(3)
(folder / "encoder.safetensors").write_text("weights")
(folder / "metrics.csv").write_text(
    "global_step,charts/SPS,eval/greedy_return,eval/greedy_success,losses/ssl_grad_share,losses/view_agreement\\n"
    "10,2.0,,,1,\\n20,2.5,57.0,0.3333333333333333,2,0.5\\n30,3.0,26.0,1.0,3,0.75\\n"
)
solved = {"20:10": True, "30:20": False}
(folder / "evaluation.json").write_text(json.dumps({policy: {"solved": solved} for policy in ("greedy", "sampled")}))
"""


@pytest.fixture
def runner(monkeypatch, tmp_path):
    """benchmark/run.py as a module, with folders and a suite of its own."""
    module = load("run", monkeypatch)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    suite = {"program": f"{program} --lr 1", "methods": {"one method": "--x 2", "failing": "--fail 1"}}
    monkeypatch.setitem(module.SUITES, "tiny", suite)
    module.RESULTS_OF_PAGE = module.RESULTS
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    return module


def execute(runner, run, cpus=2):
    return runner.execute(run.command, run.flags, run.work, cpus)


def calls_of(runner, run):
    """What the program of a run was called with, [[word], number of threads] each; `keep` takes that away."""
    return [json.loads(line) for line in (run.work / "run" / "calls.txt").read_text().splitlines()]


def kept(runner, run, cpus=2):
    """A run that has been executed and kept: its row of runs.csv."""
    code, files, about, _ = execute(runner, run, cpus)
    assert code == 0
    runner.keep(run, runner.RESULTS, files, {"commit": "abc", **about})
    return runner.read_runs(runner.RESULTS / run.suite)[run.method, run.seed]


# What each suite's flags come to, all arguments of all methods: a change of a default would make kept results another
# command's. Print `digest(suite)` for a new suite with results; `left_out` is for new arguments that change nothing.
DIGESTS = {
    "jump-settings": "e15d5aaa6170",
    "jump-unseen": "c352b34a4930",
    "jump-18": "d85750ad5d80",
    "jump-others": "5e27fce83a76",
    "jump-simsiam-curl": "a73b197b2d9f",
    "jump-augmented": "05c8a8830a5e",
    "jump-augmented-rates": "3fbe2e385014",
    "miniworld": "f172b7683379",
    "miniworld-encoders": "d534ff54722a",
    "miniworld-sources": "2c1382cc8b57",
    "miniworld-rates": "f879e30c7654",
    "jump-sources": "9c7262f69d73",
    "jump-impala-sources": "12012d95b256",
    "dmc-small": "2a0ad869bc09",
    "dmc-weight": "796550a83421",
}


def digest(suite):
    """Checksum of the arguments, seed 1, of all methods of a suite."""
    import drqv2_pisco
    import ppo_pisco

    resolved = []
    for flags in suite["methods"].values():
        program, *flags = f"{suite['program']} {flags} --seed 1".split()
        module = drqv2_pisco if program == "drqv2_pisco.py" else ppo_pisco
        args = asdict(module.parse_args(flags))
        args["encoder_weights"] = Path(args["encoder_weights"]).name
        if args["encoder"] == "drqv2":  # there was no other one, and no flag
            del args["encoder"]
        # The loss's arguments change nothing or stand in the command, and evaluations do not change what is trained.
        left_out = ("ssl_", "projector", "jump_eval_tasks", "vectorization")
        resolved.append({key: args[key] for key in sorted(args) if not key.startswith(left_out)})
    return hashlib.sha256(json.dumps(resolved).encode()).hexdigest()[:12]


def test_suites_with_results_come_to_the_same_arguments_as_ever(runner):
    assert {name: digest(runner.SUITES[name]) for name in DIGESTS} == DIGESTS
    kept = {path.parent.name for path in runner.RESULTS_OF_PAGE.glob("*/runs.csv")}
    assert kept & {*runner.SUITES} == {*DIGESTS}
    for suite in DIGESTS:
        rows = runner.read_runs(runner.RESULTS_OF_PAGE / suite)
        for method in runner.SUITES[suite]["methods"]:
            found = [row for (name, _), row in rows.items() if name == method]
            assert all(row["command"] == runner.Run(suite, method, row["seed"]).command for row in found)


def test_methods_in_cells_begin_with_their_splits_encoders(runner):
    suites = sys.modules["suites"]
    methods = {"from scratch": "ppo_pisco.py --encoder-weights none", "frozen": "ppo_pisco.py --freeze-layers 4"}
    cells = suites.in_cells(methods)
    assert len(cells) == 2 * 2 * len(suites.SPLITS)
    for name, flags in cells.items():
        cell, method = name.split(", ")
        split, seed = cell.rsplit(" encoder ", 1)
        encoder = f"--encoder-weights {suites.encoder_of('jump-sources', split, int(seed))}"
        assert (encoder in flags) == (method == "frozen") and f"--jump-tasks {suites.SPLITS[split][1]}" in flags
        assert (ROOT / suites.encoder_of("jump-sources", split, int(seed))).exists()


def test_every_suite_in_the_results_has_a_protocol_and_both_tables(runner):
    """Runs and evaluations of the same seeds; every run names its command and commit, and what it began with."""
    folders = [path for path in runner.RESULTS_OF_PAGE.iterdir() if path.is_dir() and path.name != "probe"]
    assert len(folders) > 10
    for folder in folders:
        assert (folder / "PROTOCOL.md").exists()  # before the first run
        if not (folder / "runs.csv").exists():
            continue
        runs, evaluations = runner.read_runs(folder), runner.read_evaluations(folder)
        assert runs and all(evaluations[key] for key in runs)
        for (method, seed), row in runs.items():
            assert row["command"].endswith(f"--seed {seed}") and len(row["commit"]) == 40, (folder, method)
    size = sum(path.stat().st_size for path in runner.RESULTS_OF_PAGE.rglob("*") if path.is_file())
    assert size < 22e6


def test_an_encoder_is_the_same_in_all_kept_runs(runner):
    """One that was made again on another machine is another encoder under the same name. jump-noise's heads begin with
    encoders of jump-cells' runs and miniworld-encoders with others, which are not kept."""
    found = {}
    tables = [runner.RESULTS_OF_PAGE.glob(f"{name}/runs.csv") for name in ("jump-*", "miniworld", "miniworld-rates")]
    for table in itertools.chain(*tables):
        for row in runner.read_runs(table.parent).values():
            if row["encoder_sha256"] and table.parent.name != "jump-noise":
                command = row["command"].split()
                where = [word for flag, word in zip(command, command[1:]) if flag == "--encoder-weights"]
                file = where[0] if where else "encoders/jump-v0__nature__rl.safetensors"
                if file.endswith("/encoder.safetensors"):  # benchmark/results/SUITE/METHOD/SEED/, as it was then
                    suite, method, seed = file.split("/")[2:5]
                    file = f"benchmark/results/{suite}/encoders/{method}__{seed}.safetensors"
                found.setdefault(file, set()).add(row["encoder_sha256"])
    assert found == {file: {hashlib.sha256((ROOT / file).read_bytes()).hexdigest()} for file in found}
    assert len(found) >= 8 + 2 + 1


def test_a_cells_runs_differ_in_nothing_but_method_and_seed(runner):
    """One kind of CPU, one commit: arms that are compared stand on the same ground, cells need not."""
    grounds = {}
    for suite in (*sys.modules["suites"].CELLS, "jump-long", "miniworld"):
        for (method, _), row in runner.read_runs(runner.RESULTS_OF_PAGE / suite).items():
            ground = [row[key] for key in ("hardware", "commit", "versions", "cores")]
            same = "jump-cells" if suite == "jump-noise" else suite  # whose networks it took
            grounds.setdefault((same, method.split(",")[0]), []).append(ground)
    assert all(ground == of_cell[0] for of_cell in grounds.values() for ground in of_cell)


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
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("OMP_NUM_THREADS=1 python /") and line.endswith("--lr 1 --fail 1 --seed 1")


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
    words, threads = calls_of(runner, run)[0]
    assert code == 0 and output == "some output\n" and words[:6] == ["--lr", "1", "--x", "2", "--seed", "1"]
    assert threads == "2"
    runner.keep(run, runner.RESULTS, files, {"commit": "abc", **about})
    folder = runner.RESULTS / "tiny"
    assert sorted(path.name for path in folder.iterdir()) == ["evaluations.csv.gz", "runs.csv"]
    row = runner.read_runs(folder)["one method", 1]
    assert row["command"] == run.command and row["resumed"] == "False" and float(row["seconds"]) >= 0
    assert [pair.split()[0] for pair in row["versions"].split(", ")] == ["python", *runner.PACKAGES]
    assert "cores" in row["hardware"] and row["commit"] == "abc" and row["started"].endswith("Z")
    first, last = runner.read_evaluations(folder)["one method", 1]
    numbers = {"seconds": "8.000", "greedy_return": "57.0", "greedy_success": "0.3333333333333333"}
    assert (
        first.items() >= ({"global_step": "20", "ssl_grad_share": "2", "view_agreement": "0.5"} | numbers).items()
        and first["tasks"] == first["greedy"] == ""
    )
    assert last.items() >= {"seconds": "10.000", "tasks": "20:10 30:20", "greedy": "10", "sampled": "10"}.items()
    assert not run.work.exists()
    runner.SUITES["tiny"]["encoders"] = True
    runner.keep(run, tmp_path, files, about)
    assert (tmp_path / "tiny" / "encoders" / "one_method__1.safetensors").read_text() == "weights"
    weights = runner.weights_folder(runner.WORK, run.flags)
    assert sorted(path.name for path in weights.iterdir()) == ["args.json", "command.txt", "encoder.safetensors"]
    assert runner.is_finished(run, runner.RESULTS)
    only = ["tiny", "--seeds", "1", "--methods", "one method"]
    assert runner.main(only) == 0
    assert capsys.readouterr().out.startswith("tiny: 1 runs, 1 of them finished\n")
    assert runner.main([*only, "--dry-run", "--cpus", "2"]) == 0  # to doubt a run takes its command
    assert capsys.readouterr().out.splitlines()[-1] == f"OMP_NUM_THREADS=2 {run.command}"


def test_a_kill_within_a_write_costs_one_run(runner):
    """The tables are read without the piece that it leaves, and the next append takes its place."""
    runs = [runner.Run("tiny", "one method", seed) for seed in (1, 2)]
    kept(runner, runs[0])
    folder = runner.RESULTS / "tiny"
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    kept(runner, runs[1])
    both = {path: path.read_bytes() for path in folder.iterdir()}
    for cut in range(1, 60, 7):
        for path, data in both.items():
            assert data.startswith(whole[path])
            path.write_bytes(data[:-cut])
        assert list(runner.read_runs(folder)) == [("one method", 1)] == list(runner.read_evaluations(folder))
        runner.append(folder / "evaluations.csv.gz", [{"method": "one method", "seed": 3, "global_step": 20}])
        runner.append(
            folder / "runs.csv", [{name: 3 if name == "seed" else "one method" for name in runner.RUN_COLUMNS}]
        )
        assert list(runner.read_runs(folder)) == [("one method", 1), ("one method", 3)]
        assert [len(rows) for rows in runner.read_evaluations(folder).values()] == [2, 1]


def test_a_kill_before_two_tables_are_joined_costs_one_run_wherever_it_was(runner, tmp_path):
    row = dict.fromkeys(runner.RUN_COLUMNS, "x")
    for seed in (1, 2):
        runner.append(tmp_path / "runs.csv", [row | {"method": "m", "seed": seed}])
        step = {"method": "m", "seed": seed, "global_step": 10}
        runner.append(tmp_path / "evaluations.csv.gz", [step])
    runs, evaluations = ((tmp_path / name).read_bytes() for name in ("runs.csv", "evaluations.csv.gz"))
    for cut in range(1, 60):
        (tmp_path / "runs.csv").write_bytes(runs[:-cut] + runs if cut < 30 else runs)
        (tmp_path / "evaluations.csv.gz").write_bytes(evaluations[:-cut] + evaluations)
        assert list(runner.read_runs(tmp_path)) == [("m", 1), ("m", 2)]
        assert [len(rows) for rows in runner.read_evaluations(tmp_path).values()] == [1, 1]
        assert runner.read_whole(tmp_path / "evaluations.csv.gz")[1] == 2 * len(evaluations) - cut  # nothing is dropped


def test_evaluations_of_a_run_that_was_killed_before_its_row_count_once(runner):
    run = runner.Run("tiny", "one method", 1)
    code, files, about, _ = execute(runner, run)
    rows = runner.evaluations_of(run, files)
    runner.append(runner.RESULTS / "tiny" / "evaluations.csv.gz", rows)
    assert runner.read_evaluations(runner.RESULTS / "tiny") == {} and not runner.is_finished(run, runner.RESULTS)
    runner.keep(run, runner.RESULTS, files, about)
    assert len(runner.read_evaluations(runner.RESULTS / "tiny")["one method", 1]) == 2


def test_tables_of_two_machines_are_joined_by_cat(runner, tmp_path):
    """Even where the second one's programs log more."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, seed, more in ((ours, 1, {}), (theirs, 2, {"unseen": 0.5})):
        rows = [{"method": "m", "seed": seed, "global_step": step, "success": step / 100} | more for step in (10, 20)]
        runner.append(folder / "evaluations.csv.gz", rows)
        runner.append(folder / "runs.csv", [dict.fromkeys(runner.RUN_COLUMNS, "x") | {"method": "m", "seed": seed}])
    torn = tmp_path / "torn"
    for name in ("evaluations.csv.gz", "runs.csv"):
        first, second = (ours / name).read_bytes(), (theirs / name).read_bytes()
        (ours / name).write_bytes(first + second)
        torn.mkdir(exist_ok=True)
        (torn / name).write_bytes(first + second[:-9] + second)  # after a kill on the first machine
    assert runner.read_evaluations(torn) == runner.read_evaluations(ours) and len(runner.read_runs(torn)) == 2
    assert list(runner.read_runs(ours)) == [("m", 1), ("m", 2)]
    first, second = runner.read_evaluations(ours).values()
    assert [row["success"] for row in first] == [row["success"] for row in second] == ["0.1", "0.2"]
    assert "unseen" not in first[0] and second[0]["unseen"] == "0.5"
    text = gzip.decompress((ours / "evaluations.csv.gz").read_bytes()).decode()
    assert len(list(csv.reader(io.StringIO(text)))) == 6


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
    kept(runner, run)
    before = (runner.RESULTS / "tiny" / "runs.csv").read_bytes()
    ran = []
    monkeypatch.setattr(runner, "run_all", lambda runs, args, bar: ran.extend((run, args.results) for run in runs))
    again = ["tiny", "--seeds", "1", "--methods", "one method", "--cpus", "2", "--results", str(tmp_path / "again")]
    assert runner.main(again) == 0
    assert capsys.readouterr().out.startswith("tiny: 1 runs, 0 of them finished\n")
    assert ran == [(run, tmp_path / "again")]
    runner.keep(run, tmp_path / "again", *execute(runner, run)[1:3])
    assert runner.main(again) == 0
    assert capsys.readouterr().out.startswith("tiny: 1 runs, 1 of them finished\n") and len(ran) == 1
    assert (runner.RESULTS / "tiny" / "runs.csv").read_bytes() == before


def test_results_of_another_command_are_not_taken_for_this_ones(runner, capsys):
    kept(runner, runner.Run("tiny", "one method", 1))
    runner.SUITES["tiny"]["methods"]["one method"] = "--x 3"
    assert runner.main(["tiny", "--seeds", "1"]) == 2
    assert "delete its line" in capsys.readouterr().err


def test_same_command_of_another_suite_is_not_run_again(runner, monkeypatch, capsys):
    monkeypatch.setattr(runner, "commit_of_code", lambda: "abc")  # as `kept` has it
    runner.SUITES["tiny"]["encoders"] = True
    kept(runner, runner.Run("tiny", "one method", 1))
    twin = {**runner.SUITES["tiny"], "methods": {"renamed": "--x 2", "new": "--x 3"}}
    monkeypatch.setitem(runner.SUITES, "twin", twin)
    monkeypatch.setattr(runner, "run_all", lambda runs, args, bar: [])
    assert runner.main(["twin", "--seeds", "1", "--cpus", "4"]) == 0  # on other cores the numbers differ
    assert capsys.readouterr().out.startswith("twin: 2 runs, 0 of them finished\n")
    assert not (runner.RESULTS / "twin").exists()
    assert runner.main(["twin", "--seeds", "1", "--cpus", "2"]) == 0
    assert capsys.readouterr().out.startswith("twin: 2 runs, 1 of them finished\n")
    first, second = (runner.RESULTS / suite for suite in ("tiny", "twin"))
    row, copy = runner.read_runs(first)["one method", 1], runner.read_runs(second)["renamed", 1]
    assert copy == row | {"method": "renamed"}
    assert [row["greedy_success"] for row in runner.read_evaluations(second)["renamed", 1]] == [
        "0.3333333333333333", "1.0"
    ]  # fmt: skip
    assert (second / "encoders" / "renamed__1.safetensors").read_text() == "weights"
    monkeypatch.setitem(runner.SUITES, "third", twin)
    for commit in ("abd", "abc-changed", ""):  # other code, or unknown
        monkeypatch.setattr(runner, "commit_of_code", lambda commit=commit: commit)
        assert runner.main(["third", "--seeds", "1", "--cpus", "2"]) == 0
        assert capsys.readouterr().out.startswith("third: 2 runs, 0 of them finished\n")


def test_killed_run_goes_on_and_one_of_other_flags_does_not(runner):
    run = runner.Run("tiny", "failing", 1)
    code, files, first, _ = execute(runner, run)
    assert code == 3 and not files
    code, files, about, _ = execute(runner, run)
    calls = [words for words, _ in calls_of(runner, run)]
    assert code == 0 and about["resumed"] and len(calls) == 2 and about["started"] == first["started"]
    assert calls[1] == ["--resume", str(run.work / "run")]

    runner.SUITES["tiny"]["methods"]["failing"] = "--x 4"
    code, files, about, _ = execute(runner, run)
    calls = [words for words, _ in calls_of(runner, run)]
    assert code == 0 and not about["resumed"] and len(calls) == 1 and "4" in calls[0]
