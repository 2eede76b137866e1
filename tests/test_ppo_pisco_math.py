"""The pure functions of ppo_pisco.py against numbers worked out by hand, and where gradients flow."""

import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ppo_pisco
from ppo_pisco import (
    Agent,
    Args,
    Encoder,
    ImageEnvs,
    augment,
    collect_rollout,
    compute_gae,
    info_nce_loss,
    minibatch_loss,
    pisco_loss,
    ppo_loss,
    random_noise,
    random_shift,
    sample,
    simsiam_loss,
    ssl_loss,
    update,
)  # fmt: skip

# Probabilities (1/2, 1/2), (3/4, 1/4), (1/5, 4/5), (2/3, 1/3) and (1/2, 1/2) again.
HALF, THREE_QUARTERS, FIFTH, TWO_THIRDS = [0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(4)], [math.log(2), 0.0]


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float32, requires_grad=True)


# --- PiSCO -----------------------------------------------------------------------------------------------------------
def stub(*projections):
    """An agent whose features are its logits and whose projector returns these rows, for losses by hand."""
    return SimpleNamespace(actor=nn.Identity(), projector=lambda z: torch.cat(projections))


def both_ways(loss, z1, z2, p1, p2):
    """The loss of two views that teach each other, from their features (or logits) and projections."""
    views = torch.cat([z1, z2])
    return ssl_loss(stub(p1, p2), views, views, None, Args(ssl=loss, ssl_teacher="view", projector="mlp"))


def one_way(loss, z, p):
    """The loss of a view that the state teaches."""
    return ssl_loss(stub(p), z, z * 0, None, Args(ssl=loss, ssl_teacher="state", projector="mlp"))


def test_pisco_value():
    # KL(z1 || p2) = 1/2 ln(1/2 / (2/3)) + 1/2 ln(1/2 / (1/3)) = 1/2 ln(9/8)              = 0.0588915
    # KL(z2 || p1) = 3/4 ln(3/4 / (1/5)) + 1/4 ln(1/4 / (4/5)) = 3/4 ln(15/4) + 1/4 ln(5/16) = 0.7005292
    # Two views: (0.0588915 + 0.7005292) / 2 = 0.3797103; the state alone: KL(z1 || p2)
    z1, z2, p1, p2 = one = [tensor(row) for row in (HALF, THREE_QUARTERS, FIFTH, TWO_THIRDS)]
    assert both_ways("pisco", *one).item() == pytest.approx(0.3797103, abs=1e-6)
    assert pisco_loss(z1, p2).item() == one_way("pisco", z1, p2).item() == pytest.approx(0.0588915, abs=1e-6)
    # Beside a state whose policies all agree, the mean over the batch is half of that.
    z1, z2, p1, p2 = two = [torch.cat([row, tensor(HALF)]) for row in one]
    assert both_ways("pisco", *two).item() == pytest.approx(0.1898552, abs=1e-6)
    assert pisco_loss(z1, p2).item() == one_way("pisco", z1, p2).item() == pytest.approx(0.0294458, abs=1e-6)


def test_pisco_gradient():
    # d KL(z || p) / d p_logits = pi(p) - pi(z), with two views times 1/2 for the two directions:
    # p1: ((1/5, 4/5) - (3/4, 1/4)) / 2 = (-0.275, 0.275); p2: ((2/3, 1/3) - (1/2, 1/2)) / 2 = (1/12, -1/12)
    z1, z2, p1, p2 = tensor(HALF), tensor(THREE_QUARTERS), tensor(FIFTH), tensor(TWO_THIRDS)
    both_ways("pisco", z1, z2, p1, p2).backward()
    assert z1.grad is None and z2.grad is None
    torch.testing.assert_close(p1.grad, torch.tensor([[-0.275, 0.275]]))
    torch.testing.assert_close(p2.grad, torch.tensor([[1 / 12, -1 / 12]]))
    z1, p2 = tensor(HALF), tensor(TWO_THIRDS)
    one_way("pisco", z1, p2).backward()
    assert z1.grad is None
    torch.testing.assert_close(p2.grad, torch.tensor([[1 / 6, -1 / 6]]))


@pytest.mark.parametrize("projector", ["mlp", "residual", "none"])
def test_pisco_is_the_kl_divergence_of_torch(projector):
    """On the real agent's networks in float64, with both teachers."""
    agent = tiny_agent("pisco", projector=projector).double()
    for p in agent.projector.parameters():
        nn.init.normal_(p)
    z1, z2 = torch.randn(2, 5, 8, dtype=torch.float64)
    projected = {"mlp": agent.projector, "residual": lambda z: z + agent.projector(z), "none": lambda z: z}[projector]

    def policy(features):
        return torch.distributions.Categorical(logits=agent.actor(features))

    one = torch.distributions.kl_divergence(policy(z1), policy(projected(z2))).mean()
    other = torch.distributions.kl_divergence(policy(z2), policy(projected(z1))).mean()
    state, view = (Args(ssl_teacher=teacher, projector=projector) for teacher in ("state", "view"))
    views = torch.cat([z1, z2])
    torch.testing.assert_close(ssl_loss(agent, z1, z2, None, state), one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ssl_loss(agent, views, views, None, view), (one + other) / 2, rtol=1e-12, atol=1e-12)
    assert one > 0.1 and abs(one - other) > 1e-3


def test_residual_projector_begins_as_the_identity(ssl="pisco"):
    z1, z2 = torch.randn(2, 5, 8)
    agent, plain = tiny_agent(ssl, projector="residual"), tiny_agent(ssl, projector="none")
    plain.actor.load_state_dict(agent.actor.state_dict())
    losses = [ssl_loss(a, z1, z2, None, Args(ssl=ssl, projector=h)) for a, h in ((agent, "residual"), (plain, "none"))]
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    nn.init.ones_(agent.projector[-1].weight)
    assert ssl_loss(agent, z1, z2, None, Args(ssl=ssl, projector="residual")) != losses[0]


def test_simsiam_has_an_mlp_even_without_a_projector():
    """Without one it collapses."""
    assert isinstance(tiny_agent("pisco", projector="none").projector, nn.Identity)
    assert len(tiny_agent("simsiam", projector="none").projector) == 3


# --- Its alternatives ------------------------------------------------------------------------------------------------
def test_simsiam_value_and_gradient():
    # cos((3, 4), (4, 3)) = 24/25 = 0.96 and cos((1, 0), (3, 4)) = 3/5: loss = -(0.96 + 0.6) / 2 = -0.78
    # d cos(z, p) / dp = z / (|z| |p|) - cos p / |p|^2, each times -1/2:
    # p2: (3, 4)/25 - 0.96 (4, 3)/25 = (-0.0336, 0.0448); p1: (1, 0)/5 - 0.6 (3, 4)/25 = (0.128, -0.096)
    z1, z2, p1, p2 = tensor([3.0, 4.0]), tensor([1.0, 0.0]), tensor([3.0, 4.0]), tensor([4.0, 3.0])
    loss = both_ways("simsiam", z1, z2, p1, p2)
    loss.backward()
    assert loss.item() == pytest.approx(-0.78, abs=1e-6)
    assert simsiam_loss(z1, p2).item() == one_way("simsiam", z1, p2).item() == pytest.approx(-0.96, abs=1e-6)
    assert z1.grad is None and z2.grad is None
    torch.testing.assert_close(p1.grad, torch.tensor([[-0.064, 0.048]]))
    torch.testing.assert_close(p2.grad, torch.tensor([[0.0168, -0.0224]]))


def test_info_nce_value():
    # Similarities: query 1 has 1 to its key and 0 to the other, query 2 has 2 to both.
    # loss = (ln(1 + e^-1) + ln 2) / 2 = (0.3132617 + 0.6931472) / 2 = 0.5032044
    queries, keys = tensor([1.0, 0.0], [0.0, 2.0]), tensor([1.0, 1.0], [0.0, 1.0])
    assert info_nce_loss(keys, queries).item() == pytest.approx(0.5032044, abs=1e-6)
    # With the roles swapped, one of (1, 1) has 1 to its own and 2 to the other, two of (0, 1) has 2 and 0:
    # (ln(1 + e^1) + ln(1 + e^-2)) / 2 = (1.3132617 + 0.1269280) / 2 = 0.7200948
    assert info_nce_loss(queries, keys).item() == pytest.approx(0.7200948, abs=1e-6)


# --- Gradients through an agent --------------------------------------------------------------------------------------
def tiny_encoder(freeze=0, shape=(1, 60, 60), **kwargs):
    encoder = Encoder(Args(feature_dim=8, **kwargs), shape)
    encoder.freeze(freeze)
    return encoder


def tiny_agent(ssl, freeze=0, **kwargs):
    torch.manual_seed(0)
    args = Args(ssl=ssl, feature_dim=8, projector_dim=8, **({"projector": "mlp"} | kwargs))
    agent = Agent(args, tiny_encoder(freeze, **kwargs), 2)
    nn.init.normal_(agent.actor[-1].weight)  # a policy that differs from view to view
    return agent


def random_images(count, shape=(1, 60, 60)):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8)


def two_views(agent, count=5):
    """The views' output of the frozen layers (2B, ...), and their features (B, D) each."""
    hidden = agent.encoder.frozen_prefix(random_images(2 * count))
    return hidden, *agent.encoder.trained_suffix(hidden).chunk(2)


def has_gradient(module):
    return [p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters()]


def learn_from(teacher, agent, hidden, z1, z2, **kwargs):
    """The loss of two views' features (B, D) and frozen_prefix (2B, ...), or of a view that the first one teaches."""
    args = Args(**({"ssl_teacher": teacher, "projector": "mlp"} | kwargs))
    if teacher == "state":
        return ssl_loss(agent, z1, z2, hidden[: len(z1)], args)
    views = torch.cat([z1, z2])
    return ssl_loss(agent, views, views, hidden, args)


@pytest.mark.parametrize("teacher", ["state", "view"])
@pytest.mark.parametrize("ssl", ["pisco", "simsiam", "curl"])
def test_gradient_reaches_what_it_must(ssl, teacher):
    agent = tiny_agent(ssl, freeze=2)
    hidden, z1, z2 = two_views(agent)
    z1.retain_grad(), z2.retain_grad()
    learn_from(teacher, agent, hidden, z1, z2, ssl=ssl).backward()
    assert z2.grad.any() and (z1.grad is None or not z1.grad.any()) == (teacher == "state")
    assert all(has_gradient(agent.encoder.layers[2:]))
    assert all(p.grad is None for p in agent.encoder.layers[:2].parameters())
    assert all(p.grad is None for p in agent.critic.parameters())
    assert all(has_gradient(agent.projector))
    if ssl == "pisco":
        assert all(has_gradient(agent.actor))
    else:  # these compare features: the policy has no part in them
        assert all(p.grad is None for p in agent.actor.parameters())
    if ssl == "curl":
        assert all(p.grad is None and not p.requires_grad for p in agent.key_encoder.parameters())


def test_actor_learns_through_p_alone():
    agent = tiny_agent("pisco")
    hidden, z1, z2 = two_views(agent)
    learn_from("view", agent, hidden, z1, z2).backward()
    with torch.no_grad():  # d loss / dW = 1/2 mean [ (pi(p2) - pi(z1))^T p2 + (pi(p1) - pi(z2))^T p1 ]
        p1, p2 = agent.projector(z1), agent.projector(z2)
        pi_z1, pi_z2, pi_p1, pi_p2 = (agent.actor(x).softmax(-1) for x in (z1, z2, p1, p2))
        expected = ((pi_p2 - pi_z1).T @ p2 + (pi_p1 - pi_z2).T @ p1) / (2 * len(z1))
    torch.testing.assert_close(agent.actor[-1].weight.grad, expected)


def test_without_a_projector_the_student_itself_learns():
    agent = tiny_agent("pisco", projector="none")
    z, z2 = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    loss = ssl_loss(agent, z, z2, None, Args(projector="none"))
    logits, logits2 = agent.actor(z), agent.actor(z2)
    torch.testing.assert_close(loss, pisco_loss(logits, logits2))
    loss.backward()  # d loss / dz2 = mean (pi(z2) - pi(z)) W
    difference = (logits2.softmax(-1) - logits.softmax(-1)).detach()
    torch.testing.assert_close(z2.grad, difference @ agent.actor[-1].weight.detach() / 5)
    assert z.grad is None


def test_curl_pairs_each_projected_query_with_its_key():
    agent = tiny_agent("curl")
    images = random_images(10)
    z1, z2 = agent.encoder(images).chunk(2)
    hidden = agent.encoder.frozen_prefix(images)
    k1, k2 = agent.key_encoder(images).chunk(2)
    q1, q2 = z1 @ agent.projector.weight.T, z2 @ agent.projector.weight.T
    view, state = (learn_from(teacher, agent, hidden, z1, z2, ssl="curl") for teacher in ("view", "state"))
    torch.testing.assert_close(view, (info_nce_loss(k2, q1) + info_nce_loss(k1, q2)) / 2)
    torch.testing.assert_close(state, info_nce_loss(k1, q2))


# --- Networks --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("architecture, layers", [("nature", 4), ("impala", 10)])
def test_encoder_takes_bytes_as_zero_to_one(architecture, layers):
    encoder = tiny_encoder(shape=(3, 60, 60), encoder=architecture)
    white = torch.full((2, 3, 60, 60), 255, dtype=torch.uint8)
    output = encoder(white)
    assert output.shape == (2, 8) and (output >= 0).all() and len(encoder.layers) == layers
    torch.testing.assert_close(output, nn.Sequential(*encoder.layers)(torch.ones(2, 3, 60, 60)))
    assert (white == 255).all()


def test_jump_prior_is_the_untrained_probability_of_jumping():
    zero = torch.zeros(1, 8)
    jump = tiny_agent("pisco", jump_prior=0.1)
    torch.testing.assert_close(jump.actor(zero).softmax(-1), torch.tensor([[0.9, 0.1]]))
    args = Args(jump_prior=0.1, feature_dim=8, env_id="Pong-v5")
    other = Agent(args, tiny_encoder(shape=(4, 84, 84)), 6)
    torch.testing.assert_close(other.actor(zero).softmax(-1), torch.full((1, 6), 1 / 6))


def test_heads_have_the_hidden_layers_asked_for():
    agent, z = tiny_agent("none", head_layers=1, jump_prior=0.1), torch.randn(3, 8)
    for head, outputs in ((agent.actor, 2), (agent.critic, 1)):
        hidden, _, output = head
        assert hidden.weight.shape == (256, 8) and output.weight.shape == (outputs, 256)
        expected = (z @ hidden.weight.T + hidden.bias).clamp(min=0) @ output.weight.T + output.bias
        torch.testing.assert_close(head(z), expected)
    torch.testing.assert_close(agent.actor(torch.zeros(1, 8)).softmax(-1), torch.tensor([[0.9, 0.1]]))
    assert [len(head) for head in (tiny_agent("none").actor, tiny_agent("none").critic)] == [1, 1]


@pytest.mark.parametrize("architecture", ["nature", "impala"])
def test_features_begin_small(architecture):
    """With orthogonal weights in impala's residual blocks they are above 5, and PPO unlearns values of 2 to 10."""
    z = Encoder(Args(encoder=architecture), (3, 64, 64))(random_images(8, (3, 64, 64)))
    assert 0.01 < z.square().mean().sqrt() < 1


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("architecture", ["nature", "impala"])
def test_bf16_rounds_inside_the_encoder_alone(architecture, count):
    torch.manual_seed(0)
    encoder = tiny_encoder(count, encoder=architecture)
    rounded = tiny_encoder(count, encoder=architecture, bf16=True)
    rounded.load_state_dict(encoder.state_dict())
    images, inside = random_images(300), []
    for layer in rounded.layers:
        layer.register_forward_hook(lambda module, args, output: inside.append(output.dtype))
    z, z_rounded = encoder(images), rounded(images)
    z.sum().backward()
    z_rounded.sum().backward()
    assert set(inside) == {torch.bfloat16} and z_rounded.dtype == torch.float32
    # bfloat16 has eight significant bits: a rounding is off by 2**-9 at most, and impala rounds in ten layers
    assert 0 < (z - z_rounded).norm() / z.norm() < (0.02 if architecture == "nature" else 0.04)
    for exact, coarse in zip(encoder.layers[count:].parameters(), rounded.layers[count:].parameters()):
        assert coarse.grad.dtype == torch.float32
        # processors that know no AVX-512 round the sums of a weight's gradient too: 0.07 was seen there, 0.03 elsewhere
        assert 0 < (exact.grad - coarse.grad).norm() / exact.grad.norm() < 0.15
    assert all(p.grad is None for p in rounded.layers[:count].parameters())


# --- Freezing --------------------------------------------------------------------------------------------------------
def test_frozen_layers_build_no_graph():
    images, inputs = random_images(2), []
    for count, expected in ((0, [0, 1, 1, 1]), (2, [0, 0, 0, 1]), ("all", [0, 0, 0, 0])):
        encoder = tiny_encoder(count)
        for layer in encoder.layers:
            layer.register_forward_hook(lambda module, args, output: inputs.append(args[0].requires_grad))
        inputs.clear()
        output = encoder(images)
        frozen = 4 if count == "all" else count
        assert inputs == [bool(flag) for flag in expected] and encoder.frozen == frozen
        assert output.requires_grad == (frozen < 4)
        assert [p.requires_grad for p in encoder.parameters()] == [False] * 2 * frozen + [True] * 2 * (4 - frozen)


def test_frozen_layers_take_large_batches_in_pieces():
    torch.manual_seed(0)
    encoder, sizes = tiny_encoder(2), []
    encoder.layers[0].register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    images = random_images(600)
    whole = encoder(images)
    assert sizes == [256, 256, 88]  # what stays in a CPU's cache
    torch.testing.assert_close(whole, torch.cat([encoder(piece) for piece in images.split(100)]))


# --- What the frozen layers have computed once -----------------------------------------------------------------------
def loss_and_gradients(agent, obs, hidden, args):
    torch.manual_seed(3)  # the same views
    count = len(obs if hidden is None else hidden)
    columns = [torch.randint(0, 2, (count,)), *torch.randn(4, count)]
    agent.zero_grad()
    loss, *_ = minibatch_loss(agent, obs, hidden, *columns, args)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in agent.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("count", [0, 2, "all"])
@pytest.mark.parametrize("architecture", ["nature", "impala"])
def test_loss_from_stored_activations_is_that_of_the_images(architecture, count, bf16):
    obs = random_images(6)
    for ssl, teacher in (("pisco", "state"), ("pisco", "view"), ("curl", "state"), ("curl", "view"), ("none", "state")):
        agent = tiny_agent(ssl, count, encoder=architecture, bf16=bf16)
        args = Args(ssl=ssl, norm_adv=False, ent_coef=0.1, ssl_teacher=teacher, projector="mlp")
        hidden = agent.encoder.frozen_prefix(obs)
        assert hidden.dtype == (torch.bfloat16 if bf16 and count else torch.float32) and not hidden.requires_grad
        # Without views nobody needs the images.
        loss, gradients = loss_and_gradients(agent, None if ssl == "none" else obs, hidden, args)
        expected, wanted = loss_and_gradients(agent, obs, None, args)
        torch.testing.assert_close(loss, expected, rtol=0.01 if bf16 else 1e-5, atol=1e-6)
        assert gradients.keys() == wanted.keys() and "actor.0.weight" in gradients
        for name, gradient in gradients.items():
            assert (gradient - wanted[name]).norm() <= (0.02 if bf16 else 1e-4) * wanted[name].norm(), name
            assert gradient.any()
        reached = any(name.startswith("encoder.") for name in gradients)
        assert reached == (count != "all")


@pytest.mark.parametrize("teacher, views", [("state", 1), ("view", 2)])
@pytest.mark.parametrize("count, bf16, shape", [(2, False, (6, 6, 64)), (2, True, (6, 6, 64)), ("all", True, (8,))])
def test_frozen_layers_see_each_observation_once(monkeypatch, count, bf16, shape, teacher, views):
    """The rollout stores what they made of it, and every epoch starts from there: only the views go through them."""
    agent = tiny_agent("curl", count, bf16=bf16)
    args = Args(ssl="curl", num_envs=3, num_steps=8, num_minibatches=2, update_epochs=2, jump_tasks="14:5",
        ssl_teacher=teacher, ssl_fraction=0.5)  # fmt: skip
    envs, passes, minibatches = ImageEnvs(args, 3), [], []
    real_prefix, real_loss = Encoder.frozen_prefix, minibatch_loss

    def spy_on_prefix(encoder, obs):
        passes.append((encoder is agent.encoder, len(obs)))
        return real_prefix(encoder, obs)

    def spy_on_loss(agent, obs, hidden, *columns_and_args):
        minibatches.append((obs, hidden))
        return real_loss(agent, obs, hidden, *columns_and_args)

    monkeypatch.setattr(Encoder, "frozen_prefix", spy_on_prefix)
    monkeypatch.setattr(ppo_pisco, "minibatch_loss", spy_on_loss)
    rollout, _, next_value, _ = collect_rollout(agent, envs, torch.from_numpy(envs.reset()), args)
    assert passes == [(True, 3)] * 9  # eight steps, and the observation after them
    assert rollout.hidden.shape == (8, 3, *shape)
    assert rollout.hidden.dtype == (torch.bfloat16 if bf16 else torch.float32)
    passes.clear()
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad])
    update(agent, optimizer, rollout, next_value, args)
    # The views of half of the 12 rows; curl's keys start from the same. Then, for their agreement, all and its views.
    assert passes == [(True, views * 6)] * 4 + [(True, 12)] * 2
    assert len(minibatches) == 4
    for obs, hidden in minibatches:  # each image with its own
        expected = real_prefix(agent.encoder, obs)
        torch.testing.assert_close(hidden, expected, rtol=0.02 if bf16 else 1e-4, atol=0.02 if bf16 else 1e-5)
        assert hidden.dtype == expected.dtype and hidden.std() > 0


def test_nothing_is_stored_where_nothing_is_frozen(monkeypatch):
    agent, rows = tiny_agent("pisco"), []
    args = Args(num_envs=3, num_steps=8, num_minibatches=2, update_epochs=1, ssl_fraction=0.5)
    envs, real_prefix = ImageEnvs(args, 3), Encoder.frozen_prefix
    rollout, _, next_value, _ = collect_rollout(agent, envs, torch.from_numpy(envs.reset()), args)
    assert not hasattr(rollout, "hidden")
    monkeypatch.setattr(Encoder, "frozen_prefix", lambda self, obs: rows.append(len(obs)) or real_prefix(self, obs))
    update(agent, torch.optim.Adam(agent.parameters()), rollout, next_value, args)
    assert rows == [12 + 6] * 2 + [12] * 2


@pytest.mark.parametrize("teacher", ["state", "view"])
@pytest.mark.parametrize("count", [0, 2])
def test_curl_keys_from_the_shared_layers_are_those_of_the_images(monkeypatch, count, teacher):
    agent, views, keys = tiny_agent("curl", count), [], []
    with torch.no_grad():  # the key encoder lags behind in the layers that are trained
        for p in agent.key_encoder.layers[count:].parameters():
            p.add_(0.05 * torch.randn_like(p))

    def spy_on_augment(images, args):
        views.append(augment(images, args))
        return views[-1]

    def spy_on_nce(key, queries):
        keys.append(key)
        return info_nce_loss(key, queries)

    monkeypatch.setattr(ppo_pisco, "augment", spy_on_augment)
    monkeypatch.setattr(ppo_pisco, "info_nce_loss", spy_on_nce)
    obs = random_images(6)
    args = Args(ssl="curl", ssl_teacher=teacher, ssl_fraction=0.5)
    loss_and_gradients(agent, obs, agent.encoder.frozen_prefix(obs) if count else None, args)
    images = [obs[:3]] if teacher == "state" else views  # half of the minibatch
    assert len(views) == (1 if teacher == "state" else 2) and not torch.equal(views[0], views[-1]) == (len(views) == 2)
    assert len(keys) == len(images)
    for key, image in zip(keys, images):
        torch.testing.assert_close(key, agent.key_encoder(image))
        assert not torch.allclose(key, agent.encoder(image)) and not key.requires_grad


# --- GAE -------------------------------------------------------------------------------------------------------------
def test_gae_by_hand():
    # gamma = lambda = 1/2, so gamma lambda = 1/4. Five copies with the same numbers; step 2 only resets where step 1
    # ended an episode.
    #   delta_0 = 1 + 2/2 - 1 = 1        delta_1 = 4 + 3/2 - 2 = 3.5, terminated: 4 - 2 = 2
    #   delta_2 = 0 + 4/2 - 3 = -1       delta_3 = 3 + 5/2 - 4 = 1.5, terminated: 3 - 4 = -1
    # goes on:           A3 = 1.5, A2 = -1 + 1.5/4 = -0.625, A1 = 3.5 - 0.625/4 = 3.34375,
    #                    A0 = 1 + 3.34375/4 = 1.8359375
    # step 1 terminated: A1 = 2, A0 = 1 + 2/4 = 1.5
    # step 1 truncated:  A1 = 3.5 (bootstraps from V = 3, and nothing of the reset follows), A0 = 1 + 3.5/4 = 1.875
    # step 3 terminated: A3 = -1, A2 = -1 - 1/4 = -1.25, A1 = 3.5 - 1.25/4 = 3.1875, A0 = 1 + 3.1875/4 = 1.796875
    # step 3 truncated:  as if it went on, bootstrapping from next_value
    rewards = torch.tensor([1.0, 4.0, 0.0, 3.0])[:, None].repeat(1, 5)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].repeat(1, 5)
    terminated, truncated = torch.zeros(4, 5, dtype=torch.bool), torch.zeros(4, 5, dtype=torch.bool)
    terminated[1, 1] = truncated[1, 2] = terminated[3, 3] = truncated[3, 4] = True
    advantages, returns = compute_gae(rewards, values, torch.full((5,), 5.0), terminated, truncated, 0.5, 0.5)
    on, no = [1.8359375, 3.34375, -0.625, 1.5], [-0.625, 1.5]
    expected = torch.tensor([on, [1.5, 2.0, *no], [1.875, 3.5, *no], [1.796875, 3.1875, -1.25, -1.0], on]).T
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values)


# --- PPO -------------------------------------------------------------------------------------------------------------
def ppo_by_hand(**changes):
    # Ratios: (1/2) / (1/4) = 2 twice, (1/4) / (1/2) = 1/2 twice.
    logits = torch.tensor([HALF, HALF, THREE_QUARTERS, THREE_QUARTERS])
    actions, advantages = torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    logprobs = torch.tensor([0.25, 0.25, 0.5, 0.5]).log()
    newvalue, values = torch.tensor([1.0, 0.1, 1.0, -1.0]), torch.tensor([0.5, 0.0, 0.0, 0.5])
    returns = torch.tensor([2.0, 2.0, 0.0, 0.0])
    args = Args(**({"norm_adv": False, "clip_coef": 0.2, "ent_coef": 0.1, "vf_coef": 0.5} | changes))
    loss, stats = ppo_loss(logits, newvalue, actions, logprobs, advantages, returns, values, args)
    return {"loss": loss.item(), **{name: value.item() for name, value in stats.items()}}


def test_ppo_loss_by_hand():
    # policy: -min(2, 1.2) = -1.2; max(2, 1.2) = 2; -min(0.5, 0.8) = -0.5; max(0.5, 0.8) = 0.8: mean 1.1 / 4 = 0.275
    # value: clipped to 0.7: max((1 - 2)^2, (0.7 - 2)^2) = 1.69; not clipped: (0.1 - 2)^2 = 3.61;
    #        clipped to 0.2: max(1^2, 0.2^2) = 1; clipped to 0.3: max((-1)^2, 0.3^2) = 1: mean 7.3 / 4 / 2 = 0.9125
    # entropy: ln 2 = 0.6931472 twice, 3/4 ln(4/3) + 1/4 ln 4 = 0.5623351 twice: mean 0.6277412
    # loss = 0.275 - 0.1 * 0.6277412 + 0.5 * 0.9125 = 0.6684759
    # approx_kl = mean(ratio - 1 - ln ratio) = (2 (1 - ln 2) + 2 (-1/2 + ln 2)) / 4 = 0.25, old: the logs cancel
    expected = {
        "loss": 0.6684759, "policy_loss": 0.275, "value_loss": 0.9125, "entropy": 0.6277412,
        "old_approx_kl": 0.0, "approx_kl": 0.25, "clipfrac": 1.0,
    }  # fmt: skip
    assert ppo_by_hand() == pytest.approx(expected, abs=1e-6)


def test_ppo_loss_options():
    # Advantages (1, -1, 1, -1) have standard deviation sqrt(4/3): 0.275 / 1.1547005 = 0.2381570
    assert ppo_by_hand(norm_adv=True)["policy_loss"] == pytest.approx(0.2381570, abs=1e-6)
    # Unclipped values: (1 + 3.61 + 1 + 1) / 4 / 2 = 0.82625
    assert ppo_by_hand(clip_vloss=False)["value_loss"] == pytest.approx(0.82625, abs=1e-6)
    # With 1 +- 0.6 the ratio 2 is clipped and 1/2 is not: (-1.6 + 2 - 0.5 + 0.5) / 4 = 0.1
    wide = ppo_by_hand(clip_coef=0.6)
    assert wide["policy_loss"] == pytest.approx(0.1, abs=1e-6) and wide["clipfrac"] == 0.5


def test_minibatch_loss_adds_the_weighted_ssl_loss():
    agent = tiny_agent("pisco")
    obs = random_images(6)
    columns = [torch.randint(0, 2, (6,)), *torch.randn(4, 6)]

    def loss(**changes):
        torch.manual_seed(3)  # the same views
        return minibatch_loss(agent, obs, None, *columns, Args(projector="mlp", **changes))[:2]

    (with_ssl, stats), (without, plain) = loss(ssl_coef=0.5), loss(ssl="none")
    torch.testing.assert_close(with_ssl, without + 0.5 * stats["pisco"])
    assert stats["pisco"] > 0 and "pisco" not in plain
    with torch.no_grad():
        agent.encoder.layers[-1][1].bias[:4] = -1e6  # four of eight features never fire
        agent.encoder.layers[-1][1].bias[4:] = 1e6
    assert loss()[1]["dead_features"] == 0.5


@pytest.mark.parametrize("teacher", ["state", "view"])
@pytest.mark.parametrize("ssl, fraction, rows", [("pisco", 0.5, 4), ("curl", 0.3, 3), ("simsiam", 1.0, 7)])
def test_ssl_loss_sees_its_share_of_the_minibatch(monkeypatch, ssl, fraction, rows, teacher):
    """7 rows: half of them is 3.5, rounded up; 0.3 * 7 = 2.1. The state's features are those that RL's loss uses."""
    agent, seen, obs = tiny_agent(ssl), [], random_images(7)

    def spy(agent, z_teacher, z_student, hidden_teacher, args):
        seen.append((len(hidden_teacher), len(z_teacher), len(z_student)))
        torch.testing.assert_close(z_teacher, agent.encoder.trained_suffix(hidden_teacher))
        is_state = torch.allclose(z_teacher[:rows], agent.encoder(obs[:rows]))
        assert is_state == (teacher == "state") and not torch.allclose(z_student[:rows], agent.encoder(obs[:rows]))
        return ssl_loss(agent, z_teacher, z_student, hidden_teacher, args)

    monkeypatch.setattr(ppo_pisco, "ssl_loss", spy)
    loss_and_gradients(agent, obs, None, Args(ssl=ssl, ssl_fraction=fraction, ssl_teacher=teacher, projector="mlp"))
    assert seen == [(rows, rows, rows) if teacher == "state" else (2 * rows,) * 3]


@pytest.mark.parametrize("ssl", ["pisco", "simsiam", "curl"])
@pytest.mark.parametrize("teacher", ["state", "view"])
@pytest.mark.parametrize("count", [0, 2])
def test_gradient_share_is_that_of_two_backward_passes(monkeypatch, ssl, teacher, count):
    agent = tiny_agent(ssl, count)
    args = Args(ssl=ssl, ssl_teacher=teacher, projector="mlp", ssl_coef=2.0, num_envs=3, num_steps=8,
        num_minibatches=2, update_epochs=1, feature_dim=8)  # fmt: skip
    envs, calls, before = ImageEnvs(args, 3), [], copy.deepcopy(agent)
    rollout, _, next_value, _ = collect_rollout(agent, envs, torch.from_numpy(envs.reset()), args)

    def spy(agent, *columns):
        calls.append((columns, torch.get_rng_state()))
        return minibatch_loss(agent, *columns)

    monkeypatch.setattr(ppo_pisco, "minibatch_loss", spy)
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad])
    share = update(agent, optimizer, rollout, next_value, args)["ssl_grad_share"]
    (*columns, _), rng = calls[0]  # the iteration's first minibatch
    trained = [p for p in before.encoder.parameters() if p.requires_grad]

    def gradient(**changes):
        torch.set_rng_state(rng)  # the same views
        loss, *_ = minibatch_loss(before, *columns, dataclasses.replace(args, **changes))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])

    rl, both = gradient(ssl="none"), gradient()
    assert share == pytest.approx(((both - rl).norm() / rl.norm()).item(), rel=1e-3) and share > 0
    assert len(trained) == 8 - 2 * count


def test_no_gradient_share_where_there_is_none():
    """Without a loss, on no row, and where the whole encoder is frozen; the views' agreement is there all the same."""
    for ssl, count, fraction in (("none", 0, 1.0), ("pisco", "all", 1.0), ("pisco", 0, 0.0)):
        agent = tiny_agent(ssl, count)
        args = Args(ssl=ssl, projector="mlp", num_envs=3, num_steps=8, num_minibatches=2, feature_dim=8)
        args.ssl_fraction = fraction
        envs = ImageEnvs(args, 3)
        rollout, _, next_value, _ = collect_rollout(agent, envs, torch.from_numpy(envs.reset()), args)
        optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad])
        means = update(agent, optimizer, rollout, next_value, args)
        assert "ssl_grad_share" not in means and 0 <= means["view_agreement"] <= 1


def test_view_agreement_compares_the_view_with_the_state(monkeypatch):
    """The greedy action follows a pixel, which the views of four states change."""
    agent = tiny_agent("none")
    monkeypatch.setattr(Agent, "forward", lambda self, obs: (F.one_hot(obs[:, 0, 0, 0].long() % 2), None))
    monkeypatch.setattr(ppo_pisco, "augment", lambda obs, args: obs + (torch.arange(len(obs)) < 4)[:, None, None, None])
    rollout = marked_rollout()
    _, means = run_update(monkeypatch, agent, rollout)
    assert means["view_agreement"] == pytest.approx(2 / 6)  # the last minibatch has six rows


def test_sample_draws_what_multinomial_draws():
    probs = torch.rand(1000, 5).softmax(-1)
    torch.manual_seed(4)
    expected = torch.multinomial(probs, 1).squeeze(1)
    torch.manual_seed(4)
    assert torch.equal(sample(probs), expected)
    shares = torch.bincount(sample(torch.tensor([[0.1, 0.2, 0.7]]).expand(20_000, 3))) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.7]), rtol=0, atol=0.02)


# --- Augmentations ---------------------------------------------------------------------------------------------------
def test_random_shift_is_a_crop_of_the_padded_image():
    torch.manual_seed(0)
    p, image = 2, np.arange(70, dtype=np.uint8).reshape(2, 7, 5)  # every pixel another value
    padded = np.pad(image, ((0, 0), (p, p), (p, p)), mode="edge")
    crops = {padded[:, y : y + 7, x : x + 5].tobytes(): (y, x) for y in range(5) for x in range(5)}
    shifted = random_shift(torch.from_numpy(image).repeat(5000, 1, 1, 1), p)
    assert shifted.shape == (5000, 2, 7, 5) and shifted.dtype == torch.uint8
    counts = np.zeros((5, 5))
    for output in shifted.numpy():
        counts[crops[output.tobytes()]] += 1  # fails for anything that is no crop
    # Both axes independent and uniform: 25 shifts, 200 expected of each, standard deviation 14.
    assert counts.min() > 130 and counts.max() < 270


def test_random_shift_by_nothing_and_of_floats():
    images = torch.rand(3, 1, 6, 6)
    torch.testing.assert_close(random_shift(images, 0), images, rtol=0, atol=0)
    assert random_shift(images, 2).dtype == torch.float32
    flat = torch.full((8, 1, 6, 6), 7, dtype=torch.uint8)
    assert (random_shift(flat, 100) == 7).all()  # the border is replicated, not filled


def test_random_noise():
    torch.manual_seed(0)
    out = random_noise(torch.full((4, 1, 60, 60), 128, dtype=torch.uint8))
    assert out.dtype == torch.uint8
    assert out.float().std().item() == pytest.approx(12.75, abs=0.5)  # 5% of 255
    assert not torch.equal(out[0], out[1])
    assert (random_noise(torch.zeros(4, 1, 60, 60, dtype=torch.uint8)) < 100).all()
    assert (random_noise(torch.full((4, 1, 60, 60), 255, dtype=torch.uint8)) > 155).all()


@pytest.mark.parametrize("kind, keeps_values", [("shift", True), ("noise", False)])
def test_augment_draws_the_kind_asked_for(kind, keeps_values):
    torch.manual_seed(0)
    images = torch.randint(1, 256, (64, 1, 12, 12), dtype=torch.uint8)
    one, two = (augment(images, Args(augmentation=kind, shift_pixels=3)) for _ in range(2))
    assert one.dtype == torch.uint8 and one.shape == images.shape
    assert not torch.equal(one, images) and not torch.equal(one, two)
    known = all(set(a.unique().tolist()) <= set(b.unique().tolist()) for a, b in zip(one, images))
    assert known == keeps_values  # a shift makes no new pixel values


# --- Rollout and update ----------------------------------------------------------------------------------------------
def marked_rollout():
    """Six steps of two copies; the row's number fills every image and column, and rows 3 and 8 are resets."""
    number = torch.arange(12).view(6, 2)
    valid = torch.ones(6, 2, dtype=torch.bool)
    valid.view(-1)[[3, 8]] = False
    return SimpleNamespace(
        obs=number.to(torch.uint8)[..., None, None, None].expand(6, 2, 60, 60, 1).contiguous(), actions=number,
        logprobs=number.float(), values=number.float(), rewards=torch.randn(6, 2), valid=valid,
        terminated=torch.zeros(6, 2, dtype=torch.bool), truncated=torch.zeros(6, 2, dtype=torch.bool),
    )  # fmt: skip


def run_update(monkeypatch, agent, rollout, **changes):
    """Calls update with a loss that only records its rows and reports the call's number as its statistics."""
    args, seen = Args(ssl="none", num_minibatches=2, update_epochs=3, **changes), []
    advantages, returns = compute_gae(
        rollout.rewards, rollout.values, torch.zeros(2), rollout.terminated, rollout.truncated, args.gamma,
        args.gae_lambda,
    )  # fmt: skip

    def record(agent, obs, hidden, actions, logprobs, mb_advantages, mb_returns, values, args):
        assert obs.shape[1:] == (1, 60, 60) and (obs == obs[:, :1, :1, :1]).all()
        rows = obs[:, 0, 0, 0].long()
        assert all(torch.equal(column.long(), rows) for column in (actions, logprobs, values))
        assert torch.equal(mb_advantages, advantages.flatten()[rows])
        assert torch.equal(mb_returns, returns.flatten()[rows])
        seen.append(rows.tolist())
        number = torch.tensor(float(len(seen)))
        return agent.actor[-1].weight.sum(), {"approx_kl": number, "policy_loss": number}, (None, None)

    monkeypatch.setattr(ppo_pisco, "minibatch_loss", record)
    optimizer = torch.optim.SGD([p for p in agent.parameters() if p.requires_grad], lr=1.0)
    return seen, update(agent, optimizer, rollout, torch.zeros(2), args)


def test_update_trains_every_valid_row_and_no_other(monkeypatch):
    agent, rollout = tiny_agent("none"), marked_rollout()
    before = agent.actor[-1].weight.detach().clone()
    seen, means = run_update(monkeypatch, agent, rollout, max_grad_norm=0.5)
    assert [len(rows) for rows in seen] == [6] * 6  # 3 epochs x 2 minibatches, all of one size
    for epoch in range(3):
        rows = seen[2 * epoch] + seen[2 * epoch + 1]
        assert set(rows) == set(range(12)) - {3, 8}  # two of them twice, in place of the two left out
    assert means["policy_loss"] == 3.5  # the mean of 1..6, not the last one
    assert means["grad_norm_trained"] == pytest.approx(4.0)  # 16 ones: the norm before clipping
    # Clipped to norm 0.5, each of the 16 is 0.125; six steps of learning rate 1 take 0.75.
    torch.testing.assert_close(before - agent.actor[-1].weight.detach(), torch.full((2, 8), 0.75))
    assert seen[0] != seen[2]  # another order in each epoch
    _, returns = compute_gae(
        rollout.rewards, rollout.values, torch.zeros(2), rollout.terminated, rollout.truncated, 0.99, 0.95
    )
    y, error = (x.flatten()[rollout.valid.flatten()].numpy() for x in (returns, returns - rollout.values))
    assert means["explained_variance"] == pytest.approx(1 - error.var() / y.var(), abs=1e-5)


def test_update_of_a_rollout_that_is_nearly_all_resets(monkeypatch):
    rollout = marked_rollout()
    rollout.valid[:] = False
    rollout.valid[2, 1] = True
    seen, _ = run_update(monkeypatch, tiny_agent("none"), rollout)
    assert seen == [[5] * 6] * 6


def test_target_kl_ends_the_epochs(monkeypatch):
    agent = tiny_agent("none")
    before = agent.actor[-1].weight.detach().clone()
    seen, _ = run_update(monkeypatch, agent, marked_rollout(), target_kl=3.5, max_grad_norm=1e9)
    assert len(seen) == 4  # the second epoch ends above 3.5, so there is no third
    # Four steps of gradient 1: nothing is carried over from one minibatch to the next.
    torch.testing.assert_close(before - agent.actor[-1].weight.detach(), torch.full((2, 8), 4.0))


@pytest.mark.parametrize("count", [0, 2])
def test_collect_rollout_records_what_the_agent_saw_and_did(count):
    args = Args(num_steps=40, num_envs=3, ssl="none", jump_tasks="20:10", reward_scale=0.5, jump_prior=0.5)
    agent, envs = tiny_agent("none", count), ImageEnvs(args, 3)
    torch.manual_seed(0)
    first = torch.from_numpy(envs.reset())
    rollout, next_obs, next_value, episodes = collect_rollout(agent, envs, first, args)
    assert rollout.obs.shape == (40, 3, 60, 60, 1) and rollout.obs.dtype == torch.uint8
    with torch.no_grad():
        logits, values = agent(rollout.obs.flatten(0, 1).movedim(-1, 1))
        torch.testing.assert_close(rollout.values.flatten(), values)
        expected = logits.log_softmax(-1).gather(1, rollout.actions.view(-1, 1)).squeeze(1)
        torch.testing.assert_close(rollout.logprobs.flatten(), expected)
        torch.testing.assert_close(next_value, agent(next_obs)[1])
    assert torch.equal(rollout.obs[0].movedim(-1, 1), first) and 0 < rollout.actions.float().mean() < 1
    assert set(rollout.rewards.unique().tolist()) == {-0.5, 0.0, 0.5}  # collision, reset, a step; times 0.5
    # The row after a row that ended an episode is invalid, no other is; its reward is 0.
    done = rollout.terminated | rollout.truncated
    assert torch.equal(~rollout.valid[1:], done[:-1]) and rollout.valid[0].all()
    assert (rollout.rewards[~rollout.valid] == 0).all() and len(episodes) == done.sum() > 0
    assert not any(column.requires_grad for column in vars(rollout).values())


def test_collect_rollout_copies_what_the_environment_may_use_again():
    """A vector environment may hand out the same arrays at every step."""

    def collect(reuse):
        args = Args(num_steps=30, num_envs=2, ssl="none", jump_tasks="20:10")
        agent, envs = tiny_agent("none"), ImageEnvs(args, 2)
        real, kept = envs.envs.step, []

        def step(actions):
            *arrays, info = real(actions)
            kept[:] = kept or [array.copy() for array in arrays]
            for old, new in zip(kept, arrays):
                old[:] = new
            return *(kept if reuse else arrays), info

        envs.envs.step = step
        torch.manual_seed(1)
        return vars(collect_rollout(agent, envs, torch.from_numpy(envs.reset()), args)[0])

    fresh, reused = collect(False), collect(True)
    assert fresh["terminated"].any()
    assert all(torch.equal(fresh[name], reused[name]) for name in fresh)
