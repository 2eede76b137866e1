"""What the benchmark's tests share: its scripts as modules, and kept runs by hand."""

import importlib.util
import sys

from conftest import ROOT


def load(name, monkeypatch):
    """A script of benchmark/ as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmark" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def put_run(folder, method, seed, scores, minutes=None, **about):
    """Puts a run with these scores (E,), after 10, 20, ... steps and 1, 2, ... minutes, into a suite's tables."""
    from run import RUN_COLUMNS, append

    minutes = minutes or range(1, len(scores) + 1)
    row = {"command": "python ppo_pisco.py", "cores": 1, "seconds": 60, "resumed": False, **about}
    rows = [
        {"method": method, "seed": seed, "global_step": 10 * (i + 1), "seconds": 60 * minute, "greedy_return": 1.0,
         "greedy_success": score}
        for i, (score, minute) in enumerate(zip(scores, minutes))
    ]  # fmt: skip
    append(folder / "evaluations.csv.gz", rows)
    row |= {"method": method, "seed": seed}
    append(folder / "runs.csv", [{name: row.get(name, "") for name in RUN_COLUMNS}])
