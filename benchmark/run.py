"""Run a suite of benchmark/suites.py, every method with every seed, and keep the results.

    pip install -r benchmark/requirements.txt
    python benchmark/run.py dmc-small --seeds 3                  # all cores of this machine, a core per run
    python benchmark/run.py dmc-official --cpus 3 --gpus 0.2     # five runs share a GPU
    python benchmark/run.py dmc-small --address auto             # on a Ray cluster, this folder on all its machines
    python benchmark/run.py dmc-small --dry-run                  # print the commands, run nothing
    python benchmark/run.py quickstart --results again           # repeat a suite, its kept results stay as they are

Every run is one of the repository's programs, which Ray starts where there is room. A finished one leaves metrics.csv,
evaluation.json and manifest.json under benchmark/results/SUITE/METHOD/SEED/ and is skipped from then on, as is one that
another suite has run with the same command and the same number of cores: its results are copied. Networks stay in
benchmark/runs/weights/ of this machine; encoders that other suites begin with are kept with the results. A killed run
goes on from its checkpoint, a failed one is tried once more and then reported. After Ctrl-C the same command goes on.
"""

import ctypes
import fnmatch
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmark"))
from suites import SUITES, folder_of, seeds_of, weights_folder  # noqa: E402

RESULTS = ROOT / "benchmark" / "results"
WORK = ROOT / "benchmark" / "runs"  # unfinished runs
KEPT = ("metrics.csv", "evaluation.json")
ENCODER = ("encoder.safetensors",)  # in the results of the suites whose encoders others begin with
NETWORKS = ("args.json", *ENCODER, "model.safetensors")  # for further measurements, not in the results
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
        return f"{suite['program']} {suite['methods'][self.method]} --seed {self.seed}".split()

    @property
    def command(self):
        return " ".join(["python", *self.flags])

    def folder(self, parent):
        return folder_of(parent, self.suite, self.method) / str(self.seed)


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
    """Whether a run's results are in the folder `results`. Raises UsageError where they are another command's."""
    path = run.folder(results) / "manifest.json"
    if not path.exists():
        return False
    if json.loads(path.read_text())["command"] != run.command:
        raise UsageError(f"{path}: made by another command than the suite's; delete the folder to run it anew")
    return True


def share(run, results, cpus):
    """Copies the results of another suite's run of the same command on as many cores, if there are any in the folder
    `results`. Returns whether there were."""
    for path in sorted(results.glob("*/*/*/manifest.json")):
        manifest = json.loads(path.read_text())
        if manifest["command"] == run.command and manifest["cores_per_run"] == cpus:
            put(run, results, {other.name: other.read_bytes() for other in path.parent.iterdir()})
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

    Returns its exit code, its kept files {name: bytes}, what is known of the machine, and the end of its output.
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
            env=os.environ | {"OMP_NUM_THREADS": str(threads(cpus))},
        )  # fmt: skip
    about = {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "hardware": hardware(), "cores_per_run": cpus, "wall_seconds": round(time.time() - began, 1),
        "resumed": bool(begun),
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


def put(run, results, files):
    """Puts files {name: bytes} into the run's folder of the results, all at once."""
    folder = run.folder(results)
    partial = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in files.items():
        (partial / name).write_bytes(content)
    os.replace(partial, folder)


def keep(run, results, files, about):
    """Keeps a finished run's files and its manifest in the folder `results`, and its networks on this machine."""
    manifest = {"command": run.command, **about}
    weights = weights_folder(WORK, run.flags)
    weights.mkdir(parents=True, exist_ok=True)
    (weights / "command.txt").write_text(run.command + "\n")  # the folder's name tells nobody
    for name in NETWORKS:
        if name in files:
            (weights / name).write_bytes(files[name])
    kept = {name: files[name] for name in KEPT + ENCODER * SUITES[run.suite].get("encoders", False)}
    put(run, results, kept | {"manifest.json": json.dumps(manifest, indent=1).encode() + b"\n"})
    shutil.rmtree(run.folder(WORK), ignore_errors=True)


def run_all(runs, args):
    """Runs what is not finished yet. Returns the runs that failed twice."""
    import ray

    ray.init(address=args.address, log_to_driver=False, include_dashboard=False)
    remote = ray.remote(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=0)(execute)

    def start(run):
        return remote.remote(run.command, run.flags, run.folder(WORK), args.cpus)

    commit = commit_of_code()  # now, as the programs may change while the runs last
    waiting = {start(run): (run, 1) for run in runs}
    failed = []
    try:
        with tqdm(total=len(runs), unit="run", file=sys.stdout) as bar:
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
                        bar.update()
                    elif attempt == 1:
                        waiting[start(run)] = (run, 2)
                    else:
                        failed.append(run)
                        bar.write(f"failed twice: {run.command}\n{output}\nto start it anew delete {run.folder(WORK)}")
    finally:
        ray.shutdown()  # the programs end with their workers
    return failed


def main(argv=None):
    """Runs the command line `argv`. Returns the exit code: 0, 1 after failures, 2 for bad input or 130 after Ctrl-C."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        args.results = args.results or RESULTS
        runs = choose_runs(args)
        left = [run for run in runs if not is_finished(run, args.results)]
        if not args.dry_run:
            left = [run for run in left if not share(run, args.results, args.cpus)]
        print(f"{args.suite}: {len(runs)} runs, {len(runs) - len(left)} of them finished", flush=True)
        if args.dry_run:
            print("\n".join(f"OMP_NUM_THREADS={threads(args.cpus)} {run.command}" for run in runs))
            return 0
        failed = run_all(left, args) if left else []
    except UsageError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
