"""Turn results of a folder a run into two tables a suite, and check that nothing got lost. Used once.

python benchmark/convert_results.py FOLDER     # with SUITE/METHOD/SEED/ as it was; the tables go to benchmark/results

The check reads the tables back and compares with the old files: every field of every manifest, every metric of every
evaluation as its text, every task solved or not, every success under noise.
"""

import csv
import gzip
import io
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import run as runner  # noqa: E402
from suites import SUITES, encoder_of  # noqa: E402

SAME = {"cores_per_run": "cores", "wall_seconds": "seconds"}  # manifest's name: the table's


def old_runs(folder, suite):
    """[(Run, run folder, manifest)] in the suite's order."""
    found = []
    for method in SUITES[suite]["methods"]:
        paths = (folder / suite / method.replace(" ", "_")).glob("*/manifest.json")
        for path in sorted(paths, key=lambda path: int(path.parent.name)):
            manifest = json.loads(path.read_text())
            found.append((runner.Run(suite, method, int(path.parent.name)), path.parent, manifest))
    return found


def row_of(run, manifest):
    about = {SAME.get(name, name): value for name, value in manifest.items()}
    about |= {"method": run.method, "seed": run.seed, "versions": ", ".join(map(" ".join, about["versions"].items()))}
    assert set(about) <= set(runner.RUN_COLUMNS), set(about) - set(runner.RUN_COLUMNS)
    return {name: about.get(name, "") for name in runner.RUN_COLUMNS}


def evaluation_rows(run, folder):
    rows = runner.evaluations_of(run, {name: (folder / name).read_bytes() for name in runner.KEPT})
    for policy, table in json.loads((folder / "evaluation.json").read_text()).get("noise", {}).items():
        rows[-1] |= {f"{policy}, noise {std}": repr(share) for std, share in table.items()}
    return rows


def convert(folder, suite):
    runs, target = old_runs(folder, suite), runner.RESULTS / suite
    runner.append(target / "runs.csv", [row_of(run, manifest) for run, _, manifest in runs])
    rows = [row for run, path, _ in runs for row in evaluation_rows(run, path)]
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    last = [name for name in names if name in ("tasks", "greedy", "sampled")]
    writer = csv.DictWriter(text, [name for name in names if name not in last] + last, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (target / "evaluations.csv.gz").write_bytes(gzip.compress(text.getvalue().encode(), 9, mtime=0))
    for run, path, _ in runs:
        if (path / "encoder.safetensors").exists():
            encoder = runner.ROOT / encoder_of(suite, run.method, run.seed)
            encoder.parent.mkdir(exist_ok=True)
            shutil.copyfile(path / "encoder.safetensors", encoder)


def check(folder, suite):
    runs, target = old_runs(folder, suite), runner.RESULTS / suite
    table, evaluations, values = runner.read_runs(target), runner.read_evaluations(target), 0
    assert list(table) == [(run.method, run.seed) for run, *_ in runs]
    assert len(runs) == len(list((folder / suite).glob("*/*/manifest.json")))
    for run, path, manifest in runs:
        row, rows = table[run.method, run.seed], evaluations[run.method, run.seed]
        versions = dict(pair.rsplit(" ", 1) for pair in row["versions"].split(", "))
        for name, value in manifest.items():
            kept = versions if name == "versions" else row[SAME.get(name, name)]
            assert kept == (value if name == "versions" else "" if value is None else str(value)), (path, name)
            values += 1
        with open(path / "metrics.csv", newline="") as file:
            old = [row for row in csv.DictReader(file) if any(v for k, v in row.items() if k.startswith("eval/"))]
        assert [row["global_step"] for row in old] == [row["global_step"] for row in rows]
        for before, after in zip(old, rows):
            metrics = {name: value for name, value in before.items() if name.startswith("eval/")}
            assert all(after[name.removeprefix("eval/")] == value for name, value in metrics.items())
            seconds = float(before["global_step"]) / float(before["charts/SPS"])
            assert abs(float(after["seconds"]) - seconds) <= 0.0005 + 1e-9
            values += len(metrics) + 1
        last = json.loads((path / "evaluation.json").read_text())
        for policy in ("greedy", "sampled"):
            solved = last.get(policy, {}).get("solved", {})
            kept = dict(zip(rows[-1].get("tasks", "").split(), rows[-1].get(policy, "")))
            assert kept == {task: str(int(value)) for task, value in solved.items()}
            values += len(solved)
        for policy, noise in last.get("noise", {}).items():
            assert all(float(rows[-1][f"{policy}, noise {std}"]) == share for std, share in noise.items())
            values += len(noise)
        if (path / "encoder.safetensors").exists():
            encoder = runner.ROOT / encoder_of(suite, run.method, run.seed)
            assert encoder.read_bytes() == (path / "encoder.safetensors").read_bytes()
    return len(runs), values


def main():
    folder = Path(sys.argv[1])
    for suite in SUITES:
        if (folder / suite).exists():
            convert(folder, suite)
            runs, values = check(folder, suite)
            print(f"{suite}: {runs} runs, {values} values equal")


if __name__ == "__main__":
    main()
