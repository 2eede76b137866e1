"""Jump-v0: frames, dynamics and rewards, against hand-drawn frames and a slow copy written from the task's rules."""

import json

import numpy as np
import pytest

from ppo_pisco import JUMP_GRID, JUMP_TASK_SETS, Args, ImageEnvs, JumpVectorEnv, parse_jump_tasks

RIGHT, JUMP = 0, 1


class SlowJump:
    """One copy of the task, one pixel rectangle at a time. Heights count from the screen's bottom."""

    def __init__(self, obstacle, floor, exit_bonus):
        self.obstacle, self.floor, self.exit_bonus = obstacle, floor, exit_bonus
        self.x, self.y, self.air, self.success = 0, floor, None, False

    def frame(self):
        frame = np.zeros((60, 60), np.uint8)
        frame[self.y : self.y + 10, self.x : self.x + 5] = 255
        frame[self.floor : self.floor + 10, self.obstacle : self.obstacle + 9] = 128
        frame[0] = frame[59] = frame[:, 0] = frame[:, 59] = frame[self.floor] = 255
        return frame

    def step(self, action):
        """Returns reward and whether the episode ended."""
        if self.air is None and action == JUMP:
            self.air = "up"
        if self.air is not None:
            if self.y > self.floor + 15:
                self.air = "down"
            self.y += 1 if self.air == "up" else -1
            if self.y == self.floor:
                self.air = None
        self.x += 1
        beside = self.x + 5 <= self.obstacle or self.obstacle + 9 <= self.x
        above = self.floor + 10 <= self.y
        if not beside and not above:
            return -1.0, True
        self.success = self.x + 5 > 60
        return 1.0 + self.exit_bonus * self.success, self.success


def one(obstacle, floor, **kwargs):
    env = JumpVectorEnv(1, [(obstacle, floor)], **kwargs)
    return env, env.reset(seed=0)[0]


def walk(env, actions):
    """Steps a single copy; returns all frames, rewards and terminations."""
    frames, rewards, terminated, _, _ = zip(*(env.step(np.array([action])) for action in actions))
    return [frame[0, 0] for frame in frames], [float(r[0]) for r in rewards], [bool(t[0]) for t in terminated]


# --- Frames ----------------------------------------------------------------------------------------------------------
def screen(floor):
    frame = np.zeros((60, 60), np.uint8)
    frame[0, :] = frame[59, :] = frame[:, 0] = frame[:, 59] = 255
    frame[floor, :] = 255
    return frame


def test_first_frame():
    _, obs = one(20, 10)
    expected = screen(floor=10)
    expected[11:20, 1:5] = 255  # agent: columns 0..4, rows 10..19; column 0 is outline, row 10 is floor
    expected[11:20, 20:29] = 128  # obstacle: columns 20..28, rows 10..19
    assert obs.dtype == np.uint8 and obs.shape == (1, 1, 60, 60)
    np.testing.assert_array_equal(obs[0, 0], expected)


def test_obstacle_covers_the_agent():
    env, _ = one(20, 10)
    frames, rewards, terminated = walk(env, [RIGHT] * 16)
    expected = screen(floor=10)
    expected[11:20, 16:20] = 255  # agent: columns 16..20
    expected[11:20, 20:29] = 128  # its last column is behind the obstacle
    np.testing.assert_array_equal(frames[-1], expected)
    assert rewards == [1.0] * 15 + [-1.0] and terminated == [False] * 15 + [True]


def test_agent_clipped_at_the_top_and_floor_line_over_the_agent():
    env, _ = one(47, 40)
    frames, _, _ = walk(env, [JUMP] * 16)
    expected = screen(floor=40)
    expected[56:59, 16:21] = 255  # agent: rows 56..65, of which the screen shows up to 58 and the outline
    expected[41:50, 47:56] = 128
    np.testing.assert_array_equal(frames[-1], expected)


def test_agent_clipped_at_the_right_edge():
    env, _ = one(20, 0)
    frames, _, _ = walk(env, [RIGHT] * 6 + [JUMP] + [RIGHT] * 49)
    expected = screen(floor=0)
    expected[1:10, 56:59] = 255  # agent: columns 56..60
    expected[1:10, 20:29] = 128
    np.testing.assert_array_equal(frames[-1], expected)


# --- Dynamics --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("in_the_air", [RIGHT, JUMP])
def test_jump_arc(in_the_air):
    env, _ = one(46, 20)  # 16 steps up, 16 down
    heights, places = [], []
    for action in [JUMP] + [in_the_air] * 31:
        env.step(np.array([action]))
        heights.append(int(env.y[0]) - 20)
        places.append(int(env.x[0]))
    assert heights == [*range(1, 17), *range(15, -1, -1)]
    assert places == [*range(1, 33)]  # one pixel a step, in the air too
    env.step(np.array([RIGHT]))
    assert env.y[0] == 20  # landed
    env.step(np.array([JUMP]))
    assert env.y[0] == 21  # and able to jump again


@pytest.mark.parametrize("bonus", [100.0, 1.0])
def test_rewards_of_success(bonus):
    env, _ = one(20, 10, exit_bonus=bonus)
    _, rewards, terminated = walk(env, [RIGHT] * 6 + [JUMP] + [RIGHT] * 49)  # 20 - 6 = 14: the right moment
    assert rewards == [1.0] * 55 + [1.0 + bonus] and terminated == [False] * 55 + [True]


def test_there_is_one_right_moment_in_every_grid_task():
    obstacles = np.array([obstacle for obstacle, _ in JUMP_GRID])
    env = JumpVectorEnv(286, JUMP_GRID)
    for jump_at in range(56):
        env.reset(seed=0, options={"task_ids": np.arange(286)})
        solved, over = np.zeros(286, dtype=bool), np.zeros(286, dtype=bool)
        for x in range(56):
            _, _, terminated, truncated, info = env.step(np.full(286, JUMP if x == jump_at else RIGHT))
            solved |= info["success"] & ~over
            over |= terminated
            assert not truncated.any()
        assert over.all()
        np.testing.assert_array_equal(solved, obstacles - jump_at == 14)


@pytest.mark.parametrize("jump_probability", [0.03, 0.1, 0.5])
def test_equals_the_slow_copy(jump_probability):
    tasks = [*JUMP_GRID, (14, 0), (14, 40), (47, 0), (47, 40)]
    env = JumpVectorEnv(len(tasks), tasks, exit_bonus=1.0)
    slow = [SlowJump(obstacle, floor, 1.0) for obstacle, floor in tasks]
    obs, _ = env.reset(seed=0, options={"task_ids": np.arange(len(tasks))})
    rng, alive = np.random.default_rng(7), set(range(len(tasks)))
    for _ in range(56):
        for i in alive:
            np.testing.assert_array_equal(obs[i, 0], slow[i].frame())
        actions = (rng.random(len(tasks)) < jump_probability).astype(np.int64)
        # Half of the copies jump at the right moment too, or next to none would succeed.
        actions[::2] |= np.array([s.obstacle - s.x == 14 for s in slow])[::2]
        obs, rewards, terminated, truncated, info = env.step(actions)
        for i in list(alive):
            reward, over = slow[i].step(actions[i])
            assert (rewards[i], terminated[i], info["success"][i]) == (reward, over, slow[i].success), tasks[i]
            if over:
                np.testing.assert_array_equal(obs[i, 0], slow[i].frame())
                alive.remove(i)
        assert not truncated.any()
    assert not alive
    solved = sum(s.success for s in slow)
    assert 0 < solved < len(tasks)


# --- Autoreset, seeds, state -----------------------------------------------------------------------------------------
def test_autoreset_takes_one_step_without_reward():
    env, first = one(20, 10)
    _, _, terminated = walk(
        env, [RIGHT] * 4 + [JUMP] + [RIGHT] * 22
    )  # too early: comes down on the obstacle, at y = 19
    assert terminated == [False] * 26 + [True]
    for last_action in (JUMP, RIGHT):
        obs, rewards, terminated, truncated, info = env.step(np.array([last_action]))
        np.testing.assert_array_equal(obs, first)  # on the floor at x = 0
        assert (rewards[0], terminated[0], truncated[0], info["success"][0]) == (0.0, False, False, False)
        frames, rewards, terminated = walk(env, [RIGHT] * 16)
        np.testing.assert_array_equal(frames, walk(one(20, 10)[0], [RIGHT] * 16)[0])  # nothing is left of the jump
        assert rewards == [1.0] * 15 + [-1.0] and terminated[-1]


def test_reset_draws_all_tasks_alike():
    tasks = [(x, y) for x in (20, 30, 40) for y in (10, 20)]
    env = JumpVectorEnv(6000, tasks)
    env.reset(seed=0)
    counts = np.bincount(env.task_ids, minlength=len(tasks))
    assert counts.min() > 850 and counts.max() < 1150  # 1000 expected, standard deviation 29


def stream(env, steps, seed=5):
    """Everything that random actions bring out of an environment."""
    rng = np.random.default_rng(seed)
    return [np.concatenate([part.ravel() for part in env.step(rng.integers(2, size=8))[:3]]) for _ in range(steps)]


def test_same_seed_same_stream():
    def from_seed(seed):
        env = JumpVectorEnv(8)
        obs, _ = env.reset(seed=seed)
        return [obs, *stream(env, 80)]

    first = from_seed(1)
    for a, b in zip(first, from_seed(1)):
        np.testing.assert_array_equal(a, b)
    assert any(not np.array_equal(a, b) for a, b in zip(first, from_seed(2)))


@pytest.mark.parametrize("after", [0, 3, 20, 37])
def test_state_goes_through_json_and_continues_bitwise(after):
    """With the copies' statistics, from which a resumed run logs its episodes."""

    def play(envs, steps):
        rng, seen = np.random.default_rng(5), []
        for _ in range(steps):
            seen += [part.copy() for part in envs.step(rng.integers(2, size=8))]
            seen += [np.array([*episode.values()]) for episode in envs.episodes] + [envs.was_done.copy()]
        return seen

    envs, other = ImageEnvs(Args(jump_tasks="grid"), 8), ImageEnvs(Args(jump_tasks="grid", seed=2), 8)
    envs.reset()
    other.reset()
    play(envs, after)
    play(other, 11)
    obs = other.set_state(json.loads(json.dumps(envs.get_state())))
    np.testing.assert_array_equal(obs[:, 0], envs.envs.observe()[:, 0])
    ahead, resumed = play(envs, 80), play(other, 80)
    assert len(ahead) == len(resumed) > 80 * 5
    for a, b in zip(ahead, resumed):
        np.testing.assert_array_equal(a, b)


# --- Task sets -------------------------------------------------------------------------------------------------------
def test_task_sets():
    sets = JUMP_TASK_SETS
    assert set(sets) == {"source", "target", "wide", "narrow", "random", "grid"}
    assert len(set(JUMP_GRID)) == 286 and set(JUMP_GRID) == {(x, y) for x in range(20, 46) for y in range(10, 21)}
    assert sets["grid"] == JUMP_GRID
    assert not set(sets["source"]) & set(sets["target"])
    assert len(set(sets["source"])) == len(sets["source"]) and len(set(sets["target"])) == len(sets["target"])
    assert set(sets["wide"]) == {(x, y) for x in (20, 25, 30, 35, 40, 45) for y in (10, 15, 20)}
    assert set(sets["narrow"]) == {(x, y) for x in (28, 30, 32, 34, 36, 38) for y in (13, 15, 17)}
    assert all(len(sets[name]) == len(set(sets[name])) == 18 for name in ("wide", "narrow", "random"))
    assert set(sets["random"]) <= set(JUMP_GRID)
    for tasks in sets.values():
        assert all(14 <= obstacle <= 47 and 0 <= floor <= 40 for obstacle, floor in tasks)


def test_parse_jump_tasks():
    assert parse_jump_tasks("20:10,30:20,20:10") == [(20, 10), (30, 20)]
    assert parse_jump_tasks("14:0,47:40") == [(14, 0), (47, 40)]
    assert parse_jump_tasks(Args().jump_tasks) == JUMP_TASK_SETS["target"]
    for wrong in ("13:10", "48:10", "20:41", "20:-1", "20", "20:10,", "20:10;30:20", "", "nowhere"):
        with pytest.raises(SystemExit) as stop:
            parse_jump_tasks(wrong)
        assert stop.value.code.startswith(f"--jump-tasks {wrong}: ") and "\n" not in stop.value.code
