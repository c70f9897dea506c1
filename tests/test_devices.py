"""Where tensors lie: `on_device`, what a generator draws, and what may stand beside what.

There is no second device where the tests run, so one is pretended (`tests/pretended_device.py`).
What is computed there is computed by the CPU, so all numbers are those of the CPU.
"""

import copy
import inspect
import re
from functools import partial

import pytest
import torch
from pretended_device import DEVICE, PretendedTensor, pretended_device
from torch.overrides import TorchFunctionMode

from dpo_mini import (
    closed_form,
    losses,
    plotting,
    policies,
    policy_gradient,
    preferences,
    relaxations,
    rollout,
    tasks,
    train,
)
from dpo_mini._arguments import check_device
from dpo_mini.devices import on_device

MADE_OF = dict(steps=3, batch_size=4, learning_rate=1e-2)


@pytest.fixture
def device():
    with pretended_device() as there:
        yield there


# --- the helper ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nowhere", "cuda", "xpu", "meta", "cuda:7", ""])
def test_a_device_that_is_not_there_is_refused(name):
    what = f'`name` must be a device that torch finds here, such as "cpu", got {name!r}'
    with pytest.raises(ValueError, match=f"^{re.escape(what)}$"):
        on_device(name)


@pytest.mark.parametrize("name", ["cpu", torch.device("cpu")])
def test_one_line_gives_the_device_and_its_generators(name):
    device, seeded = on_device(name)
    assert device == torch.device("cpu")
    draws = [torch.rand(3, generator=seeded(seed)).tolist() for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == torch.rand(3, generator=torch.Generator().manual_seed(3)).tolist()
    for seed, error in ((-1, ValueError), (0.5, TypeError)):
        with pytest.raises(error, match="^`seed` must be a whole number >= 0, got"):
            seeded(seed)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", DEVICE])
def test_another_name_is_all_that_changes(name, device):
    there, seeded = on_device(name)
    assert there == seeded(0).device == torch.rand(2, device=there).device == device


# --- what a generator draws ------------------------------------------------------------------


def seeded(seed, there="cpu"):
    return torch.Generator(there).manual_seed(seed)


def reviews(there="cpu", n_words=2):
    """A task of 12 words whose completions have at most two; its tables lie on a device."""
    n = len(tasks.enumerate_completions(12, n_words, 0))
    rewards = torch.randn(4, n, dtype=torch.float64, generator=seeded(1))
    logps = torch.randn(4, n, dtype=torch.float64, generator=seeded(2)).log_softmax(-1)
    task = tasks.Task(tasks.REVIEW_PROMPTS, tasks.REVIEW_WORDS, n_words, 0, rewards, logps)
    return task.to(there)


def small_policy(there="cpu", seed=3):
    task, shape = reviews(), {"n_layers": 1, "n_heads": 2, "width": 8}
    return policies.TinyTransformer.for_task(task, generator=seeded(seed, there), **shape)


def table(there="cpu"):
    return torch.randn(4, 3, dtype=torch.float64, generator=seeded(4)).to(there)


def one_hot(there="cpu"):
    return torch.nn.functional.one_hot(torch.arange(4) % 3, 3).double().to(there)


MADE = {
    "micro_review_demonstrations": partial(tasks.micro_review_demonstrations, 20),
    "tiny_sum_demonstrations": partial(tasks.tiny_sum_demonstrations, 20),
    "tiny_sort_demonstrations": partial(tasks.tiny_sort_demonstrations, 20),
    "random_bandit": lambda generator: tasks.random_bandit(2, 3, generator=generator).rewards,
    "TinyTransformer": lambda generator: list(small_parameters(generator)),
    "RewardModel": lambda generator: list(
        policies.RewardModel.for_task(reviews(), generator=generator, width=8).parameters()
    ),
}
"""Draws that nothing stands beside: they lie where the generator does."""


def small_parameters(generator):
    return policies.TinyTransformer.for_task(reviews(), generator=generator, width=8).parameters()


DRAWN = {
    "sample": lambda there, generator: rollout.sample(
        small_policy(there), reviews(there).prompts, generator=generator
    ),
    "sample_completions": lambda there, generator: reviews(there).sample_completions(
        reviews(there).ref_logps, reviews(there).prompts, generator=generator
    ),
    "sample_pairs": lambda there, generator: reviews(there).sample_pairs(
        reviews(there).ref_logps, 20, generator=generator
    ),
    "sample_bradley_terry": lambda there, generator: preferences.sample_bradley_terry(
        table(there), -table(there), generator=generator
    ),
    "sample_thurstone": lambda there, generator: preferences.sample_thurstone(
        table(there), -table(there), generator=generator
    ),
    "sample_plackett_luce": lambda there, generator: preferences.sample_plackett_luce(
        table(there), generator=generator
    ),
    "sample_perturbed_logits": lambda there, generator: relaxations.sample_perturbed_logits(
        table(there), generator=generator
    ),
    "sample_conditional_logits": lambda there, generator: relaxations.sample_conditional_logits(
        table(there), one_hot(there), generator=generator
    ),
    "gumbel_softmax": lambda there, generator: relaxations.gumbel_softmax(
        table(there), temperature=0.5, generator=generator
    ),
    "straight_through": lambda there, generator: relaxations.straight_through(
        table(there), generator=generator
    ),
}
"""Draws for tensors or weights that lie somewhere: the generator must lie there."""


def tensors_in(result):
    return [result] if isinstance(result, torch.Tensor) else [*result]


def check_alike(there, here):
    """The same numbers, on the device and on the CPU."""
    for far, near in zip(tensors_in(there), tensors_in(here), strict=True):
        assert (far.device, near.device.type) == (DEVICE, "cpu")
        assert far.tolist() == near.tolist()


@pytest.mark.parametrize("name", MADE)
def test_what_a_generator_makes_lies_on_its_device(name, device):
    check_alike(MADE[name](generator=seeded(5, device)), MADE[name](generator=seeded(5)))


@pytest.mark.parametrize("name", DRAWN)
def test_what_a_generator_draws_lies_on_its_device(name, device):
    check_alike(DRAWN[name](device, seeded(5, device)), DRAWN[name]("cpu", seeded(5)))


BESIDE = {
    "sample": "the policy's weights",
    "sample_completions": "the tables of the task",
    "sample_pairs": "the tables of the task",
    "sample_bradley_terry": "the rewards",
    "sample_thurstone": "the rewards",
    "sample_plackett_luce": "the rewards",
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_generator_that_lies_elsewhere_is_refused(name, device):
    like = BESIDE.get(name, "`logits`")
    for there, generator in ((device, seeded(5)), ("cpu", seeded(5, device))):
        want, got = torch.device(there), generator.device
        what = f"`generator` must be on {want} like {like}, got one on {got}"
        with pytest.raises(ValueError, match=f"^{re.escape(what)}$"):
            DRAWN[name](there, generator)


def test_the_first_weights_leave_all_random_state_as_it_was(device):
    noted = []

    class Watch(TorchFunctionMode):
        """Notes draws on the device that no generator makes."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            named, name = kwargs or {}, getattr(func, "__name__", "")
            first = next(iter((*args, *named.values())), None)
            if name in ("uniform_", "normal_", "kaiming_uniform_") and not named.get("generator"):
                noted.extend([name] * isinstance(first, PretendedTensor))
            return func(*args, **named)

    before = torch.get_rng_state()
    with Watch():
        policies.RewardModel.for_task(reviews(), generator=seeded(5, device), width=8)
        policies.SharedTrunk(small_policy(device))
        assert noted == []
        torch.zeros(2, device=device).normal_()
        assert noted == ["normal_"]
        torch.set_rng_state(before)
        policies.RewardModel.for_task(reviews(), generator=seeded(5, device), width=8)
    assert torch.equal(torch.get_rng_state(), before)


# --- tasks and tables ------------------------------------------------------------------------


def test_a_task_is_sent_with_all_its_tables(device):
    for task in (reviews(), tasks.tiny_sums()):
        sent = task.to(device)
        for name in ("rewards", "ref_logps", "prompt_tokens", "prompts", "completions"):
            there, here = getattr(sent, name), getattr(task, name)
            assert (there is None) == (here is None)
            if here is not None:
                check_alike(there, here)
        assert (sent.prompt_texts, sent.vocabulary) == (task.prompt_texts, task.vocabulary)
        assert sent.text(sent.completions[3]) == task.text(task.completions[3])
        assert sent.index(sent.completions).tolist() == list(range(len(task.completions)))
        assert sent.to("cpu").rewards.device.type == "cpu"


def test_a_table_elsewhere_than_the_task_is_refused(device):
    task, apart = reviews(device), reviews()
    what = "must be on cuda:0 like the tables of the task, got a tensor on cpu"
    with pytest.raises(ValueError, match=f"^`logps` {what}$"):
        task.sample_pairs(apart.ref_logps, 5, generator=seeded(1, device))
    with pytest.raises(ValueError, match=f"^`logps` {what}$"):
        task.sample_completions(apart.ref_logps, task.prompts, generator=seeded(1, device))
    with pytest.raises(ValueError, match=f"^`prompts` {what}$"):
        task.sample_completions(task.ref_logps, apart.prompts, generator=seeded(1, device))


def test_tasks_and_policies_lie_together(device):
    model = policies.RewardModel.for_task(reviews(), generator=seeded(5, device), width=8)
    with pytest.raises(
        ValueError, match="^`task` must be on cuda:0 like the policy's weights, got one on cpu$"
    ):
        rollout.enumerate_logps(small_policy(device), reviews())
    with pytest.raises(
        ValueError, match="^`task` must be on cpu like the policy's weights, got one on cuda:0$"
    ):
        rollout.exact_gradient(small_policy(), reviews(device), lambda x, logps, at: logps.sum())
    with pytest.raises(
        ValueError, match="^`task` must be on cuda:0 like the model's weights, got one on cpu$"
    ):
        rollout.enumerate_rewards(model, reviews())


def test_enumeration_on_a_device(device):
    with torch.no_grad():
        there, here = [
            rollout.enumerate_logps(small_policy(where), reviews(where))
            for where in (device, "cpu")
        ]
    check_alike(there, here)
    policy = small_policy(device)
    rollout.exact_gradient(policy, reviews(device), lambda x, logps, at: logps.exp().sum())
    assert all(weight.grad.device == DEVICE for weight in policy.parameters())
    model = policies.RewardModel.for_task(reviews(), generator=seeded(5, device), width=8)
    assert rollout.enumerate_rewards(model, reviews(device)).device == DEVICE


def test_soft_values_on_a_device(device):
    there, here = [
        rollout.soft_values(task, task.ref_logps, task.rewards, 0.5)
        for task in (tasks.four_answers().to(device), tasks.four_answers())
    ]
    check_alike(there, here)
    task, near = tasks.four_answers().to(device), tasks.four_answers()
    with pytest.raises(
        ValueError,
        match="^`ref_logps` must be on cuda:0 like the tables of the task, got a tensor on cpu$",
    ):
        rollout.soft_values(task, near.ref_logps, near.rewards, 0.5)


@pytest.mark.parametrize("read", [rollout.token_logps, rollout.shared_prefix_token_logps])
def test_prompts_and_completions_lie_beside_the_weights(read, device):
    task, apart, policy = reviews(device), reviews(), small_policy(device)
    assert read(policy, task.prompts, task.completions[:4]).device == DEVICE
    what = "must be on cuda:0 like the policy's weights, got a tensor on cpu"
    with pytest.raises(ValueError, match=f"^`prompts` {what}$"):
        read(policy, apart.prompts, apart.completions[:4])
    with pytest.raises(ValueError, match=f"^`completions` {what}$"):
        policy.token_logps(task.prompts, apart.completions[:4])
    with pytest.raises(ValueError, match=f"^`prompts` {what}$"):
        rollout.sample(policy, apart.prompts, generator=seeded(1, device))


def test_a_tie_weight_is_a_number_on_every_device(device):
    probs = preferences.davidson_probs(table(device), -table(device), tie_weight=0.7)
    check_alike(probs, preferences.davidson_probs(table(), -table(), tie_weight=0.7))


def test_a_ranking_lies_beside_the_rewards(device):
    ranking = torch.tensor([[0, 2, 1]] * 4)
    logps = preferences.plackett_luce_logp(table(device), ranking.to(device))
    check_alike(logps, preferences.plackett_luce_logp(table(), ranking))
    with pytest.raises(
        ValueError, match="^`ranking` must be on cuda:0 like `rewards`, got a tensor on cpu$"
    ):
        preferences.plackett_luce_logp(table(device), ranking)


# --- formulas --------------------------------------------------------------------------------

NUMBERS = dict(
    beta=0.5, label_smoothing=0.1, divergence="forward_kl", gamma=0.5, reference_point=0.1, n=3,
    n_tokens=2, clip_eps=0.2, clip_eps_high=0.3, cap=2.0, discount=0.9, lam=0.9, tie_weight=0.7,
    betas=[0.5, 2.0],
)  # fmt: skip
FORMULAS = [
    (module, name)
    for module in (losses, closed_form, policy_gradient, preferences)
    for name in module.__all__
    if not isinstance(getattr(module, name), type) and not name.startswith("sample_")
]


def arguments_of(module, function, there):
    """What a formula takes, read off the names of its arguments, on a device."""
    generator, given = seeded(6), {}
    parameters = inspect.signature(function).parameters
    for name, one in parameters.items():
        shape = (5, 3)
        if module is losses and not re.match("log_var|plackett|best_of", function.__name__):
            shape = (5,)
        elif name in ("initial_logps", "token_rewards"):
            shape = (4,)
        elif name == "transition_logps":
            shape = (4, 4)
        elif name == "advantages" and "completion_mask" in parameters:
            shape = (5,)
        elif {"old_logps", "rewards"} <= {*parameters} and name != "rewards":
            shape = (5, 3, 4)  # of tokens
        if name in ("win_probs", "wins"):
            drawn = torch.rand(5, 3, 3, dtype=torch.float64, generator=generator)
            given[name] = (drawn / (drawn + drawn.mT)).to(there)
        elif name in NUMBERS:
            given[name] = NUMBERS[name]
        elif name in ("completion_mask", "desirable"):
            given[name] = torch.ones(shape, dtype=torch.bool).to(there)
        elif name == "ranking":
            given[name] = torch.tensor([[0, 2, 1]] * 5).to(there)
        elif one.default is one.empty:
            drawn = torch.randn(shape, dtype=torch.float64, generator=generator)
            drawn = drawn.log_softmax(-1) if "logps" in name else drawn
            positive = "squared" in name or ("maxrl" in function.__name__ and name == "rewards")
            given[name] = (drawn.square() if positive else drawn).to(there)
    return given


@pytest.mark.parametrize(
    ("module", "name"), FORMULAS, ids=lambda part: getattr(part, "__name__", part)
)
def test_a_formula_stays_on_the_device_of_its_arguments(module, name, device):
    function = getattr(module, name)
    there, here = [function(**arguments_of(module, function, where)) for where in (device, "cpu")]
    check_alike(there, here)


# --- trainings -------------------------------------------------------------------------------


def pairs(there="cpu"):
    task = reviews(there)
    return task.sample_pairs(task.ref_logps, 20, generator=seeded(7, there))


def demonstrations(there="cpu"):
    return pairs(there)[:2]


def score(prompts, completions):
    task = reviews(prompts.device)
    return task.rewards[prompts, task.index(completions)]


DPO = partial(losses.dpo_loss, beta=0.5)


def fit_sft(there, generator, data=None, **named):
    data = demonstrations(there) if data is None else data
    return train.fit_sft(small_policy(there), *data, generator=generator, **MADE_OF)


def fit_preferences(there, generator, data=None, reference=None):
    data = pairs(there) if data is None else data
    reference = small_policy(there) if reference is None else reference
    policy = small_policy(there)
    return train.fit_preferences(policy, reference, data, DPO, generator=generator, **MADE_OF)


def fit_reward_model(there, generator, data=None):
    data = pairs(there) if data is None else data
    shape = {"n_layers": 1, "n_heads": 2, "width": 8}
    model = policies.RewardModel.for_task(reviews(), generator=seeded(8, there), **shape)
    return train.fit_reward_model(model, data, generator=generator, **MADE_OF)


def on_policy(fit, there, generator, prompts=None, reference=None, score=score, **more):
    policy, reference = small_policy(there), reference or small_policy(there)
    prompts = reviews(there).prompts if prompts is None else prompts
    if fit is train.fit_ppo:
        policy = policies.SharedTrunk(policy)
    elif fit is train.fit_online_preferences:
        score = (score, DPO)
    scores = score if isinstance(score, tuple) else (score,)
    return fit(policy, reference, prompts, *scores, generator=generator, **MADE_OF, **more)


fit_reinforce = partial(on_policy, train.fit_reinforce, beta=0.5, n_samples=2)
fit_ppo = partial(on_policy, train.fit_ppo, beta=0.5)
fit_online_preferences = partial(on_policy, train.fit_online_preferences)
SHUFFLES = {"sft": fit_sft, "preferences": fit_preferences, "reward model": fit_reward_model}
SAMPLES = {"reinforce": fit_reinforce, "ppo": fit_ppo, "online": fit_online_preferences}


@pytest.mark.parametrize("name", SHUFFLES | SAMPLES)
def test_a_training_runs_on_a_device(name, device):
    fit = (SHUFFLES | SAMPLES)[name]
    assert fit(device, seeded(9, device)) == fit("cpu", seeded(9))


@pytest.mark.parametrize("name", SHUFFLES)
def test_a_generator_of_any_device_shuffles(name, device):
    fit = SHUFFLES[name]
    assert fit(device, seeded(9)) == fit("cpu", seeded(9, device)) == fit("cpu", seeded(9))


@pytest.mark.parametrize("name", SAMPLES)
def test_a_training_that_samples_refuses_a_generator_that_lies_elsewhere(name, device):
    what = "`generator` must be on cuda:0 like the policy's weights, got one on cpu"
    with pytest.raises(ValueError, match=f"^{what}$"):
        SAMPLES[name](device, seeded(9))
    what = "`generator` must be on cpu like the policy's weights, got one on cuda:0"
    with pytest.raises(ValueError, match=f"^{what}$"):
        SAMPLES[name]("cpu", seeded(9, device))


@pytest.mark.parametrize("name", SHUFFLES)
def test_a_training_refuses_data_that_lies_elsewhere(name, device):
    data = demonstrations if name == "sft" else pairs
    whose = "model" if name == "reward model" else "policy"
    what = f"must be on cuda:0 like the {whose}'s weights, got a tensor on cpu"
    names = ("prompts", "completions") if name == "sft" else ("prompts", "chosen", "rejected")
    for at, argument in enumerate(names):
        mixed = list(data(device))
        mixed[at] = mixed[at].cpu()
        with pytest.raises(ValueError, match=f"^`{argument}` {what}$"):
            SHUFFLES[name](device, seeded(9, device), data=mixed)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_training_that_samples_refuses_prompts_and_scores_that_lie_elsewhere(name, device):
    what = "`prompts` must be on cuda:0 like the policy's weights, got a tensor on cpu"
    with pytest.raises(ValueError, match=f"^{what}$"):
        SAMPLES[name](device, seeded(9, device), prompts=reviews().prompts)
    what = "`score` must be on cuda:0 like its completions, got a tensor on cpu"
    with pytest.raises(ValueError, match=f"^{what}$"):
        SAMPLES[name](
            device,
            seeded(9, device),
            score=lambda prompts, completions: score(prompts, completions).cpu(),
        )


@pytest.mark.parametrize("name", ["preferences", *SAMPLES])
def test_a_training_refuses_a_reference_that_lies_elsewhere(name, device):
    what = "`reference` must be on cuda:0 like the policy's weights, got one on cpu"
    with pytest.raises(ValueError, match=f"^{what}$"):
        (SHUFFLES | SAMPLES)[name](device, seeded(9, device), reference=small_policy(seed=4))


def test_a_table_is_fitted_where_it_lies(device):
    def fitted(there):
        task = tasks.four_answers().to(there)
        given = task.ref_logps, task.rewards, 0.5
        loss = lambda logps: -closed_form.objective(logps, *given).sum()  # noqa: E731
        return train.fit_table(loss, task.ref_logps)

    check_alike(fitted(device), fitted("cpu"))


def test_a_copy_and_a_state_stay_on_the_device(device):
    policy, other = small_policy(device), small_policy(seed=4)
    copied = copy.deepcopy(policy)
    check_alike([*copied.parameters()], [*small_policy().parameters()])
    copied.load_state_dict(other.state_dict())
    check_alike([*copied.parameters()], [*other.parameters()])


# --- figures and the check -------------------------------------------------------------------


def test_figures_read_tensors_of_every_device(device):
    _, ax = plotting.axes("Finding", "x", "y")
    x = torch.arange(3.0, device=device)
    plotting.curves(ax, x, {"one": x**2, "two": [value for value in x]})
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0, 1, 4], [0, 1, 2]]
    _, ax = plotting.axes("Finding", "x", "y")
    plotting.named_points(ax, {"some": {"a": x[1], "b": x[2]}})
    assert ax.lines[0].get_xdata().tolist() == [1, 2]
    _, ax = plotting.axes("Finding", "x", "y")
    plotting.grouped_bars(ax, "abc", {"dpo": x})
    assert plotting.ternary_xy(torch.ones(2, 3, device=device) / 3)[0].shape == (2,)


def test_the_check_compares_devices(device):
    here, there, anywhere = torch.device("cpu"), DEVICE, torch.device("cuda")
    check_device("it", here, a=torch.ones(2), b=seeded(1), c=here, d=None)
    check_device("it", there, a=torch.ones(2, device=device), b=seeded(1, device), c=anywhere)
    check_device("it", None, a=torch.ones(2), b=there)
    with pytest.raises(ValueError, match="^`b` must be on cpu like it, got one on cuda:0$"):
        check_device("it", here, a=torch.ones(2), b=seeded(1, device))
    with pytest.raises(ValueError, match="^`a` must be on cuda:1 like it, got a tensor on cuda:0$"):
        check_device("it", torch.device("cuda", 1), a=torch.ones(2, device=device))
