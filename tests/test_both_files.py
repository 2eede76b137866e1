"""The two algorithm files import nothing from each other: what they have in common stands in both, word for word."""

import ast
import csv
import re

import drqv2_common
import pytest
from conftest import ROOT

FILES = ("ppo_pisco.py", "drqv2_pisco.py")
SHARED = (
    "parse_args timm_layers Encoder.freeze load_encoder save_encoder make_encoder random_shift random_noise augment "
    "simsiam_loss info_nce_loss write_gif make_run_folder write_atomically append_metrics load_checkpoint set_up"
).split()
TEXTS = [(ROOT / file).read_text() for file in FILES]


def definition(text, name):
    """The source with its comments of a function, or of a method given as Class.method."""
    node = ast.parse(text)
    for part in name.split("."):
        (node,) = (child for child in node.body if getattr(child, "name", None) == part)
    return ast.get_source_segment(text, node)


@pytest.mark.parametrize("name", SHARED)
def test_is_the_same_in_both(name):
    ours, theirs = (definition(text, name) for text in TEXTS)
    assert ours == theirs


@pytest.mark.parametrize("name", SHARED)
def test_one_changed_copy_is_noticed(name):
    """Be it in a comment alone."""
    same = definition(TEXTS[0], name)
    changed = TEXTS[0].replace(same, same.replace("\n", "  # changed\n", 1))
    assert definition(changed, name) != same


def test_no_other_function_is_the_same():
    """One that is equal in both, and named nowhere above, could drift unseen."""
    functions = []
    for text in TEXTS:
        tree = ast.parse(text)
        functions.append({node.name: ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef)})
    equal = {name for name in functions[0] if functions[0][name] == functions[1].get(name)}
    assert equal == {name for name in SHARED if "." not in name}


def test_run_folder_is_locked_alike():
    locks = [re.findall(r"    try:  # The file stays open.+?from None\n", text, flags=re.S) for text in TEXTS]
    assert locks[0] == locks[1] and len(locks[0]) == 1 and "fcntl.lockf" in locks[0][0]


def test_arguments_of_one_name_have_one_type():
    types = []
    for text in TEXTS:
        (args,) = (node for node in ast.parse(text).body if getattr(node, "name", None) == "Args")
        types.append({node.target.id: ast.unparse(node.annotation) for node in args.body if hasattr(node, "target")})
    both = types[0].keys() & types[1].keys()
    assert len(both) > 20
    for name in both:
        assert types[0][name] == types[1][name], name


def test_metrics_of_one_meaning_have_one_name(finished, tmp_path, monkeypatch):
    drqv2_common.use(monkeypatch)
    wanted = {
        "global_step", "charts/SPS", "charts/episodic_return", "charts/episodic_length", "losses/pisco",
        "eval/greedy_return",
    }  # fmt: skip
    for folder in (finished, drqv2_common.train(tmp_path, "--total-frames 120")):
        with open(folder / "metrics.csv", newline="") as file:
            columns = csv.DictReader(file).fieldnames
        assert columns[:2] == ["global_step", "charts/SPS"] and wanted <= set(columns)
