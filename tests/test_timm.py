"""--encoder timm:NAME: the same features as timm itself, frozen layers, weights of timm's, whole runs, mistakes."""

import math
import sys

import drqv2_common
import pytest
import safetensors.torch
import torch
from conftest import ROOT, TINY, assert_same_end, encoder_file, kill_at, metrics, resume, train
from conftest import train_until_killed as train_ppo_until_killed
from test_ppo_pisco_math import loss_and_gradients

import drqv2_pisco
import ppo_pisco
import pretrain_encoder

sys.path.insert(0, str(ROOT / "benchmark"))
import probe  # noqa: E402

with pytest.raises(SystemExit, match="unknown"):  # imports timm as the programs do
    ppo_pisco.timm_layers("timm:nothing", 3, 0.0)
import timm  # noqa: E402

ALGORITHMS = {"ppo": (ppo_pisco, 0.0), "drqv2": (drqv2_pisco, 0.5)}  # what is subtracted from pixels in 0..1
LAYERS = {"resnet10t": 5, "convnext_atto": 5, "test_efficientnet": 6, "regnetx_002": 5, "vit_tiny_patch16_224": 13}
OLD = "timm:legacy_seresnet18"  # conv1 is in its layer0
SMALL = ("test_resnet", "test_convnext", "test_vit")  # timm's smallest models of these families


def make_encoder(algorithm, name, shape=(6, 40, 44), count=0, **flags):
    module = ALGORITHMS[algorithm][0]
    flags |= {"feature_dim": 8} if algorithm == "ppo" else {}
    encoder = module.Encoder(module.Args(encoder=f"timm:{name}", **flags), shape).eval()
    encoder.freeze(count)
    return encoder


def make_model(name, channels=3, **kwargs):
    """timm's own model with weights, biases and statistics that all matter, as random ones from timm would not."""
    sizes = {"dynamic_img_size": True, "dynamic_img_pad": True} if "vit" in name else {}
    model = timm.create_model(name, in_chans=channels, **sizes, **kwargs).eval()
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif value.dtype == torch.float32 and value.ndim == 1:
            value.normal_(float(key.endswith("weight")), 0.2)
    return model


def save(path, model, **metadata):
    """A weights file as timm writes it."""
    safetensors.torch.save_file(model.state_dict(), path, {"format": "pt"} | metadata)
    return path


def random_images(shape, count=3):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8)


def colours(model, channels):
    """timm's own mean and deviation of every channel, (C, 1, 1) each."""
    return (torch.tensor([model.pretrained_cfg[key][i % 3] for i in range(channels)])[:, None, None]
        for key in ("mean", "std"))  # fmt: skip


# --- Features and layers ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", LAYERS)
def test_features_are_those_of_timm(tmp_path, algorithm, name):
    """However many layers are frozen, on images of two frames that no patch fits."""
    model, images = make_model(name, channels=6), random_images((6, 40, 44))
    encoder = make_encoder(algorithm, name)
    ALGORITHMS[algorithm][0].load_encoder(save(tmp_path / "timm.safetensors", model), encoder)
    model.reset_classifier(0, "")
    mean, std = colours(model, 6)
    with torch.no_grad():
        expected = model((images / 255 - mean) / std)
        expected = encoder.layers[-1](expected) if algorithm == "ppo" else expected
        assert expected.std() > 0.01
        for count in (0, 1, LAYERS[name], "all"):
            encoder.freeze(count)
            torch.testing.assert_close(encoder(images), expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert len(encoder.layers) == LAYERS[name] + (algorithm == "ppo")
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in encoder.layers]
    assert sum(sizes[: LAYERS[name]]) == sum(p.numel() for p in model.parameters()) and min(sizes) > 0


@pytest.mark.parametrize("name", SMALL)
def test_layers_are_stem_and_stages_in_order(name):
    model, encoder = timm.create_model(name, in_chans=6, num_classes=0), make_encoder("drqv2", name)
    stages = [*model.children()][4:8] if name == "test_resnet" else getattr(model, "blocks", None) or model.stages
    own = [[p.shape for p in stage.parameters()] for stage in stages]
    ours = [[p.shape for p in layer.parameters()] for layer in encoder.layers]
    assert ours[1:-1] == own[:-1] and ours[-1][: len(own[-1])] == own[-1]
    assert len(ours[0]) + sum(map(len, own)) <= sum(1 for _ in model.parameters()) <= sum(map(len, ours))


@pytest.mark.parametrize("channels", [1, 3, 4, 6])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_pixels_are_normalised_as_timm_does(algorithm, channels):
    encoder, images = make_encoder(algorithm, "test_resnet", (channels, 32, 32)), random_images((channels, 32, 32))
    mean, std = colours(timm.create_model("test_resnet"), channels)
    black = -ALGORITHMS[algorithm][1]
    torch.testing.assert_close(encoder.layers[0][0](images / 255 + black), (images / 255 - mean) / std)


@pytest.mark.parametrize("count", [0, 2, "all"])
@pytest.mark.parametrize("name", SMALL)
def test_loss_from_stored_activations_is_that_of_the_images(name, count):
    for bf16 in (False, True):
        torch.manual_seed(0)
        obs = random_images((3, 32, 32), 6)
        args = ppo_pisco.Args(encoder=f"timm:{name}", feature_dim=8, bf16=bf16, norm_adv=False)
        agent = ppo_pisco.Agent(args, make_encoder("ppo", name, (3, 32, 32), count, bf16=bf16), 2)
        hidden = agent.encoder.frozen_prefix(obs)
        assert hidden.dtype == (torch.bfloat16 if bf16 and count else torch.float32)
        before = hidden.clone()
        stored = hidden.movedim(1, -1).contiguous().movedim(-1, 1)  # as the rollout has it
        loss, gradients = loss_and_gradients(agent, obs, stored, args)
        expected, wanted = loss_and_gradients(agent, obs, None, args)
        torch.testing.assert_close(loss, expected, rtol=0.02 if bf16 else 1e-5, atol=1e-6)
        assert gradients.keys() == wanted.keys() and torch.equal(stored, before)
        for key, gradient in gradients.items() if not bf16 else ():
            torch.testing.assert_close(gradient, wanted[key], rtol=1e-3, atol=1e-4 * float(wanted[key].norm()))
        assert any(key.startswith("encoder.") for key in gradients) == (count != "all")


# --- Weights ---------------------------------------------------------------------------------------------------------
def loaded(path, shape=(3, 40, 44), name="test_resnet", **flags):
    encoder = make_encoder("ppo", name, shape, **flags)
    ppo_pisco.load_encoder(path, encoder)
    return encoder


def test_weights_of_three_channels_fit_other_images(tmp_path):
    """As timm itself adapts them."""
    for name in SMALL:
        tensors = make_model(name).state_dict()
        path = tmp_path / "timm.safetensors"
        safetensors.torch.save_file(tensors, path)  # no metadata at all
        for channels in (1, 4):
            adapted = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay={"state_dict": tensors}, in_chans=channels, num_classes=0
            )
            first, ours = next(p for p in adapted.parameters() if p.ndim == 4), loaded(path, (channels, 40, 44), name)
            assert torch.equal(next(p for p in ours.parameters() if p.ndim == 4), first) and first.shape[1] == channels


def test_weights_of_timms_hub(tmp_path, monkeypatch):
    tensors, asked = make_model("test_resnet").state_dict(), []

    def from_hub(model_id, *args, **kwargs):
        asked.append(model_id)
        return dict(tensors)

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", from_hub)
    encoder = loaded("timm")
    assert asked == ["timm/test_resnet.r160_in1k"]
    own = loaded(save(tmp_path / "timm.safetensors", make_model("test_resnet")))  # other numbers
    values = [value for value in encoder.layers[:5].state_dict().values() if value.ndim == 4]
    kernels = [value for value in tensors.values() if value.ndim == 4]
    assert all(torch.equal(*pair) for pair in zip(values, kernels)) and len(values) == len(kernels)
    assert not torch.equal(own.layers[0][1].conv1[0].weight, encoder.layers[0][1].conv1[0].weight)
    with pytest.raises(SystemExit, match="--encoder-weights timm: .*layers.5.1.weight"):
        loaded("timm", count="all")  # PPO's layer to z, which would stay random
    assert drqv2_pisco.load_encoder("timm", make_encoder("drqv2", "test_resnet", count="all"))


def test_weights_that_we_have_written(tmp_path):
    for algorithm, (module, _) in ALGORITHMS.items():
        for name in SMALL:
            encoder, other = (make_encoder(algorithm, name, count="all") for _ in range(2))
            module.save_encoder(tmp_path / "ours.safetensors", encoder)
            about = module.load_encoder(tmp_path / "ours.safetensors", other)
            assert about["architecture"] == f"timm:{name}"
            assert all(map(torch.equal, encoder.state_dict().values(), other.state_dict().values()))


def refused(algorithm, flags, *words):
    module = ALGORITHMS[algorithm][0]
    argv = [*TINY.split()] if algorithm == "ppo" else ["--env-id", "cartpole-balance", "--image-size", "24"]
    with pytest.raises(SystemExit) as stop:
        module.train(module.parse_args([*argv, *flags.split()]))
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    assert all(word in stop.value.code for word in words), stop.value.code


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_mistakes(algorithm, tmp_path, monkeypatch):
    monkeypatch.setattr(drqv2_pisco, "make_env", lambda args: drqv2_common.TinyControl())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    own = {"ppo": "nature", "drqv2": "drqv2"}[algorithm]
    resnet, other = "--encoder timm:test_resnet", save(tmp_path / "x.safetensors", make_model("test_efficientnet"))
    for name in ("natur", "resnet18", "timm:resnet81", "timm:local-dir:x"):
        refused(algorithm, f"--encoder {name}", f"--encoder {name}: unknown", "--help", "timm:")
    refused(algorithm, f"{resnet} --encoder-weights timm", "--encoder-weights timm: ", "Hub")
    refused(algorithm, "--encoder-weights timm", "--encoder-weights timm: has no metadata", "--encoder timm:NAME")
    refused(algorithm, f"{resnet} --encoder-weights {other}", f"--encoder-weights {other}: ", "conv1.0.weight")
    if algorithm == "ppo":  # the other one's images are too small for it
        refused(algorithm, f"--encoder timm:test_convnext --encoder-weights {other}", f"--encoder-weights {other}: ")
    refused(algorithm, f"{resnet} --encoder-weights {other} --encoder {own}", f"--encoder-weights {other}: ")
    refused(algorithm, f"{resnet} --freeze-layers 1 --encoder-weights none", "--freeze-layers", "--freeze-random")
    refused(algorithm, f"{resnet} --freeze-layers 9", "--freeze-layers 9: ", f"0 to {5 + (algorithm == 'ppo')} layers")
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)  # not installed
    refused(algorithm, resnet, "--encoder timm:test_resnet: ", "pip install timm==", "torchvision==")


def test_structures_that_have_no_such_layers_are_refused():
    """Rotary embeddings go from block to block beside the tokens: they must not be lost in silence."""
    with pytest.raises(TypeError, match="Identity"):
        ppo_pisco.Encoder(ppo_pisco.Args(encoder="timm:vit_small_patch16_dinov3"), (3, 64, 64))


def test_the_stem_may_be_called_a_layer():
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in ppo_pisco.timm_layers(OLD, 3, 0.0)]
    model = timm.create_model(OLD[5:])
    assert sizes[:2] == [sum(p.numel() for p in part.parameters()) for part in (model.layer0, model.layer1)]


def test_timm_is_imported_only_when_asked_for():
    for name in ("ppo_pisco.py", "drqv2_pisco.py", "pretrain_encoder.py"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if "import" in line.split() and "timm" in line]
        assert all(line.startswith("    ") for line in lines) and len(lines) == (0 if "pretrain" in name else 2)


# --- Whole runs ------------------------------------------------------------------------------------------------------
def compare(path, folder, count):
    """Frozen layers have the file's values, the statistics of all of them too; everything else has moved."""
    before, after = encoder_file(path)[0], encoder_file(folder / "encoder.safetensors")[0]
    assert before.keys() == after.keys() and count > 0
    for key, value in after.items():
        stays = int(key.split(".")[1]) < count or "running_" in key or "num_batches" in key
        assert torch.equal(value, before[key]) == stays, key


def ppo_start(tmp_path, name, shape=(1, 60, 60)):
    """A file of ours with timm's weights in it, to compare with."""
    encoder = loaded(save(tmp_path / "timm.safetensors", make_model(name)), shape, name)
    ppo_pisco.save_encoder(tmp_path / "start.safetensors", encoder, frame_stack=1, image_channels=1)
    return tmp_path / "start.safetensors"


def test_ppo_run_freezes_goes_on_and_ends_the_same(tmp_path, monkeypatch, capsys):
    name, layers = "test_vit", 8
    start = ppo_start(tmp_path, name)
    flags = f"--encoder timm:{name} --feature-dim 8 --encoder-weights {start} --freeze-layers 2 --update-epochs 1"
    whole = train(tmp_path / "whole", flags)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("layer ")]
    assert [line.split()[-1] for line in table] == ["frozen"] * 2 + ["trained"] * (layers - 2)
    compare(start, whole, 2)
    checkpoint = ppo_pisco.load_checkpoint(whole, "cpu")
    trained = [p for layer in loaded(start, (1, 60, 60), name, count=2).layers[2:] for p in layer.parameters()]
    assert len(checkpoint["optimizer"]["state"]) == len(trained) + 4  # and both heads
    assert float(metrics(whole)[-1]["losses/pisco"]) > 0
    with monkeypatch.context() as patch:
        kill_at(patch, ppo_pisco, "update", 3)
        killed = train_ppo_until_killed(tmp_path / "killed", flags)
    start.unlink()  # the checkpoint has them
    assert_same_end(whole, resume(killed))


@pytest.mark.parametrize("name, count, ssl", [("test_resnet", 3, "curl"), ("test_vit", 1, "pisco")])
def test_drqv2_run_freezes_goes_on_and_ends_the_same(tmp_path, monkeypatch, name, count, ssl):
    drqv2_common.use(monkeypatch)
    encoder = make_encoder("drqv2", name, (9, 24, 24))
    drqv2_pisco.load_encoder(save(tmp_path / "timm.safetensors", make_model(name)), encoder)
    drqv2_pisco.save_encoder(start := tmp_path / "start.safetensors", encoder)
    flags = f"--encoder timm:{name} --encoder-weights {start} --freeze-layers {count} --ssl {ssl} --eval-interval 0"
    whole = drqv2_common.train(tmp_path / "whole", flags)
    compare(start, whole, count)
    with monkeypatch.context() as patch:
        kill_at(patch, drqv2_pisco, "update", 12)
        killed = drqv2_common.train_until_killed(tmp_path / "killed", flags)
    start.unlink()
    drqv2_common.assert_same_end(whole, drqv2_common.resume(killed))
    assert any(row[f"losses/{ssl}"] for row in metrics(whole))


def test_run_from_the_hubs_weights_resumes_without_the_hub(tmp_path, monkeypatch):
    flags = "--encoder timm:test_resnet --feature-dim 8 --encoder-weights timm --freeze-layers 5 --total-timesteps 64"
    model = make_model("test_resnet")
    with monkeypatch.context() as patch:
        patch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *args, **kwargs: model.state_dict())
        whole = train(tmp_path / "whole", flags)
        kill_at(patch, ppo_pisco, "update", 2)
        killed = train_ppo_until_killed(tmp_path / "killed", flags)
    encoder = loaded(save(tmp_path / "timm.safetensors", model), (1, 60, 60))
    ppo_pisco.save_encoder(tmp_path / "start.safetensors", encoder)
    compare(tmp_path / "start.safetensors", whole, 5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same_end(whole, resume(killed))


# --- Pretraining and probe -------------------------------------------------------------------------------------------
IMAGES = "--total-steps 2 --eval-interval 1 --batch-size 8 --torch-threads 1 --no-cuda --projector-dim 16"
JUMP = "--jump-tasks 20:5,22:15,30:20 --num-frames 60 --feature-dim 8"
DMC = "--env-id cartpole-balance --image-size 24 --render-quality fast --num-frames 104"


@pytest.mark.parametrize(
    "objective, flags, name",
    [("state", JUMP, "test_vit"), ("simsiam", JUMP, "test_resnet"), ("simsiam", DMC, "test_vit"),
        ("state", DMC, "test_resnet")],
)  # fmt: skip
def test_pretraining_on_images(tmp_path, capsys, objective, flags, name):
    words, files = f"--objective {objective} {flags} --encoder timm:{name} {IMAGES}", []
    for rate in ("0", "1e-3"):
        files.append(tmp_path / f"{rate}.safetensors")
        pretrain_encoder.main([*words.split(), "--learning-rate", rate, "--output", str(files[-1])])
    (start, _), (end, about) = map(encoder_file, files)
    assert about["objective"] == objective and start.keys() == end.keys()
    for key, value in start.items():  # no statistics move, all weights do
        statistics = "running_" in key or "num_batches" in key
        assert torch.equal(value, end[key]) if statistics else value.ndim < 2 or not torch.equal(value, end[key]), key
    algorithm, shape = ("drqv2", (9, 24, 24)) if flags == DMC else ("ppo", (1, 60, 60))
    module = ALGORITHMS[algorithm][0]
    module.load_encoder(files[-1], make_encoder(algorithm, name, shape))
    *_, line = [line for line in capsys.readouterr().out.splitlines() if "use it with" in line]
    assert f"--encoder timm:{name}" in line and f"{module.__name__}.py" in line
    assert module.parse_args(line.split()[-len(line.split()) + line.split().index("python") + 2 :]).freeze_layers == 2


def test_pretraining_by_rl(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo_pisco, "ENCODERS", tmp_path)
    flags = "--total-timesteps 32 --num-envs 4 --num-steps 8 --num-minibatches 2 --eval-episodes 0 --no-cuda"
    words = f"{flags} --feature-dim 8 --torch-threads 1 --encoder timm:test_resnet --runs-dir {tmp_path / 'runs'}"
    pretrain_encoder.main(words.split())
    _, about = encoder_file(tmp_path / "jump-v0__timm-test_resnet__rl.safetensors")
    assert (about["architecture"], about["objective"]) == ("timm:test_resnet", "rl")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_probe_reads_every_layer(tmp_path, name):
    encoder = make_encoder("ppo", name, (1, 60, 60))
    path = tmp_path / "e.safetensors"
    ppo_pisco.save_encoder(path, encoder, environment="Jump-v0")
    read, _, make_random = probe.read_encoder(path)
    assert len(make_random().layers) == len(encoder.layers)
    states, task_ids = pretrain_encoder.jump_states([(20, 10)])
    data = pretrain_encoder.jump_data([(20, 10)], states[:5], task_ids[:5])
    images = data.observations(torch.arange(5))
    for count, variants in enumerate(probe.layer_features(read, data)):
        encoder.freeze(count)
        x = encoder.frozen_prefix(images)
        torch.testing.assert_close(variants["flat"], x.flatten(1))
        width = {4: x.shape[1], 3: x.shape[-1], 2: x.shape[-1]}[x.ndim]  # channels, a token's numbers, z
        assert variants["pooled"].shape == (5, width) and math.isfinite(variants["pooled"].sum())
    assert count == len(encoder.layers)
