"""What speed.py and drqv2_speed.py share: repeated measurements, their medians and ratios, printed and as a CSV."""

import csv
import statistics


def take_samples(measured, repeats):
    """Calls every function of measured {name: (function, unit)} once a repeat, in turn, so that a busy moment of the
    machine hits all of them alike. Returns {name: [numbers]}."""
    samples = {name: [] for name in measured}
    for repeat in range(repeats):
        for name, (function, unit) in measured.items():
            samples[name].append(function())
            print(f"repeat {repeat + 1}: {name}: {samples[name][-1]:.4g} {unit}", flush=True)
    return samples


def write_report(samples, units, ratios, machine, output=None):
    """Prints the medians of samples {name: [numbers]} and of each repeat's ratios [(name over, name, meaning)].

    Writes them to the file `output` too, where one is given.
    """
    median = {name: statistics.median(values) for name, values in samples.items()}
    rows = [(name, f"{value:.4g}" if value < 1000 else f"{value:.0f}", units[name]) for name, value in median.items()]
    for a, b, meaning in ratios:
        ratio = statistics.median(x / y for x, y in zip(samples[a], samples[b]))
        rows.append((f"{a} / {b}", f"{ratio:.2f}", meaning))
    rows.append(("machine", machine, f"{min(map(len, samples.values()))} repeats"))
    for row in rows:
        print(f"{row[0]:<56} {row[1]:>12}  {row[2]}")
    if output:
        with open(output, "w", newline="") as file:
            csv.writer(file).writerows([("what", "value", "unit or meaning"), *rows])
