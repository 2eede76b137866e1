"""The mathematics of drqv2_pisco.py against numbers worked out by hand."""

import copy
import dataclasses
import errno
import fcntl
import itertools
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._inductor.config
import torch.nn as nn
import torch.nn.functional as F
from conftest import Killed

import drqv2_pisco
from drqv2_pisco import (
    Agent,
    Args,
    Encoder,
    MapLinear,
    Replay,
    act,
    critic_ssl_loss,
    gaussian_kl,
    info_nce_loss,
    make_optimizers,
    mean_statistics,
    pisco_loss,
    sample_nstep,
    simsiam_loss,
    ssl_loss,
    stddev_schedule,
    truncated_normal,
    update,
)  # fmt: skip

CPU = torch.device("cpu")


# --- Losses ----------------------------------------------------------------------------------------------------------
def test_gaussian_kl():
    p, q = torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([[1.0, -1.0], [0.5, 0.5]])
    # (1 + 4) / (2 sigma^2): 2.5 at sigma 1, 10 at sigma 1/2
    torch.testing.assert_close(gaussian_kl(p, q, 1.0), torch.tensor([2.5, 0.0]))
    torch.testing.assert_close(gaussian_kl(p, q, 0.5), torch.tensor([10.0, 0.0]))
    p_dist, q_dist = (torch.distributions.Normal(mu, 0.3) for mu in (p, q))
    torch.testing.assert_close(gaussian_kl(p, q, 0.3), torch.distributions.kl_divergence(p_dist, q_dist).sum(-1))


def stub(*projections):
    """An agent whose features are its policy's means and whose projector returns these rows, for losses by hand."""
    return SimpleNamespace(actor=SimpleNamespace(mean=lambda z: z), projector=lambda z: torch.cat(projections))


def test_pisco_loss_and_where_its_gradient_goes():
    args = Args(ssl_teacher="view", projector="mlp")
    z1, z2, p1, p2 = (torch.tensor([[value]], requires_grad=True) for value in (0.1, 0.2, 0.5, 0.7))
    views = torch.cat([z1, z2])
    loss = ssl_loss(stub(p1, p2), views, views, None, 1.0, args)
    # 1/2 (0.1 - 0.7)^2 / 2 + 1/2 (0.2 - 0.5)^2 / 2 = 0.09 + 0.0225
    assert loss.item() == pytest.approx(0.1125)
    loss.backward()
    assert z1.grad is None and z2.grad is None
    # 1/2 (p2 - z1) = 0.3 and 1/2 (p1 - z2) = 0.15
    assert p2.grad.item() == pytest.approx(0.3) and p1.grad.item() == pytest.approx(0.15)
    # The state alone as the teacher: (0.1 - 0.7)^2 / 2 = 0.18, and p2 - z1 = 0.6
    p2.grad = None
    args.ssl_teacher = "state"
    loss = ssl_loss(stub(p2), z1, z2, None, 1.0, args)
    assert loss.item() == pisco_loss(z1, p2, 1.0).item() == pytest.approx(0.18)
    loss.backward()
    assert z1.grad is None and p2.grad.item() == pytest.approx(0.6)


@pytest.mark.parametrize("projector", ["mlp", "residual", "none"])
def test_pisco_is_the_kl_divergence_of_torch(projector):
    """On the real agent's networks in float64, with both teachers."""
    args, agent = tiny_agent(projector=projector)
    agent = agent.double()
    for p in [*agent.projector.parameters(), *agent.actor.policy.parameters()]:
        nn.init.normal_(p, std=0.2)
    z1, z2 = torch.randn(2, 5, args.feature_dim, dtype=torch.float64)
    projected = {"mlp": agent.projector, "residual": lambda z: z + agent.projector(z), "none": lambda z: z}[projector]

    def policy(features):
        return torch.distributions.Normal(agent.actor.mean(features), 0.3)

    one = torch.distributions.kl_divergence(policy(z1), policy(projected(z2))).sum(-1).mean()
    other = torch.distributions.kl_divergence(policy(z2), policy(projected(z1))).sum(-1).mean()
    args.ssl_teacher = "state"
    torch.testing.assert_close(ssl_loss(agent, z1, z2, None, 0.3, args), one, rtol=1e-12, atol=1e-12)
    args.ssl_teacher, views = "view", torch.cat([z1, z2])
    both = ssl_loss(agent, views, views, None, 0.3, args)
    torch.testing.assert_close(both, (one + other) / 2, rtol=1e-12, atol=1e-12)
    assert one > 0.01 and (abs(one - other) > 1e-3) == (projector != "none")


def test_residual_projector_begins_as_the_identity():
    args, agent = tiny_agent(projector="residual")
    z1, z2 = torch.randn(2, 5, args.feature_dim)
    loss = ssl_loss(agent, z1, z2, None, 1.0, args)
    torch.testing.assert_close(loss, pisco_loss(agent.actor.mean(z1), agent.actor.mean(z2), 1.0), rtol=0, atol=0)
    nn.init.ones_(agent.projector[-1].weight)
    assert ssl_loss(agent, z1, z2, None, 1.0, args) != loss


def test_simsiam_and_info_nce_losses():
    unit = torch.eye(2)
    a, b = unit[:1], torch.tensor([[3.0, 4.0]])
    # cosines of (1, 0) and (3, 4): 3/5; of (0, 1) and (3, 4): 4/5
    assert simsiam_loss(a, b).item() == pytest.approx(-0.6) and simsiam_loss(unit[1:], b).item() == pytest.approx(-0.8)
    # each query picks its key with e / (e + 1)
    assert info_nce_loss(unit, unit).item() == pytest.approx(math.log(1 + math.exp(-1)))


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
def make_replay(tmp_path, rows=40, nstep=3, lengths=(5, 2, 4), terminated=()):
    """Row i holds a frame full of i, the action i / 10 and the reward i; the episodes have these many steps."""
    replay = Replay(tmp_path / "replay.bin", rows, (3, 2, 2), 1, 0)
    for episode, length in enumerate(lengths):
        for step in range(length + 1):
            i = replay.head
            end = step == length and episode in terminated
            replay.add(np.full((3, 2, 2), i, np.uint8), [i / 10], float(i), end)
        replay.end_episode(nstep)
    return replay


def sample(replay, count, nstep=3, gamma=0.5):
    return replay.sample(Args(batch_size=count, nstep=nstep, gamma=gamma, frame_stack=3), CPU)


def test_sampled_rows_never_cross_an_episodes_end(tmp_path):
    replay = make_replay(tmp_path)
    # Rows 0..5 (5 steps), 6..8 (2 steps: too short for 3), 9..13 (4 steps)
    assert replay.episodes == [[0, 5], [9, 4]]
    rows, first = replay.sample_rows(1000, 3)
    assert set(zip(rows.tolist(), first.tolist())) == {(0, 0), (1, 0), (2, 0), (9, 9), (10, 9)}
    # an episode at random, then a step of it: half the samples, shared by three starts and by two
    counts = np.bincount(rows, minlength=11)[[0, 1, 2, 9, 10]] / 1000
    assert counts == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4], abs=0.05)


def test_sample(tmp_path):
    replay = make_replay(tmp_path, terminated=(2,))
    obs, action, reward, discount, next_obs = sample(replay, 200)
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


def test_replay_gives_up_an_episode_when_its_first_row_is_overwritten(tmp_path):
    replay = make_replay(tmp_path, rows=20, nstep=1, lengths=(4,) * 9)
    # 45 rows written: the last 20 are from row 25 on, five to an episode.
    assert replay.head == 45 and replay.episodes == [[25, 4], [30, 4], [35, 4], [40, 4]]
    replay.add(np.zeros((3, 2, 2), np.uint8))
    assert replay.episodes == [[30, 4], [35, 4], [40, 4]]
    obs, *_ = sample(replay, 200, nstep=1)
    assert set(obs[:, 6, 0, 0].tolist()) == {first + step for first in (30, 35, 40) for step in range(4)}


def test_an_episode_longer_than_the_ring_is_never_sampled(tmp_path):
    assert make_replay(tmp_path, rows=20, lengths=(19,)).episodes == [[0, 19]]
    (tmp_path / "replay.bin").unlink()
    assert make_replay(tmp_path, rows=20, lengths=(20,)).episodes == []


def test_replay_goes_on_with_the_same_samples(tmp_path):
    replay = make_replay(tmp_path)
    state = replay.get_state()
    wanted = [sample(replay, 8) for _ in range(3)]
    again = Replay(tmp_path / "replay.bin", 40, (3, 2, 2), 1, 99)
    again.set_state(state)
    for batch in wanted:
        for a, b in zip(batch, sample(again, 8)):
            assert torch.equal(a, b)


def test_ring_where_the_file_system_cannot_allocate(tmp_path, monkeypatch):
    """As glibc's fall-back does it: it reads a byte of every block and writes one where there is nothing yet."""

    def fallocate(fd, offset, length):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND:
            raise OSError(errno.EBADF, "Bad file descriptor")
        size = os.fstat(fd).st_size
        for place in [*range(offset, offset + length - 1, 4096), offset + length - 1]:
            if place >= size or os.pread(fd, 1, place) == b"\0":
                os.pwrite(fd, b"\0", place)

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    for images in (2, 0):  # the second time it is there
        replay = Replay(tmp_path / "replay.bin", 5, (1, 70, 70), 2, seed=0)
        for value in range(images):
            replay.add(np.full((1, 70, 70), 7 + value, np.uint8))
        assert replay.data["image"][:2].mean(axis=(1, 2, 3)).tolist() == [7, 8] and len(replay.data) == 5


def test_images_are_gathered_where_the_device_fetches_them(tmp_path, monkeypatch):
    """On a GPU machine: in pinned memory from the start, with no copy on the way."""
    replay = make_replay(tmp_path)
    asked, real = [], torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pytest.fail("a copy"))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *size, pin_memory: asked.append(pin_memory) or real(self, *size)
    )
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: self)
    args = Args(batch_size=4, nstep=1, frame_stack=2)
    for device in ("cpu", "cuda"):
        replay.sample(args, torch.device(device))
    assert asked == [False] * 2 + [True] * 2


def test_replay_has_its_whole_file_from_the_start(tmp_path):
    """And one image to a row: a third of what stacks of three would need, plus less than 1%."""
    replay = Replay(tmp_path / "replay.bin", 100, (3, 84, 84), 6, 0)
    status = (tmp_path / "replay.bin").stat()
    assert status.st_size == replay.data.nbytes and status.st_blocks * 512 >= status.st_size  # no holes
    assert replay.data.nbytes / 100 < 1.01 * 3 * 84 * 84


class Deadly:
    """An action at which adding a row dies half-way."""

    def __array__(self, *args, **kwargs):
        raise Killed


class Life:
    """A replay beside a plain list of its rows, through any number of kills.

    A row's image is its own number, counted over all that were ever written: what a killed run wrote after its
    checkpoint, and what the run that went on wrote in its place, differ.
    """

    def __init__(self, path, rng, kills):
        self.path, self.rng, self.kills = path, rng, kills
        self.size, self.nstep = int(rng.integers(20, 60)), int(rng.integers(1, 4))
        self.args = Args(batch_size=16, nstep=self.nstep, gamma=0.5, frame_stack=3)
        self.replay = Replay(path, self.size, (1, 2, 2), 1, 7)
        self.rows, self.episodes, self.count, self.saved, self.checks = [], [], 0, None, 0

    def add(self, first, last=False, deadly=False):
        self.count += 1
        image = np.array([self.count], np.uint32).view(np.uint8).reshape(1, 2, 2)
        row = (self.count, self.rng.random(dtype=np.float32), float(self.rng.integers(10)), last, first)
        if deadly:
            with pytest.raises(Killed):
                self.replay.add(image, Deadly(), row[2], row[3])
            assert self.replay.data["index"][self.replay.head % self.size] != self.replay.head  # torn
            return
        self.replay.add(image, row[1], row[2], row[3])
        self.rows.append(row)

    def play_episode(self):
        first, steps, terminated = len(self.rows), int(self.rng.integers(1, 13)), self.rng.random() < 0.3
        for step in range(steps + 1):
            self.add(first, last=terminated and step == steps)
            self.check()
            if self.kills and self.saved and self.rng.random() < 0.01:
                return self.kill(first)
        self.replay.end_episode(self.nstep)
        self.episodes.append([first, steps])
        if self.rng.random() < 0.2:
            self.saved = copy.deepcopy(self.replay.get_state()), len(self.rows), len(self.episodes)

    def kill(self, first):
        if self.rng.random() < 0.5:
            self.add(first, deadly=True)
        state, rows, episodes = self.saved
        self.rows, self.episodes = self.rows[:rows], self.episodes[:episodes]
        self.replay = Replay(self.path, self.size, (1, 2, 2), 1, 8)
        self.replay.set_state(copy.deepcopy(state))

    def check(self):
        """What is sampled is what the plain list has, all of it in one finished episode."""
        replay = self.replay
        assert replay.head == len(self.rows)
        for episode in replay.episodes:
            assert episode in self.episodes and episode[0] >= replay.head - self.size and episode[1] >= self.nstep
        if not self.kills:  # all that can be sampled is
            wanted = [[i, n] for i, n in self.episodes if n >= self.nstep and i >= replay.head - self.size]
            assert replay.episodes == wanted
        if not replay.episodes:
            return
        self.checks += 1
        before = replay.generator.bit_generator.state
        rows, _ = replay.sample_rows(16, self.nstep)
        replay.generator.bit_generator.state = before
        obs, action, reward, discount, next_obs = replay.sample(self.args, CPU)
        for batch, offset in ((obs, 0), (next_obs, self.nstep)):
            numbers = batch.contiguous().numpy().reshape(16, 3, 4).view(np.uint32)[..., 0]  # (B, stack)
            for row, stack in zip(rows, numbers):
                first = self.rows[row][4]
                wanted = [self.rows[max(row + offset - k, first)][0] for k in (2, 1, 0)]
                assert stack.tolist() == wanted
        for i, row in enumerate(rows):
            steps = self.rows[row + 1 : row + 1 + self.nstep]
            assert {step[4] for step in steps} == {self.rows[row][4]}  # of one episode
            assert action[i].item() == steps[0][1]
            assert reward[i].item() == sum(step[2] / 2**k for k, step in enumerate(steps))
            assert discount[i].item() == (0.0 if any(step[3] for step in steps) else 0.5**self.nstep)


@pytest.mark.parametrize("kills", [False, True], ids=["undisturbed", "killed"])
@pytest.mark.parametrize("seed", range(8))
def test_ring_against_a_plain_list(tmp_path, seed, kills):
    """Episodes of random lengths go many times round the ring; a kill comes at any row, or in the middle of one, and
    more than one may come before the next checkpoint."""
    life = Life(tmp_path / "replay.bin", np.random.default_rng(seed), kills)
    for _ in range(60):
        life.play_episode()
    assert life.checks > 100 and life.count > 5 * life.size


def test_a_run_killed_more_than_a_round_after_its_checkpoint(tmp_path):
    """It has overwritten everything: nothing is left to sample until the run that goes on has an episode of its own."""
    replay = make_replay(tmp_path, rows=20, nstep=1, lengths=(4,) * 4)
    state = copy.deepcopy(replay.get_state())  # as a checkpoint has it
    for _ in range(23):
        replay.add(np.full((3, 2, 2), 99, np.uint8))
    again = Replay(tmp_path / "replay.bin", 20, (3, 2, 2), 1, 0)
    again.set_state(state)
    assert again.head == 20 and again.episodes == []
    for i in range(5):
        again.add(np.full((3, 2, 2), i, np.uint8))
    again.end_episode(1)
    assert again.episodes == [[20, 4]] and sample(again, 50, nstep=1)[4][:, 6:].max() == 4


def test_a_torn_row_hides_nothing_that_was_overwritten_after_it(tmp_path):
    """A run is killed; the one that goes on from its checkpoint dies in the middle of an earlier row. What the first
    one has overwritten beyond that row must not come back."""
    replay = make_replay(tmp_path, rows=20, nstep=1, lengths=(4,) * 4)  # rows 0..19: the ring is full
    state = copy.deepcopy(replay.get_state())  # as a checkpoint has it
    image = np.full((3, 2, 2), 99, np.uint8)
    for _ in range(8):  # overwrites the first episode and three rows of the second
        replay.add(image)
    again = Replay(tmp_path / "replay.bin", 20, (3, 2, 2), 1, 0)
    again.set_state(copy.deepcopy(state))
    again.add(image)
    with pytest.raises(Killed):
        again.add(image, Deadly())
    third = Replay(tmp_path / "replay.bin", 20, (3, 2, 2), 1, 0)
    third.set_state(state)
    assert third.episodes == [[10, 4], [15, 4]]
    obs, *_ = sample(third, 100, nstep=1)
    assert obs.max() < 20


# --- Networks --------------------------------------------------------------------------------------------------------
def test_map_linear_is_a_linear_layer_of_the_flattened_map():
    maps = torch.randn(5, 4, 3, 2).to(memory_format=torch.channels_last)
    linear = MapLinear((4, 3, 2), 7)
    wanted = torch.nn.functional.linear(maps.flatten(1), linear.weight, linear.bias)
    torch.testing.assert_close(linear(maps), wanted)
    torch.testing.assert_close(linear(maps.contiguous()), wanted)
    torch.testing.assert_close(linear(maps[:1]), wanted[:1])


def tiny_encoder(freeze=0, **flags):
    encoder = Encoder(Args(**flags), (9, 24, 24))
    encoder.freeze(freeze)
    return encoder


def tiny_agent(freeze=0, **flags):
    flags = {"projector": "mlp"} | flags
    args = Args(feature_dim=8, hidden_dim=16, projector_dim=8, image_size=24, ssl_fraction=1.0, **flags)
    torch.manual_seed(0)
    return args, Agent(args, tiny_encoder(freeze), 2)


def tiny_batch(n=6):
    images = torch.randint(0, 256, (2, n, 9, 24, 24), dtype=torch.uint8)
    return images[0], torch.rand(n, 2), torch.rand(n, 1), torch.full((n, 1), 0.97), images[1]


def test_shapes_of_the_official_network():
    agent = Agent(Args(), Encoder(Args(), (9, 84, 84)), 6)
    assert agent.encoder.map_shape == (32, 35, 35)
    assert sum(p.numel() for p in agent.encoder.parameters()) == 32 * (9 * 9 + 1) + 3 * 32 * (32 * 9 + 1)
    assert agent.actor.trunk[0].weight.shape == (50, 39200)
    maps = agent.encoder(torch.zeros(2, 9, 84, 84, dtype=torch.uint8))
    assert maps.shape == (2, 32, 35, 35) and maps.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [0, 2])
def test_bf16_rounds_inside_the_encoder_alone(count):
    torch.manual_seed(0)
    encoder, rounded = tiny_encoder(count), tiny_encoder(count, bf16=True)
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
    for exact, coarse in zip(encoder.layers[count:].parameters(), rounded.layers[count:].parameters()):
        assert coarse.grad.dtype == torch.float32
        assert 0 < (exact.grad - coarse.grad).norm() / exact.grad.norm() < 0.05


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
        projected = lambda z: agent.projector(z) + (z if args.projector == "residual" else 0)  # noqa: E731
        p1, p2 = (agent.projector(z) if args.ssl == "curl" else projected(z) for z in (z1, z2))
        one_way = args.ssl_teacher == "state"
        if args.ssl == "pisco":
            normal = lambda z: torch.distributions.Normal(policy(z), args.pisco_std)  # noqa: E731
            sg = lambda z: torch.distributions.Normal(policy(z).detach(), args.pisco_std)  # noqa: E731
            kl = lambda z, p: torch.distributions.kl_divergence(sg(z), normal(p)).sum(1).mean()  # noqa: E731
            loss = kl(z1, p2) if one_way else kl(z1, p2) / 2 + kl(z2, p1) / 2
        elif args.ssl == "simsiam":
            cosine = lambda z, p: F.cosine_similarity(z.detach(), p).mean()  # noqa: E731
            loss = -cosine(z1, p2) if one_way else -cosine(z1, p2) / 2 - cosine(z2, p1) / 2
        else:
            keys, key_trunk = agent.key_encoder
            k1, k2 = (trunk(key_trunk, encode(images, keys.layers)).detach() for images in (obs[:b], views[2]))
            match = lambda p, k: -(p @ k.T).log_softmax(1).diagonal().mean()  # noqa: E731
            loss = match(p2, k1) if one_way else match(p1, k2) / 2 + match(p2, k1) / 2
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


@pytest.mark.parametrize("teacher, projector", [("state", "none"), ("state", "residual"), ("view", "mlp")])
@pytest.mark.parametrize("ssl", ["none", "pisco", "simsiam", "curl"])
def test_update_is_that_of_the_textbook(monkeypatch, ssl, teacher, projector):
    own = {"ssl": ssl, "ssl_teacher": teacher, "projector": projector}
    args, agent = tiny_agent(tau=0.25, curl_tau=0.25, pisco_std=0.5, ssl_coef=0.7, **own)
    if projector == "residual" and ssl in ("pisco", "simsiam"):
        nn.init.normal_(agent.projector[-1].weight, std=0.2)
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
    stats = update(agent, *make_optimizers(agent, 1e-3), batch, 0.4, args)
    for name, loss in losses.items():
        assert stats[name].item() == pytest.approx(loss.item(), rel=1e-4), name
    for (name, ours), theirs in zip(agent.named_parameters(), wanted.parameters()):
        # Adam's first step is the gradient's sign times 1e-3: where a gradient is next to zero, rounding decides.
        assert ((ours - theirs).abs() < 2e-5).float().mean() > 0.99, name


@pytest.mark.parametrize("ssl", ["pisco", "simsiam", "curl", "none"])
@pytest.mark.parametrize("teacher", ["state", "view"])
def test_gradient_share_and_view_distance_by_hand(monkeypatch, ssl, teacher):
    """The share is that of two backward passes; neither number leaves a trace in the training."""
    args, agent = tiny_agent(ssl=ssl, ssl_teacher=teacher, ssl_coef=3.0)
    batch, once, before = tiny_batch(), {}, copy.deepcopy(agent)
    other = copy.deepcopy(agent)
    torch.manual_seed(3)
    update(agent, *make_optimizers(agent, 1e-3), batch, 0.4, args, once)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    update(other, *make_optimizers(other, 1e-3), batch, 0.4, args)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(one, two) for one, two in zip(agent.state_dict().values(), other.state_dict().values()))

    torch.manual_seed(3)  # the same views and noise
    obs, action, reward, discount, next_obs = batch
    views, next_obs = (drqv2_pisco.augment(images, args) for images in (obs, next_obs))
    if ssl != "none":
        views = torch.cat([views, drqv2_pisco.augment(obs, args)])
    rng = torch.get_rng_state()

    def gradient(views, changed):
        torch.set_rng_state(rng)
        columns = (action, reward, discount, next_obs, torch.tensor(0.4), changed)
        loss, ssl_loss, *_ = critic_ssl_loss(before, views, *columns)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss + ssl_loss, list(before.encoder.parameters()))])

    if ssl == "none":
        assert set(once) == {"view_distance"}
    else:
        rl, both = gradient(views[:6], dataclasses.replace(args, ssl="none")), gradient(views, args)
        assert once["ssl_grad_share"].item() == pytest.approx(((both - rl).norm() / rl.norm()).item(), rel=1e-3)
        assert once["ssl_grad_share"] > 0
    with torch.no_grad():
        torch.set_rng_state(rng)
        torch.randn(6, 2)  # the target's action
        mu, view_mu = (before.actor(before.encoder(x)) for x in (obs, drqv2_pisco.augment(obs, args)))
    distances = [once["view_distance"].item(), (mu - view_mu).abs().mean().item()]
    assert distances[0] == pytest.approx(distances[1], rel=1e-4) and distances[0] > 0


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
    stats = update(agent, *optimizers, batch, 0.4, args)
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
    update(agent, *make_optimizers(agent, 1e-2), tiny_batch(), 0.4, args)
    for before, target, critic in zip(start, agent.critic_target.parameters(), agent.critic.parameters()):
        torch.testing.assert_close(target, before + 0.25 * (critic - before))


@pytest.mark.parametrize("tau", [0.0, 0.25, 1.0])
def test_curl_key_encoder_follows(tau):
    args, agent = tiny_agent(ssl="curl", curl_tau=tau)
    start = [p.clone() for p in agent.key_encoder.parameters()]
    update(agent, *make_optimizers(agent, 1e-2), tiny_batch(), 0.4, args)
    followed = [*agent.encoder.parameters(), *agent.actor.trunk.parameters()]
    for before, key, query in zip(start, agent.key_encoder.parameters(), followed):
        torch.testing.assert_close(key, before + tau * (query - before))


def test_actor_loss_leaves_the_critics_and_the_encoder_alone(monkeypatch):
    """Where the critics have no loss, nothing reaches them and the encoder: the actor's loss is its own affair."""

    def without(*args):
        loss, *rest = critic_ssl_loss(*args)
        return 0.0 * loss, *rest

    monkeypatch.setattr(drqv2_pisco, "critic_ssl_loss", without)
    found, stats = gradients(monkeypatch, ssl="none")
    assert math.isfinite(stats["actor_loss"])
    for name, gradient in found.items():
        assert (gradient.abs().sum() > 0) == name.startswith("actor"), name


@pytest.mark.parametrize("count", range(5))
def test_frozen_layers_get_no_gradient_and_do_not_move(count):
    args, agent = tiny_agent(count, ssl="pisco")
    before = {name: p.clone() for name, p in agent.named_parameters()}
    optimizers = make_optimizers(agent, 1e-2)
    stats = update(agent, *optimizers, tiny_batch(), 0.4, args)
    assert (stats["grad_norm_encoder"] > 0) == (count < 4)
    frozen = tuple(f"encoder.layers.{i}." for i in range(count))
    for name, parameter in agent.named_parameters():
        is_frozen = name.startswith(frozen) if frozen else False
        assert torch.equal(parameter, before[name]) == is_frozen, name
        if is_frozen:
            assert parameter.grad is None and not parameter.requires_grad
    assert len(optimizers[0].param_groups[0]["params"]) == 2 * (4 - count) + 16


def test_frozen_layers_build_no_graph():
    images, inputs = tiny_batch(2)[0], []
    for count, expected in ((0, [0, 1, 1, 1]), (2, [0, 0, 0, 1]), ("all", [0, 0, 0, 0])):
        encoder = tiny_encoder(count)
        for layer in encoder.layers:
            layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].requires_grad))
        inputs.clear()
        maps = encoder(images)
        assert inputs == [bool(flag) for flag in expected] and encoder.frozen == (4 if count == "all" else count)
        assert maps.requires_grad == (count != "all")
        hidden = encoder.frozen_prefix(images)
        assert not hidden.requires_grad
        torch.testing.assert_close(encoder.trained_suffix(hidden), maps)
        plain = nn.Sequential(*copy.deepcopy(encoder.layers))(images / 255 - 0.5)
        torch.testing.assert_close(maps, plain, rtol=1e-4, atol=1e-5)


def test_curl_keys_start_as_the_queries():
    _, agent = tiny_agent(ssl="curl")
    for key, query in zip(
        agent.key_encoder.parameters(), [*agent.encoder.parameters(), *agent.actor.trunk.parameters()]
    ):
        assert torch.equal(key, query) and not key.requires_grad


# --- Statistics ------------------------------------------------------------------------------------------------------
def test_mean_statistics():
    history = [{"a": torch.tensor(1.0), "b": torch.tensor(4.0)}, {"a": torch.tensor(2.0), "b": torch.tensor(-4.0)}]
    assert mean_statistics(history) == {"a": 1.5, "b": 0.0} and mean_statistics([]) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_statistics_that_are_not_finite(value):
    history = [{"a": torch.tensor(1.0)}, {"a": torch.tensor(value)}, {"a": torch.tensor(1.0)}]
    with pytest.raises(SystemExit, match="--learning-rate"):
        mean_statistics(history)


# --- Compiled --------------------------------------------------------------------------------------------------------
def test_compiled_losses_are_the_same_and_are_compiled_once():
    """Three updates with another standard deviation each: the first one compiles, the others must not."""
    batches, history = [tiny_batch(4) for _ in range(3)], []
    for compiled in (False, True):
        args, agent = tiny_agent(ssl="pisco", compile=compiled)
        optimizers, losses = make_optimizers(agent, 1e-3), []
        torch.manual_seed(5)
        for i, batch in enumerate(batches):
            # The same random numbers as without; and an error where anything is compiled once more.
            with (
                torch._inductor.config.patch(fallback_random=True),
                torch._dynamo.config.patch(error_on_recompile=compiled and i > 0),
            ):
                stats = update(agent, *optimizers, batch, 0.5 - 0.1 * i, args)
            losses.append({name: value.item() for name, value in stats.items()})
        history.append(losses)
    for plain, compiled in zip(*history):
        assert compiled == pytest.approx(plain, rel=1e-4, abs=1e-4)
