"""The mathematics of drqv2_pisco.py against numbers worked out by hand."""

import ast
import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from drqv2_pisco import (
    Agent, Args, Encoder, MapLinear, Replay, act, critic_loss, gaussian_kl, make_optimizers, pisco_loss, replay_size,
    sample_nstep, stddev_schedule, truncated_normal, update,
)  # fmt: skip

import drqv2_pisco

CPU = torch.device("cpu")


# --- Losses ----------------------------------------------------------------------------------------------------------
def test_gaussian_kl():
    p, q = torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([[1.0, -1.0], [0.5, 0.5]])
    # (1 + 4) / (2 sigma^2): 2.5 at sigma 1, 10 at sigma 1/2
    torch.testing.assert_close(gaussian_kl(p, q, 1.0), torch.tensor([2.5, 0.0]))
    torch.testing.assert_close(gaussian_kl(p, q, 0.5), torch.tensor([10.0, 0.0]))
    p_dist, q_dist = (torch.distributions.Normal(mu, 0.3) for mu in (p, q))
    torch.testing.assert_close(gaussian_kl(p, q, 0.3), torch.distributions.kl_divergence(p_dist, q_dist).sum(-1))


def test_pisco_loss_and_where_its_gradient_goes():
    z1, z2, p1, p2 = (torch.tensor([[value]], requires_grad=True) for value in (0.1, 0.2, 0.5, 0.7))
    loss = pisco_loss(z1, z2, p1, p2, 1.0)
    # 1/2 (0.1 - 0.7)^2 / 2 + 1/2 (0.2 - 0.5)^2 / 2 = 0.09 + 0.0225
    assert loss.item() == pytest.approx(0.1125)
    loss.backward()
    assert z1.grad is None and z2.grad is None
    # 1/2 (p2 - z1) = 0.3 and 1/2 (p1 - z2) = 0.15
    assert p2.grad.item() == pytest.approx(0.3) and p1.grad.item() == pytest.approx(0.15)


def test_critic_loss():
    q1, q2, target = torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]])
    assert critic_loss(q1, q2, target).item() == pytest.approx((0 + 4) / 2 + (1 + 1) / 2)


def test_stddev_schedule():
    values = [stddev_schedule(step, 1.0, 0.1, 100) for step in (0, 50, 100, 1000)]
    assert values == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_truncated_normal():
    mu = torch.tensor([[0.0, 0.9, -0.95, 0.2]], requires_grad=True)
    noise = torch.tensor([[0.5, 0.5, -0.5, -0.1]])
    free, clipped = truncated_normal(mu, noise), truncated_normal(mu, noise, 0.3)
    torch.testing.assert_close(free.detach(), torch.tensor([[0.5, 1 - 1e-6, -1 + 1e-6, 0.1]]))
    torch.testing.assert_close(clipped.detach(), torch.tensor([[0.3, 1 - 1e-6, -1 + 1e-6, 0.1]]))
    assert clipped.abs().max() < 1
    clipped.sum().backward()  # straight through the bounds
    assert torch.equal(mu.grad, torch.ones(1, 4))


def test_sample_nstep():
    rewards = np.array([[1.0, 2.0, 4.0]] * 3, np.float32)
    terminated = np.array([[False, False, False], [False, False, True], [False, True, False]])
    total, discount = sample_nstep(rewards, terminated, 0.5)
    assert total.tolist() == [3.0, 3.0, 2.0]  # 1 + 2/2 + 4/4; the last one ends after its second reward
    assert discount.tolist() == [0.125, 0.0, 0.0]  # 0.5 ** 3, unless a true terminal came before


# --- Replay ----------------------------------------------------------------------------------------------------------
def make_replay(tmp_path, rows=40, slack=6, nstep=3, lengths=(5, 2, 4), terminated=()):
    """Row i holds a frame full of i, the action i / 10 and the reward i; the episodes have these many steps."""
    replay = Replay(tmp_path / "replay.bin", rows, slack, (3, 2, 2), 1, 0, None)
    for episode, length in enumerate(lengths):
        for step in range(length + 1):
            i = replay.head
            end = step == length and episode in terminated
            replay.add(np.full((3, 2, 2), i, np.uint8), [i / 10], float(i), end)
        replay.end_episode(nstep)
    return replay


def test_sampled_rows_never_cross_an_episodes_end(tmp_path):
    replay = make_replay(tmp_path)
    # Rows 0..5 (5 steps), 6..8 (2 steps: too short for 3), 9..13 (4 steps)
    assert replay.episodes == [[0, 5], [9, 4]] and len(replay) == 9
    rows, first = replay.sample_rows(1000, 3)
    assert set(zip(rows.tolist(), first.tolist())) == {(0, 0), (1, 0), (2, 0), (9, 9), (10, 9)}
    # an episode at random, then a step of it: half the samples, shared by three starts and by two
    counts = np.bincount(rows, minlength=11)[[0, 1, 2, 9, 10]] / 1000
    assert counts == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4], abs=0.05)


def test_sample(tmp_path):
    replay = make_replay(tmp_path, terminated=(2,))
    obs, action, reward, discount, next_obs = replay.sample(200, 3, 0.5, 3, CPU)
    assert obs.shape == next_obs.shape == (200, 9, 2, 2) and obs.dtype == torch.uint8
    assert action.shape == reward.shape == discount.shape == (200, 1) and reward.dtype == torch.float32
    for i in range(200):
        row = int(obs[i, 8, 0, 0])
        first = 0 if row < 6 else 9
        stack = [max(row - k, first) for k in (2, 1, 0)]  # before the episode its first frame is repeated
        assert obs[i, ::3, 1, 1].tolist() == stack and obs[i, 1::3, 0, 1].tolist() == stack
        assert next_obs[i, ::3, 0, 0].tolist() == [row + 1, row + 2, row + 3]
        assert action[i].item() == pytest.approx((row + 1) / 10)
        assert reward[i].item() == (row + 1) + (row + 2) / 2 + (row + 3) / 4
        assert discount[i].item() == (0.0 if row == 10 else 0.125)  # only the last episode's end is a true one


def test_replay_gives_up_rows_before_they_are_overwritten(tmp_path):
    replay = make_replay(tmp_path, rows=20, slack=6, nstep=1, lengths=(4,) * 9)
    # 45 rows written: what will be overwritten next is row 25; with the slack rows from 31 on are safe.
    assert replay.head == 45 and [first for first, _ in replay.episodes] == [35, 40]
    obs, *_ = replay.sample(100, 1, 0.9, 1, CPU)
    assert set(obs[:, 0, 0, 0].tolist()) == {35, 36, 37, 38, 40, 41, 42, 43}


def test_replay_goes_on_with_the_same_samples(tmp_path):
    replay = make_replay(tmp_path)
    state = replay.get_state()
    wanted = [replay.sample(8, 3, 0.9, 3, CPU) for _ in range(3)]
    again = Replay(tmp_path / "replay.bin", 40, 6, (3, 2, 2), 1, 99, None, resuming=True)
    again.set_state(state)
    for batch in wanted:
        for a, b in zip(batch, again.sample(8, 3, 0.9, 3, CPU)):
            assert torch.equal(a, b)


def test_replay_size():
    # 500 steps of 2 frames an episode: 501 rows each. A short run keeps all: 100 episodes, and room for another.
    assert replay_size(Args(total_frames=100_000), 500) == (101 * 501, 501)
    # A long one keeps 2,000 episodes. Between two checkpoints lie 5,000 steps and an episode at most; what two such
    # spans and the episode after them overwrite is not sampled.
    assert replay_size(Args(total_frames=3_000_000), 500) == (2000 * 501, 2 * 5000 + 3 * 501)


def test_a_third_of_the_memory_of_stacked_frames():
    row = Replay.row_dtype((3, 84, 84), 6).itemsize
    rows, _ = replay_size(Args(total_frames=3_000_000), 500)
    # The official buffer: nine channels, action, reward and discount for every step and an episode's beginning.
    assert rows * row < 0.334 * 2000 * 501 * (9 * 84 * 84 + 6 * 4 + 4 + 4)


# --- Networks --------------------------------------------------------------------------------------------------------
def test_map_linear_is_a_linear_layer_of_the_flattened_map():
    maps = torch.randn(5, 4, 3, 2).to(memory_format=torch.channels_last)
    linear = MapLinear((4, 3, 2), 7)
    wanted = torch.nn.functional.linear(maps.flatten(1), linear.weight, linear.bias)
    torch.testing.assert_close(linear(maps), wanted)
    torch.testing.assert_close(linear(maps.contiguous()), wanted)
    torch.testing.assert_close(linear(maps[:1]), wanted[:1])


def tiny_agent(**flags):
    args = Args(feature_dim=8, hidden_dim=16, projector_dim=8, image_size=24, ssl_fraction=1.0, **flags)
    torch.manual_seed(0)
    agent = Agent(args, (9, 24, 24), 2)
    if args.ssl == "curl":
        agent.key_encoder[0].load_state_dict(agent.encoder.state_dict())
    return args, agent


def tiny_batch(n=6):
    images = torch.randint(0, 256, (2, n, 9, 24, 24), dtype=torch.uint8)
    return images[0], torch.rand(n, 2), torch.rand(n, 1), torch.full((n, 1), 0.97), images[1]


def test_shapes_of_the_official_network():
    agent = Agent(Args(), (9, 84, 84), 6)
    assert agent.encoder.map_shape == (32, 35, 35)
    assert sum(p.numel() for p in agent.encoder.parameters()) == 32 * (9 * 9 + 1) + 3 * 32 * (32 * 9 + 1)
    assert agent.actor.trunk[0].weight.shape == (50, 39200)
    maps = agent.encoder(torch.zeros(2, 9, 84, 84, dtype=torch.uint8))
    assert maps.shape == (2, 32, 35, 35) and maps.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [0, 2])
def test_bf16_rounds_inside_the_encoder_alone(count):
    torch.manual_seed(0)
    encoder = Encoder((9, 24, 24)).freeze(count)
    rounded = Encoder((9, 24, 24), bf16=True).freeze(count)
    rounded.load_state_dict(encoder.state_dict())
    images, inside = tiny_batch(64)[0], []
    for layer in rounded.layers:
        layer.register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    maps, maps_rounded = encoder(images), rounded(images)
    maps.sum().backward()
    maps_rounded.sum().backward()
    assert inside == [torch.bfloat16] * 4 and maps_rounded.dtype == torch.float32
    assert maps_rounded.is_contiguous(memory_format=torch.channels_last)
    # bfloat16 has eight significant bits: a rounding is off by 2**-9 at most
    assert 0 < (maps - maps_rounded).norm() / maps.norm() < 0.02
    for one, other in zip(encoder.layers[count:].parameters(), rounded.layers[count:].parameters()):
        assert other.grad.dtype == torch.float32 and 0 < (one.grad - other.grad).norm() / one.grad.norm() < 0.05


def test_acting():
    _, agent = tiny_agent()
    obs = tiny_batch()[0][0].numpy()
    mean = agent.actor(agent.encoder(torch.from_numpy(obs[None])))[0].detach()
    np.testing.assert_array_equal(act(agent, obs, CPU), mean)
    noisy = np.stack([act(agent, obs, CPU, 0.1) for _ in range(400)])
    assert noisy.std(0) == pytest.approx([0.1, 0.1], rel=0.2) and noisy.mean(0) == pytest.approx(mean, abs=0.02)
    assert np.abs([act(agent, obs, CPU, 5.0) for _ in range(50)]).max() < 1


# --- Update ----------------------------------------------------------------------------------------------------------
def textbook_update(agent, batch, std, args, views, noise):
    """One update of DrQ-v2 (Yarats et al. 2021) plus lambda L_ssl, written down anew: plain layers, one Adam for each
    part, torch's own distributions. Returns copies of the networks after it and the losses."""
    agent = copy.deepcopy(agent)
    encoder, actor, critic, target = agent.encoder, agent.actor, agent.critic, agent.critic_target
    _, action, reward, discount, _ = batch
    (obs, next_obs), (next_noise, actor_noise) = views[:2], noise
    learned = [encoder.parameters(), critic.parameters(), [*actor.parameters(), *agent.projector.parameters()]]
    optimizers = [torch.optim.Adam(parameters, lr=1e-3) for parameters in learned]

    def encode(images, layers=encoder.layers):
        x = images.float().contiguous() / 255 - 0.5
        for conv, _ in layers:
            x = F.relu(F.conv2d(x, conv.weight, conv.bias, stride=conv.stride))
        return x.flatten(1)

    def trunk(part, x):
        linear, norm, _ = part
        return torch.tanh(F.layer_norm(x @ linear.weight.T + linear.bias, (args.feature_dim,), norm.weight, norm.bias))

    def q_values(part, x, action):
        z = torch.cat([trunk(part.trunk, x), action], dim=1)
        return part.q1(z), part.q2(z)

    def noisy(mu, noise):  # straight through the bounds
        action = mu + (std * noise).clamp(-args.stddev_clip, args.stddev_clip)
        return action + (action.clamp(-1 + 1e-6, 1 - 1e-6) - action).detach()

    policy = lambda z: torch.tanh(actor.policy(z))  # noqa: E731
    x = encode(obs)
    with torch.no_grad():
        next_x = encode(next_obs)
        next_action = noisy(policy(trunk(actor.trunk, next_x)), next_noise)
        wanted = reward + discount * torch.minimum(*q_values(target, next_x, next_action))
    losses = {"critic_loss": sum(((q - wanted) ** 2).mean() for q in q_values(critic, x, action))}
    total = losses["critic_loss"]
    if args.ssl != "none":
        b = len(views[2])
        z1, z2 = trunk(actor.trunk, x[:b]), trunk(actor.trunk, encode(views[2]))
        p1, p2 = agent.projector(z1), agent.projector(z2)
        if args.ssl in ("pisco", "consistency"):
            normal = lambda z: torch.distributions.Normal(policy(z), args.pisco_std)  # noqa: E731
            sg = lambda z: torch.distributions.Normal(policy(z).detach(), args.pisco_std)  # noqa: E731
            kl = lambda z, p: torch.distributions.kl_divergence(sg(z), normal(p)).sum(1).mean()  # noqa: E731
            loss = kl(z1, p2) / 2 + kl(z2, p1) / 2
        elif args.ssl == "simsiam":
            cosine = lambda z, p: F.cosine_similarity(z.detach(), p).mean()  # noqa: E731
            loss = -cosine(z1, p2) / 2 - cosine(z2, p1) / 2
        else:
            keys, key_trunk = agent.key_encoder
            k1, k2 = (trunk(key_trunk, encode(images, keys.layers)).detach() for images in (obs[:b], views[2]))
            match = lambda p, k: -(p @ k.T).log_softmax(1).diagonal().mean()  # noqa: E731
            loss = match(p1, k2) / 2 + match(p2, k1) / 2
        losses[args.ssl] = loss
        total = total + args.ssl_coef * loss
    total.backward()
    for optimizer in optimizers[:2]:
        optimizer.step()

    x = x.detach()
    losses["actor_loss"] = -torch.minimum(
        *q_values(critic, x, noisy(policy(trunk(actor.trunk, x)), actor_noise))
    ).mean()
    losses["actor_loss"].backward(inputs=list(actor.parameters()))
    optimizers[2].step()
    for slow, fast in zip(target.parameters(), critic.parameters()):
        slow.data = (1 - args.tau) * slow.data + args.tau * fast.data
    if args.ssl == "curl":
        for slow, fast in zip(agent.key_encoder.parameters(), [*encoder.parameters(), *actor.trunk.parameters()]):
            slow.data = (1 - args.curl_tau) * slow.data + args.curl_tau * fast.data
    return agent, losses


@pytest.mark.parametrize("ssl", ["none", "pisco", "consistency", "simsiam", "curl"])
def test_update_is_that_of_the_textbook(monkeypatch, ssl):
    args, agent = tiny_agent(ssl=ssl, tau=0.25, curl_tau=0.25, pisco_std=0.5, ssl_coef=0.7)
    args.ssl_fraction = 0.5
    for part in (agent.critic_target, getattr(agent, "key_encoder", nn.Identity())):  # away from what they follow
        for p in part.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    count = itertools.count(1)
    monkeypatch.setattr(drqv2_pisco, "augment", lambda images, *_: images.roll(next(count), dims=-1))
    batch = tiny_batch(8)
    views = batch[0].roll(1, dims=-1), batch[4].roll(2, dims=-1), batch[0][:4].roll(3, dims=-1)
    torch.manual_seed(3)
    noise = torch.randn(8, 2), torch.randn(8, 2)
    assert 0.4 * noise[0].abs().max() > args.stddev_clip  # the clip is at work
    wanted, losses = textbook_update(agent, batch, 0.4, args, views, noise)
    torch.manual_seed(3)
    stats = update(agent, make_optimizers(agent, 1e-3), batch, 0.4, args)
    for name, loss in losses.items():
        assert stats[name].item() == pytest.approx(loss.item(), rel=1e-4), name
    for (name, ours), theirs in zip(agent.named_parameters(), wanted.parameters()):
        # Adam's first step is the gradient's sign times 1e-3: where a gradient is next to zero, rounding decides.
        assert ((ours - theirs).abs() < 2e-5).float().mean() > 0.99, name


def gradients(monkeypatch, losses=None, **flags):
    """Gradients by parameter name just before the optimizers' steps of one update with the images as they are."""
    monkeypatch.setattr(drqv2_pisco, "augment", lambda images, *_: images)
    args, agent = tiny_agent(**flags)
    names, found = {id(p): name for name, p in agent.named_parameters()}, {}
    optimizers = make_optimizers(agent, 1e-3)

    def note(optimizer, *_):
        found.update(
            {names[id(p)]: p.grad.clone() for g in optimizer.param_groups for p in g["params"] if p.grad is not None}
        )

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(note)
    torch.manual_seed(1)
    batch = tiny_batch()
    torch.manual_seed(2)
    stats = update(agent, optimizers, batch, 0.4, args)
    return found, stats


def test_ssl_adds_to_the_gradients_of_encoder_and_actor_alone(monkeypatch):
    plain, _ = gradients(monkeypatch, ssl="none")
    nothing, stats = gradients(monkeypatch, ssl="pisco", ssl_coef=0.0)
    both, _ = gradients(monkeypatch, ssl="pisco", ssl_coef=1.0)
    assert stats["pisco"] > 0
    for name, gradient in plain.items():
        torch.testing.assert_close(nothing[name], gradient, rtol=1e-4, atol=1e-6)
        if name.startswith("critic"):  # nothing of PiSCO
            torch.testing.assert_close(both[name], gradient, rtol=1e-4, atol=1e-6)
        elif name.startswith("encoder"):
            assert not torch.allclose(both[name], gradient, rtol=1e-3)
    projector = {name for name in both if name.startswith("projector")}
    assert len(projector) == 4 and all(both[name].abs().sum() > 0 for name in projector)
    assert not [name for name in both if name.startswith("critic_target")]


def test_pisco_gradients_are_those_of_the_formula(monkeypatch):
    """lambda (1/2 KL + 1/2 KL) differentiated on its own is what PiSCO adds, for every parameter of the actor."""
    plain, _ = gradients(monkeypatch, ssl="none")
    both, _ = gradients(monkeypatch, ssl="pisco", ssl_coef=1e3, pisco_std=0.5)  # large: the rest is rounding
    _, agent = tiny_agent(ssl="pisco")
    torch.manual_seed(1)
    obs = tiny_batch()[0]
    z = agent.actor.trunk(agent.encoder(obs))
    mu = agent.actor.policy(z).tanh().detach()
    p_mu = agent.actor.policy(agent.projector(z)).tanh()
    loss = 1e3 * ((mu - p_mu) ** 2).sum(-1).mean() / (2 * 0.5**2)  # both views are the same here
    names, parameters = zip(
        *((n, p) for n, p in agent.named_parameters() if n.startswith(("actor", "encoder", "proj")))
    )
    for name, wanted in zip(names, torch.autograd.grad(loss, parameters)):
        torch.testing.assert_close(
            both[name] - plain.get(name, 0), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item()
        )


def test_the_schedule_makes_pisco_heavier(monkeypatch):
    _, fixed = gradients(monkeypatch, ssl="pisco", pisco_std=1.0)
    _, schedule = gradients(monkeypatch, ssl="pisco", pisco_std="schedule")  # sigma 0.4 in this update
    assert schedule["pisco"].item() == pytest.approx(fixed["pisco"].item() / 0.16, rel=1e-5)


def test_target_critics_follow(monkeypatch):
    args, agent = tiny_agent(ssl="none", tau=0.25)
    start = [p.clone() for p in agent.critic_target.parameters()]
    update(agent, make_optimizers(agent, 1e-2), tiny_batch(), 0.4, args)
    for before, target, critic in zip(start, agent.critic_target.parameters(), agent.critic.parameters()):
        torch.testing.assert_close(target, before + 0.25 * (critic - before))


@pytest.mark.parametrize("tau", [0.0, 0.25, 1.0])
def test_curl_key_encoder_follows(tau):
    args, agent = tiny_agent(ssl="curl", curl_tau=tau)
    start = [p.clone() for p in agent.key_encoder.parameters()]
    update(agent, make_optimizers(agent, 1e-2), tiny_batch(), 0.4, args)
    followed = [*agent.encoder.parameters(), *agent.actor.trunk.parameters()]
    for before, key, query in zip(start, agent.key_encoder.parameters(), followed):
        torch.testing.assert_close(key, before + tau * (query - before))


def test_actor_loss_leaves_the_critics_and_the_encoder_alone(monkeypatch):
    """Where the critics have no loss, nothing reaches them and the encoder: the actor's loss is its own affair."""
    monkeypatch.setattr(drqv2_pisco, "critic_loss", lambda q1, q2, target: 0.0 * (q1 + q2).sum())
    found, stats = gradients(monkeypatch, ssl="none")
    assert math.isfinite(stats["actor_loss"])
    for name, gradient in found.items():
        assert (gradient.abs().sum() > 0) == name.startswith("actor"), name


@pytest.mark.parametrize("count", range(5))
def test_frozen_layers_get_no_gradient(monkeypatch, count):
    args, agent = tiny_agent(ssl="pisco")
    agent.encoder.freeze(count)
    before = {name: p.clone() for name, p in agent.named_parameters()}
    optimizers = make_optimizers(agent, 1e-2)
    stats = update(agent, optimizers, tiny_batch(), 0.4, args)
    assert stats["grad_norm_frozen"] == 0 and (stats["grad_norm_encoder"] > 0) == (count < 4)
    frozen = tuple(f"encoder.layers.{i}." for i in range(count))
    for name, parameter in agent.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith(frozen), name
        if count and name.startswith(frozen):
            assert parameter.grad is None
    assert len(optimizers[0].param_groups[0]["params"]) == 2 * (4 - count) + 16


# --- The two files ---------------------------------------------------------------------------------------------------
SHARED = (
    "UsageError parse_flags parse_args write_atomically interrupt_later random_shift random_noise augment simsiam_loss "
    "info_nce_loss grad_norm to_device write_gif has_type keep_memory set_up run_args "
    "last_metrics is_out_of_memory"
)


@pytest.mark.parametrize("name", SHARED.split())
def test_both_files_have_the_same(name):
    """The files import nothing from each other; what they have in common is the same word for word."""
    both = []
    for file in ("ppo_pisco.py", "drqv2_pisco.py"):
        tree = ast.parse((ROOT / file).read_text())
        both += [ast.unparse(node) for node in tree.body if getattr(node, "name", None) == name]
    assert len(both) == 2 and both[0] == both[1]


# What differs in pieces that are the same otherwise: names of the program, of its step and of what it speaks of.
OWN_WORDS = {"ppo_pisco.py": "drqv2_pisco.py", "global_step": "frame", "unit='step'": "unit='frame'"}


@pytest.mark.parametrize("name", ["progress_bar", "main", "open_logs", "log", "export", "__exit__"])
def test_pieces_that_differ_in_their_words_alone(name):
    both = []
    for file in ("ppo_pisco.py", "drqv2_pisco.py"):
        nodes = [node for node in ast.walk(ast.parse((ROOT / file).read_text())) if getattr(node, "name", None) == name]
        (node,) = nodes
        if ast.get_docstring(node):
            node.body = node.body[1:]
        both.append(ast.unparse(node))
    for ours, theirs in OWN_WORDS.items():
        both[0] = both[0].replace(ours, theirs)
    assert both[0] == both[1]
