"""Run a suite of benchmark/suites.py, every method with every seed, and keep the results.

    pip install -r benchmark/requirements.txt
    python benchmark/run.py dmc-small --seeds 3                  # all cores of this machine, a core per run
    python benchmark/run.py dmc-official --cpus 3 --gpus 0.2     # five runs share a GPU
    python benchmark/run.py dmc-small --address auto             # on a Ray cluster, this folder on all its machines
    python benchmark/run.py dmc-small --dry-run                  # print the commands, run nothing
    python benchmark/run.py quickstart --results again           # repeat a suite, its kept results stay as they are

Every run is one of the repository's programs, which Ray starts where there is room. A finished one is a row of
benchmark/results/SUITE/runs.csv and a row per evaluation of evaluations.csv.gz beside it, and is skipped from then on,
as is one that another suite has run with the same command, commit and number of cores: its rows are copied. Tables of
two machines are joined by `cat`. Networks stay in benchmark/runs/weights/ of this machine; encoders that other suites
begin with are kept in SUITE/encoders/. A killed run goes on from its checkpoint, a failed one is tried once more and
then reported. After Ctrl-C the same command goes on.
"""

import contextlib
import csv
import ctypes
import fcntl
import fnmatch
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
from suites import SUITES, encoder_of, seeds_of, weights_folder  # noqa: E402

RESULTS = ROOT / "benchmark" / "results"
WORK = ROOT / "benchmark" / "runs"  # unfinished runs
KEPT = ("metrics.csv", "evaluation.json")  # what the rows of the tables are made of
MEASURED = ("ssl_grad_share", "view_agreement", "view_distance")  # of the losses, beside an evaluation
NETWORKS = ("args.json", "encoder.safetensors", "model.safetensors")  # for further measurements, not in the results
RUN_COLUMNS = (
    "method", "seed", "command", "commit", "started", "hardware", "versions", "cores", "seconds", "resumed",
    "encoder_sha256", "note",
)  # fmt: skip
PACKAGES = ("torch", "gymnasium", "envpool", "dm-control", "mujoco", "numpy")


class UsageError(Exception):
    """What the user asked for can't be done; the message is one line that names the flag or file and the remedy."""


@dataclass
class Args:
    suite: tyro.conf.Positional[str]
    """a suite of benchmark/suites.py"""
    seeds: int | None = None
    """every method runs with so many seeds (default: as many as the suite's protocol asks for, or 3)"""
    methods: tuple[str, ...] = ()
    """only these methods of the suite; `*` stands for anything"""
    cpus: float = 1
    """cores for each run"""
    gpus: float = 0
    """share of a GPU for each run"""
    address: str | None = None
    """a Ray cluster's address (default: this machine)"""
    results: Path | None = None
    """folder for the results (default: benchmark/results); in another one every run runs anew"""
    dry_run: bool = False
    """print the commands, of finished runs too, and run nothing"""


@dataclass(frozen=True)
class Run:
    suite: str
    method: str
    seed: int

    @property
    def flags(self):
        """The program and its flags, as a list."""
        suite = SUITES[self.suite]
        return shlex.split(f"{suite['program']} {suite['methods'][self.method]} --seed {self.seed}")

    @property
    def command(self):
        return shlex.join(["python", *self.flags])

    @property
    def work(self):
        """The folder of the run as long as it is not finished."""
        return WORK / self.suite / self.method.replace(" ", "_") / str(self.seed)


# ---------------------------------------------------------------------------------------------------------------------
# Tables: a suite's runs.csv, and evaluations.csv.gz with a gzip member a run
# ---------------------------------------------------------------------------------------------------------------------
def read_whole(path):
    """What the table says without pieces that kills cut off, as bytes, and where its last whole part ends."""
    data = path.read_bytes() if path.exists() else b""
    if path.suffix != ".gz":
        size = data.rfind(b"\n") + 1
        return data[:size], size
    text, start, size = b"", 0, 0
    while 0 <= start < len(data):
        member, piece = zlib.decompressobj(zlib.MAX_WBITS | 16), b""
        with contextlib.suppress(zlib.error):
            piece = member.decompress(data[start:])
        if member.eof:
            text, start = text + piece, len(data) - len(member.unused_data)
            size = start
        else:  # a piece; another table may have been joined to it
            start = data.find(b"\x1f\x8b\x08", start + 1)
    return text, size


def read_table(path):
    """The table's rows [{column: text}]. A line that begins with `method,seed` names the columns of those after it; one
    that a kill cut off, before another table was joined to it, has too many columns or no seed."""
    rows, names = [], []
    for row in csv.reader(io.StringIO(read_whole(path)[0].decode())):
        if row[:2] == ["method", "seed"]:
            names = row
        elif len(row) == len(names) and row[1].isdigit():
            rows.append(dict(zip(names, row)))
    return rows


def append(path, rows):
    """Appends rows [{column: value}] of the same columns to the table, in one write that is on the disk afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        size = read_whole(path)[1]
        file.truncate(size)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
        if path.suffix == ".gz" or not size:
            writer.writeheader()
        writer.writerows(rows)
        data = text.getvalue().encode()
        file.write(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
        file.flush()
        os.fsync(file.fileno())


def read_runs(folder):
    """{(method, seed): row of runs.csv} of the suite in the folder, in the table's order; the last of equal ones."""
    return {(row["method"], int(row["seed"])): row for row in read_table(folder / "runs.csv")}


def read_evaluations(folder):
    """{(method, seed): [row of evaluations.csv.gz, by rising step]} of the finished runs in the folder."""
    found = {key: {} for key in read_runs(folder)}
    for row in read_table(folder / "evaluations.csv.gz"):
        found.get((row["method"], int(row["seed"])), {})[int(row["global_step"])] = row
    return {key: [rows[step] for step in sorted(rows)] for key, rows in found.items()}


def evaluations_of(run, files):
    """A finished run's evaluations as rows: step, seconds of training, metrics, the loss's gradient beside RL's, what a
    view changes in the policy, and of the last one the tasks that were played with a 0 or 1 for each that the greedy
    and the sampled policy solve."""
    rows = []
    for row in csv.DictReader(io.StringIO(files["metrics.csv"].decode())):
        metrics = {name.removeprefix("eval/"): value for name, value in row.items() if name.startswith("eval/")}
        if any(metrics.values()):
            seconds = float(row["global_step"]) / float(row["charts/SPS"])
            about = {"method": run.method, "seed": run.seed, "global_step": row["global_step"]}
            measured = {name: row[f"losses/{name}"] for name in MEASURED if f"losses/{name}" in row}
            rows.append(about | {"seconds": f"{seconds:.3f}"} | metrics | measured)
    last = json.loads(files["evaluation.json"])
    for policy in ("greedy", "sampled"):
        if solved := last.get(policy, {}).get("solved"):
            rows[-1] |= {"tasks": " ".join(solved), policy: "".join(str(int(value)) for value in solved.values())}
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Which runs
# ---------------------------------------------------------------------------------------------------------------------
def choose_runs(args):
    """The suite's runs, seed by seed, so that an interrupted suite has all methods. Raises UsageError, also where there
    is no place for results."""
    if args.suite not in SUITES:
        raise UsageError(f"suite {args.suite!r}: choose one of {', '.join(SUITES)}")
    known, patterns = list(SUITES[args.suite]["methods"]), args.methods or ("*",)
    unknown = [pattern for pattern in patterns if not fnmatch.filter(known, pattern)]
    if unknown:
        raise UsageError(f"--methods {unknown[0]!r}: choose among {', '.join(known)}")
    methods = [method for method in known if any(fnmatch.fnmatch(method, pattern) for pattern in patterns)]
    n = SUITES[args.suite].get("n", 3) if args.seeds is None else args.seeds
    if n < 1:
        raise UsageError(f"--seeds {n}: must be positive")
    if args.cpus <= 0 or args.gpus < 0:
        raise UsageError(f"--cpus {args.cpus} --gpus {args.gpus}: a run needs cores, and no less than no GPU")
    try:
        args.results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--results {args.results}: {error.strerror}; name a folder that can be written") from error
    return [Run(args.suite, method, seeds_of(args.suite, method, n)[i]) for i in range(n) for method in methods]


def is_finished(run, results):
    """Whether a run is in the tables of the folder `results`. Raises UsageError where they have another command's."""
    row = read_runs(results / run.suite).get((run.method, run.seed))
    if row and row["command"] != run.command:
        table = results / run.suite / "runs.csv"
        raise UsageError(f"{table}: {run.method}, {run.seed} is of another command; delete its line to run it anew")
    return row is not None


def share(run, results, cpus, commit):
    """Copies the results of another suite's run of the same command, commit and number of cores, if there are any in
    the folder `results`. Returns whether there were."""
    for table in sorted(results.glob("*/runs.csv")) if re.fullmatch("[0-9a-f]+", commit) else ():  # unchanged
        suite = table.parent.name
        for (method, seed), row in read_runs(table.parent).items():
            if (row["command"], float(row["cores"]), row["commit"]) == (run.command, cpus, commit):
                names = {"method": run.method, "seed": run.seed}
                rows = [row | names for row in read_evaluations(table.parent)[method, seed]]
                encoder = encoder_of(suite, method, seed, results)
                put(run, results, rows, row | names, encoder.read_bytes() if encoder.exists() else None)
                return True
    return False


# ---------------------------------------------------------------------------------------------------------------------
# On the machine that runs the program
# ---------------------------------------------------------------------------------------------------------------------
def hardware():
    """CPU, cores and GPU of this machine, as text; a CPU's name alone does not always tell its generation."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = [line.split(":", 1) for line in open("/proc/cpuinfo") if ":" in line]
        about = {key.strip(): value.strip() for key, value in lines}
        parts = [f"{key} {about[key]}" for key in ("cpu family", "model", "stepping") if key in about]
        cpu = ", ".join([about.get("model name", cpu), *parts])
    text = f"{cpu}, {os.cpu_count()} cores"
    if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        text += ", " + subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    return text


def checksum_of_encoder(folder):
    """SHA-256 of the encoder's file that the run in `folder` began with, or None. A file made again on another machine
    is another encoder under the same name."""
    weights = json.loads((folder / "args.json").read_text()).get("encoder_weights", "none")
    return None if weights == "none" else hashlib.sha256((ROOT / weights).read_bytes()).hexdigest()


def threads(cpus):
    """The number of PyTorch's threads for a run on so many cores."""
    return max(1, int(cpus))


def execute(command, flags, work, cpus):
    """Runs a program in the folder `work`, or goes on with the run that a kill has left there.

    Returns its exit code, its kept files {name: bytes}, its columns of runs.csv, and the end of its output.
    """
    began, note = time.time(), work / "command.txt"
    if not note.exists() or note.read_text() != command:  # a leftover of other flags
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        note.write_text(command)
    begun = sorted(path.parent for path in work.glob("*/args.json"))
    further = ["--resume", str(begun[-1])] if begun else [*flags[1:], "--runs-dir", str(work)]
    libc = ctypes.CDLL(None)
    with open(work / "output.txt", "ab") as output:
        process = subprocess.run(
            [sys.executable, flags[0], *further], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
            preexec_fn=lambda: libc.prctl(1, signal.SIGTERM),  # PR_SET_PDEATHSIG (Linux): it ends with Ray's worker
            env=os.environ | dict.fromkeys(("OMP_NUM_THREADS", "LP_NUM_THREADS"), str(threads(cpus))),  # Mesa draws too
        )  # fmt: skip
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    about = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(note.stat().st_mtime)), "hardware": hardware(),
        "versions": ", ".join(map(" ".join, versions.items())), "cores": cpus,
        "seconds": round(time.time() - began, 1), "resumed": bool(begun),
    }  # fmt: skip
    files = {}
    if process.returncode == 0:
        (folder,) = (path.parent for path in work.glob("*/args.json"))
        found = [folder / name for name in KEPT + NETWORKS]
        files = {path.name: path.read_bytes() for path in found if path.exists()}
        about["encoder_sha256"] = checksum_of_encoder(folder)
    return process.returncode, files, about, (work / "output.txt").read_text(errors="replace")[-2000:]


# ---------------------------------------------------------------------------------------------------------------------
# On the machine that keeps the results
# ---------------------------------------------------------------------------------------------------------------------
def commit_of_code():
    """The commit that is checked out, with `-changed` where the Python files here are others than the commit's."""
    commit, changes = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", "*.py"])
    )
    return commit + ("-changed" if changes else "")


def put(run, results, rows, about, encoder=None):
    """Puts a run into the tables of the folder `results`: its evaluations, then its row of runs.csv, which counts."""
    if encoder and SUITES[run.suite].get("encoders"):
        path = encoder_of(run.suite, run.method, run.seed, results)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".tmp")
        partial.write_bytes(encoder)
        os.replace(partial, path)
    append(results / run.suite / "evaluations.csv.gz", rows)
    append(results / run.suite / "runs.csv", [{name: about.get(name, "") for name in RUN_COLUMNS}])


def keep(run, results, files, about):
    """Keeps a finished run in the tables of the folder `results`, and its networks on this machine."""
    weights = weights_folder(WORK, run.flags)
    weights.mkdir(parents=True, exist_ok=True)
    (weights / "command.txt").write_text(run.command + "\n")  # the folder's name tells nobody
    for name in NETWORKS:
        if name in files:
            (weights / name).write_bytes(files[name])
    about = {"method": run.method, "seed": run.seed, "command": run.command, **about}
    put(run, results, evaluations_of(run, files), about, files.get("encoder.safetensors"))
    shutil.rmtree(run.work, ignore_errors=True)


def unfinished(runs, args):
    """The runs that have no results yet, after those are copied that another suite has made."""
    where = (args.results, args.cpus, commit_of_code())
    return [run for run in runs if not is_finished(run, args.results) and not share(run, *where)]


def run_all(runs, args, bar):
    """Runs all of them, each a step of the bar, through Ray. Returns the runs that failed twice."""
    import ray

    ray.init(address=args.address, log_to_driver=False, include_dashboard=False)
    remote = ray.remote(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=0)(execute)

    def start(run):
        return remote.remote(run.command, run.flags, run.work, args.cpus)

    commit = commit_of_code()  # now, as the programs may change while the runs last
    waiting = {start(run): (run, 1) for run in runs}
    failed = []
    try:
        while waiting:
            done, _ = ray.wait(list(waiting))
            for task in done:
                run, attempt = waiting.pop(task)
                try:
                    code, files, about, output = ray.get(task)
                except ray.exceptions.RayError as error:
                    code, output = 1, str(error)
                if code == 0:
                    keep(run, args.results, files, {"commit": commit, **about})
                elif attempt == 1:
                    waiting[start(run)] = (run, 2)
                    continue
                else:
                    failed.append(run)
                    bar.write(f"failed twice: {run.command}\n{output}\nto start it anew delete {run.work}")
                bar.update()
    finally:
        ray.shutdown()  # the programs end with their workers
    return failed


def main(argv=None):
    """Runs the command line `argv`. Returns the exit code: 0, 1 after failures, 2 for bad input or 130 after Ctrl-C."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        args.results = args.results or RESULTS
        runs = choose_runs(args)
        if args.dry_run:
            print("\n".join(f"OMP_NUM_THREADS={threads(args.cpus)} {run.command}" for run in runs))
            return 0
        left = unfinished(runs, args)
        print(f"{args.suite}: {len(runs)} runs, {len(runs) - len(left)} of them finished", flush=True)
        with tqdm(total=len(runs), initial=len(runs) - len(left), unit="run", file=sys.stdout) as bar:
            failed = run_all(left, args, bar) if left else []
    except UsageError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
