"""How deep should I freeze, does the loss help, on MY task? Compare settings on it, each with its own learning rate.

    python benchmark/compare.py --freeze-layers 0 2 --ssl none pisco --seeds 5
    python benchmark/compare.py --env-id my_game:MyGame-v0 --encoder-weights mine.safetensors --freeze-layers 0 2 4 \
        --ssl none pisco --learning-rate 3e-4 1e-3 --seeds 5 --from-scratch \
        -- --total-timesteps 200000 --eval-interval 10000

Every flag of the algorithm may have several values; all their combinations, the arms, are compared. An id that ends in
a version is of ppo_pisco.py, any other one a control task of drqv2_pisco.py. What follows `--` goes to all runs. The
learning rate, if it has several values, is chosen for every arm with seeds that the comparison does not use. After
Ctrl-C the same command goes on, or begins anew where the algorithm, the environment's module or the weights have been
edited. In the end runs/compare/ENVIRONMENT-... has compare.md, curves.png and two tables.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import os
import re
import shlex
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark"), os.getcwd()]  # the last one for an environment of your own
import plot
import run as runner
import stats
from suites import SUITES

import pretrain_encoder

OURS = ("--seed", "--resume", "--runs-dir")  # flags that compare.py sets
SCRATCH = {"--encoder-weights": "none", "--freeze-layers": "0", "--ssl": "none"}


def fail(message):
    raise runner.UsageError(message)


def parse_args(argv):
    """Our own arguments and {flag: [values]} of the algorithm. Raises UsageError."""
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    parser.add_argument("--seeds", type=int, default=5, help="runs of every arm (5)")
    parser.add_argument("--rate-seeds", type=int, default=2, help="runs of every arm with each learning rate (2)")
    parser.add_argument("--from-scratch", action="store_true", help="add the arm without weights and without a loss")
    parser.add_argument("--cpus", type=float, default=1, help="cores for each run (1)")
    parser.add_argument("--gpus", type=float, default=0, help="share of a GPU for each run (0)")
    parser.add_argument("--address", help="a Ray cluster's address (default: this machine)")
    parser.add_argument("--results", type=lambda x: Path(x).resolve(), default="runs/compare", help="results folder")
    parser.error = fail
    end = argv.index("--") if "--" in argv else len(argv)
    args, words = parser.parse_known_args(argv[:end])
    if min(args.seeds, args.rate_seeds) < 1 or args.cpus <= 0 or args.gpus < 0:
        fail("--seeds, --rate-seeds and --cpus must be positive, --gpus not negative")
    flags, several = group(argv[end + 1 :]), group(words)
    for flag, values in (found := {f: flags.get(f, []) + several.get(f, []) for f in flags | several}).items():
        if flag in OURS or len(values) > 1 and flag in {*flags, "--env-id"}:
            fail(f"{flag}: set by compare.py, or given several values where it can have one; compare before `--`")
    return args, found


def group(words):
    """{flag: [values]} of a command line's words; a flag without a value has None."""
    flags = {}
    for word in itertools.chain(*(word.split("=", 1) if word.startswith("--") else [word] for word in words)):
        if word.startswith("--"):
            flag = word.replace("_", "-")
            if flag in flags:
                fail(f"{flag}: given twice; name all its values after it")
            flags[flag] = []
        elif not flags:
            fail(f"{word}: a value without a flag")
        else:
            flags[flag].append(word)
    return {flag: values or [None] for flag, values in flags.items()}


def make_arms(flags, from_scratch):
    """{name: {flag: value}} of all combinations of the flags' values, named by what sets them apart."""
    varied = [flag for flag, values in flags.items() if len(values) > 1]
    arms, scratch = {}, {}
    for values in itertools.product(*flags.values()):
        arm = dict(zip(flags, values))
        arms[", ".join(f"{flag[2:]} {arm[flag]}" for flag in varied) or "as given"] = arm
    for arm in arms.values() if from_scratch else ():
        words = [f"{flag[2:]} {arm[flag]}" for flag in varied if flag not in SCRATCH]
        scratch[", ".join(["from scratch", *words])] = arm | SCRATCH
    return arms | scratch


def words_of(arm):
    """An arm's command line; a file of weights with its whole path, as runs start in the repository's folder."""
    if (weights := arm.get("--encoder-weights")) not in (None, "none", "timm"):
        arm = arm | {"--encoder-weights": str(Path(weights).resolve())}
    return [word for pair in arm.items() for word in pair if word is not None]


class Ready(Exception):
    pass


def check(module, arm, words):
    """Sets a run of the algorithm up, up to the folder that it would make. Raises UsageError where it refuses."""

    def stop(args):
        raise Ready

    make_run_folder, module.make_run_folder, said = module.make_run_folder, stop, io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            args = module.parse_args([*words, "--no-cuda"])
            module.train(args if args.eval_episodes > 0 else fail("--eval-episodes: nothing to compare without any"))
    except Ready:
        return
    except SystemExit as error:  # tyro prints a box and exits with 2
        message = said.getvalue() if isinstance(error.code, int) else str(error.code)
        message = re.sub("[─-╿]|-{5,}", " ", message).split("For full helptext")[0]
        fail(f"{arm}: {' '.join(message.split())}")
    finally:
        module.make_run_folder = make_run_folder


def make_runs(name, program, methods, first_seed, n):
    """n runs of the methods {name: [words]}, as a suite that run.py's functions know."""
    lines = {method: shlex.join(words) for method, words in methods.items()}
    SUITES[name] = {"program": program, "methods": lines, "first_seed": first_seed}
    return [runner.Run(name, method, seed) for seed in range(first_seed, first_seed + n) for method in lines]


def finish(runs, args, bar):
    """Runs what has no results yet. Returns the runs that failed."""
    left = [run for run in runs if not runner.is_finished(run, args.results)]
    bar.initial += len(runs) - len(left)  # the time left is that of the others
    bar.update(len(runs) - len(left))
    return runner.run_all(left, args, bar) if left else []


def choose_rates(folder, arms, rates):
    """Every arm's best learning rate, {arm: rate}, by the finished runs in the folder."""
    found = plot.by_rate(plot.read_suite(folder)) if plot.read_kept(folder) else {}
    return {arm: plot.best_rate({r: found[arm][r] for r in rates if r in found[arm]}) for arm in arms if arm in found}


def reference_of(arms, results):
    """The arm that finetunes everything without a loss, or the first one."""
    settings = {name: (arms[name].get("--freeze-layers", "0"), arms[name].get("--ssl")) for name in results}
    plain = [name for name in results if settings[name] == ("0", "none") and "from scratch" not in name]
    return (plain or list(results))[0]


def summarise(folder, arms, rates):
    """The comparison as Markdown: table and what it can and can't tell; and the name of the best arm."""
    results, scale, rows = plot.read_suite(folder), plot.scale_of(folder), []
    unseen = plot.read_suite(folder, plot.UNSEEN_SUCCESS)  # Jump's tasks that were not trained
    reference = reference_of(arms, results)
    limit = min(np.median(runs.minutes[:, -1]) for runs in results.values())
    for arm, runs in results.items():
        row = {"arm": arm, "learning rate": rates.get(arm) or "default", "n": str(len(runs.seeds))}
        row["at the end"], row["mean over the run"] = plot.scores_text(runs.both, scale.digits)
        if scale == plot.SUCCESS:
            equal = stats.mean_until(runs.minutes, runs.scores, limit)[:, None]
            (row[f"mean until minute {limit:.2g} of training"],) = plot.scores_text(equal, 2)
        if arm in unseen:
            (row["unseen tasks, at the end"],) = plot.scores_text(unseen[arm].scores[:, -1:], 2)
        row["wall minutes a run"] = plot.minutes_of(folder, arm)
        rows.append(row | {f"P(better than {reference})": plot.better_than(runs, results[reference])})
    table = plot.markdown(list(rows[0]), [list(row.values()) for row in rows])
    means = {arm: runs.both[:, 1] for arm, runs in results.items()}
    best, *others = sorted(means, key=lambda arm: -means[arm].mean())
    sentences = [f"Score: {scale.name}; above interquartile means. Best in the plain mean over the run: {best}."]
    if others:
        other = reference if best != reference else others[0]
        sentences.append(certainty(best, other, means[best], means[other], scale.digits, len(others)))
    return f"{table}\n\n{' '.join(sentences)}", best


def certainty(best, other, ours, others, digits, count):
    """A sentence on what so many runs can tell of the best arm: Bonferroni's interval, as it is one of `count` + 1."""
    n, gain = min(len(ours), len(others)), float(ours.mean() - others.mean())
    if n < plot.FEW:
        text = f"{best} less {other} is {gain:+.{digits}f}; with {n} runs an arm that is a point, not a finding."
    else:
        _, (low, high) = stats.difference([ours], [others], 1 - 0.05 / count)
        word = "stands out" if low > 0 else "can't be told from chance"
        text = f"{best} less {other} is {plot.with_interval(gain, (low, high), digits, '+')} and {word}: "
        text += f"{n} runs an arm tell differences of about {(high - low) / 2:.{digits}f}."
    needed = stats.runs_needed(gain, ours, others, level=0.05 / count) if n > 1 else None
    return text + (f" To show this one with a chance of 80% takes about {needed} runs an arm." if needed else "")


def prepare(args, flags):
    """The algorithm's module and {arm: flags}, and all {arm: {learning rate: words}}, which the algorithm accepts."""
    (env_id,), rates = flags.get("--env-id", ["Jump-v0"]), flags.pop("--learning-rate", [None])
    module = pretrain_encoder.choose_algorithm(env_id)
    arms, words = make_arms({"--env-id": [env_id]} | flags, args.from_scratch), {}
    for arm, settings in arms.items():
        words[arm] = {r: words_of(settings | ({"--learning-rate": r} if r else {})) for r in rates}
        for line in words[arm].values():
            check(module, arm, line)
    if len(arms) == len(rates) == 1:
        fail("nothing to compare: give a flag several values, or --from-scratch")
    return module, arms, words


def name_of(module, env_id, words):
    """The folder's name: an edited algorithm or environment, other weights or flags have results of their own."""
    files = {module.__file__, sys.modules.get(env_id.split(":")[0], module).__file__}
    files |= {word for arm in words.values() for line in arm.values() for word in line if os.path.isfile(word)}
    content = b"".join(Path(file).read_bytes() for file in sorted(files)) + repr(words).encode()
    return re.sub(r"[^\w.-]+", "-", env_id) + "-" + hashlib.sha256(content).hexdigest()[:8]


def compare(args, flags):
    """Runs the comparison and prints what it says. Returns the exit code."""
    module, arms, words = prepare(args, flags)
    program, rates = f"{module.__name__}.py", list(next(iter(words.values())))
    name = name_of(module, next(iter(arms.values()))["--env-id"], words)
    folder, chosen = args.results / name, dict.fromkeys(arms, rates[0])
    trials = {f"{arm}, {r}": line for arm, found in words.items() for r, line in found.items() if len(rates) > 1}
    trials = make_runs(f"{name}-rates", program, trials, 1001, args.rate_seeds)  # the comparison's seeds are 1, 2, ...
    print(f"{len(arms)} arms, {args.seeds} runs each, after {len(trials)} for the rates; results: {folder}", flush=True)
    with tqdm(total=len(trials) + len(arms) * args.seeds, unit="run", file=sys.stdout) as bar:
        failed = finish(trials, args, bar)
        chosen = choose_rates(args.results / f"{name}-rates", arms, rates) if trials else chosen
        methods = {arm: words[arm][rate] for arm, rate in chosen.items()}
        failed += finish(make_runs(name, program, methods, 1, args.seeds), args, bar)
    if not plot.read_kept(folder):
        fail("no run has finished: see the output above")
    text, best = summarise(folder, arms, chosen)
    text += f"\n\nThe best arm's command:\n\n    python {program} {shlex.join(words[best][chosen[best]])} --seed 1"
    plot.draw_curves(folder / "curves.png", {"": plot.read_suite(folder)}, plot.scale_of(folder).name, minutes=True)
    (folder / "compare.md").write_text(f"{text}\n\n![learning curves](curves.png)\n")
    print(f"\n{text}\n\n{folder}/compare.md, curves.png")
    return 1 if failed else 0


def main(argv=None):
    """Runs the command line `argv`. Returns the exit code: 0, 1 after failures, 2 for bad input or 130 after Ctrl-C."""
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])  # of the runs
    try:
        return compare(*parse_args(sys.argv[1:] if argv is None else argv))
    except runner.UsageError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare.py: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
