"""Chapter 13: break it."""

import math

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, draws, other_instances
from dpo_mini.checks.theorems import differ_alike, implied_rewards, optimum, sum_to_one

REF_PROBS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.2, -0.4, 0.8], dtype=torch.float64)
LENGTHS = torch.tensor([3.0, 1.0, 2.0, 5.0], dtype=torch.float64)
SHARES = torch.tensor([0.6, 0.4], dtype=torch.float64)
GROUP_REWARDS = torch.tensor([[0.0, 1.0, 2.0, 0.5], [4.0, 2.0, 0.0, 1.0]], dtype=torch.float64)
FEATURES = torch.tensor([[1.0, 0.5], [0.0, -0.5], [6.0, 2.0], [2.0, -1.5]], dtype=torch.float64)


def judge_nats_gained(nats_gained):
    """13.1: the gains take the reference to a policy, and differ as the rewards do over beta."""
    for (ref_probs, _), (rewards, _), beta in other_instances(seed=0):
        gained = nats_gained(ref_probs, rewards, beta)
        differ_alike(
            beta * gained,
            rewards,
            "times beta, the gains of two answers do not differ as their rewards do",
        )
        agree(
            ref_probs @ gained.exp(),
            1.0,
            "with these gains on the reference's log-probabilities the probabilities do not sum "
            "to 1",
        )


def _gained_without_z(ref_probs, rewards, beta):
    """Log Z is missing: not all answers with a reward above 0 rise, probabilities sum to 1."""
    return rewards / beta


def _gained_in_reward(ref_probs, rewards, beta):
    """This is in units of reward: divide by beta to have nats."""
    return rewards - beta * torch.log((ref_probs * torch.exp(rewards / beta)).sum())


def _gained_above_the_mean(ref_probs, rewards, beta):
    """This compares with the mean reward: the level is beta log Z, which is higher (Jensen)."""
    return (rewards - ref_probs @ rewards) / beta


def _gained_of_z(ref_probs, rewards, beta):
    """The logarithm of Z is missing."""
    return rewards / beta - (ref_probs * torch.exp(rewards / beta)).sum()


def _gained_z_in_reward(ref_probs, rewards, beta):
    """One beta too many: log Z is in nats already, and only the reward is divided."""
    return rewards / beta - beta * torch.log((ref_probs * torch.exp(rewards / beta)).sum())


def _gained_optimum(ref_probs, rewards, beta):
    """This is log pi* itself: what is gained is its difference to the reference's."""
    return torch.log_softmax(ref_probs.log() + rewards / beta, 0)


def _gained_in_probability(ref_probs, rewards, beta):
    """This is the gain in probability: nats are a difference of logarithms."""
    return optimum(ref_probs, rewards, beta) - ref_probs


def _gained_at_beta_one(ref_probs, rewards, beta):
    """Inside Z the rewards are not divided by beta."""
    return rewards / beta - torch.log((ref_probs * torch.exp(rewards)).sum())


def _gained_with_z_added(ref_probs, rewards, beta):
    """log Z is added: the larger Z is, the less each answer gains."""
    return rewards / beta + torch.log((ref_probs * torch.exp(rewards / beta)).sum())


def judge_chosen_rate(chosen_rate):
    """13.2: what autograd says of one step of gradient descent, through the whole policy."""
    for seed, ((ref_probs, _), _, beta) in enumerate(other_instances(seed=0)):
        features = draws(len(ref_probs), 1 + seed, seed=seed)
        for chosen, rejected in ((0, 1), (1, 0), (2, 1)):
            agree(
                chosen_rate(ref_probs, features, chosen, rejected, beta),
                _rate_after_a_step(ref_probs, features, chosen, rejected, beta),
                "a step of gradient descent on the pair's loss moves the chosen answer's "
                "log-probability at another rate",
            )


def _rate_after_a_step(ref_probs, features, chosen, rejected, beta):
    """d log pi(chosen) / d step size, at a step of 0."""
    ref_logps = ref_probs.log()

    def policy(theta):
        return torch.log_softmax(ref_logps + features @ theta, 0)

    def loss(theta):
        log_ratios = policy(theta) - ref_logps
        return -torch.nn.functional.logsigmoid(beta * (log_ratios[chosen] - log_ratios[rejected]))

    start = torch.zeros(features.shape[1], dtype=torch.float64)
    downhill = -torch.autograd.functional.jacobian(loss, start)

    def after(step):
        return policy(start + step * downhill)[chosen]

    return torch.autograd.functional.jacobian(after, torch.zeros((), dtype=torch.float64))


def _rate_without_mean(ref_probs, features, chosen, rejected, beta):
    """The mean feature is missing: when theta moves, the normaliser moves with it."""
    return 0.5 * beta * (features[chosen] @ (features[chosen] - features[rejected]))


def _rate_of_margin(ref_probs, features, chosen, rejected, beta):
    """This is the rate of the margin, which always grows; the chosen answer's own may not."""
    gap = features[chosen] - features[rejected]
    return 0.5 * beta * (gap @ gap)


def _rate_without_half(ref_probs, features, chosen, rejected, beta):
    """The weight of the pair is missing: at margin 0 it is beta times sigmoid(0), a half."""
    slope = features[chosen] - ref_probs @ features
    return beta * (slope @ (features[chosen] - features[rejected]))


def _rate_without_beta(ref_probs, features, chosen, rejected, beta):
    """Beta is missing: the pull of a pair is beta sigmoid(-beta d)."""
    slope = features[chosen] - ref_probs @ features
    return 0.5 * (slope @ (features[chosen] - features[rejected]))


def _rate_of_rejected(ref_probs, features, chosen, rejected, beta):
    """This is the rejected answer's rate."""
    mean = ref_probs @ features
    gap = features[chosen] - features[rejected]
    return 0.5 * beta * ((features[rejected] - mean) @ gap)


def _rate_plain_mean(ref_probs, features, chosen, rejected, beta):
    """The mean feature is the policy's: weigh each answer by its probability."""
    slope = features[chosen] - features.mean(0)
    return 0.5 * beta * (slope @ (features[chosen] - features[rejected]))


def _rate_turned_round(ref_probs, features, chosen, rejected, beta):
    """The sign is reversed: descent on the loss moves theta along phi_w - phi_l."""
    slope = features[chosen] - ref_probs @ features
    return 0.5 * beta * (slope @ (features[rejected] - features[chosen]))


def _rate_of_probability(ref_probs, features, chosen, rejected, beta):
    """This is the rate of the probability: its logarithm's is asked for."""
    slope = ref_probs[chosen] * (features[chosen] - ref_probs @ features)
    return 0.5 * beta * (slope @ (features[chosen] - features[rejected]))


def judge_mean_policy(mean_policy):
    """13.3: a distribution whose rewards, as length-normalised DPO reads them, are true."""
    for seed, ((ref_probs, _), (rewards, _), beta) in enumerate(other_instances(seed=0)):
        lengths = 1 + draws(len(ref_probs), seed=seed).abs().mul(3).floor()
        probs = mean_policy(ref_probs, rewards, lengths, beta)
        sum_to_one(probs)
        differ_alike(
            implied_rewards(probs, ref_probs, beta) / lengths,
            rewards,
            "the implied rewards, beta times the log-ratio over the length, of two answers do not "
            "differ as their rewards do",
        )


def _normalised(logits):
    return torch.softmax(logits, 0)


def _mean_normalised(ref_probs, rewards, lengths, beta):
    """This divides by a sum: with means, the free constant is multiplied by each answer's length,
    and no factor common to all can make up for it.
    """
    return _normalised(ref_probs.log() + lengths * rewards / beta)


def _mean_of_sums(ref_probs, rewards, lengths, beta):
    """This is pi*, which DPO on sums fits: here log-ratios are divided by lengths."""
    return _normalised(ref_probs.log() + rewards / beta)


def _mean_divided(ref_probs, rewards, lengths, beta):
    """The length is on the wrong side: the log-ratio is the length times what the labels fix."""
    return _normalised(ref_probs.log() + rewards / lengths / beta)


def _mean_not_normalised(ref_probs, rewards, lengths, beta):
    """The probabilities do not sum to 1: labels fix rewards up to a constant; find it."""
    return ref_probs * torch.exp(lengths * rewards / beta)


def _mean_without_reference(ref_probs, rewards, lengths, beta):
    """The reference is missing."""
    low, high = -1e3, 1e3
    for _ in range(100):
        c = (low + high) / 2
        logits = lengths * (rewards + c) / beta - math.log(len(ref_probs))
        low, high = (low, c) if logits.logsumexp(0) > 0 else (c, high)
    return logits.exp()


def _wins(group_rewards):
    """`[G, Y, Y]`: how likely somebody of each group prefers row to column."""
    return torch.sigmoid(group_rewards[:, :, None] - group_rewards[:, None])


def judge_shared_optimum(shared_optimum):
    """13.4: a distribution whose implied rewards differ as the mean rewards do."""
    for seed, ((ref_probs, _), _, beta) in enumerate(other_instances(seed=0)):
        group_rewards = draws(3, len(ref_probs), seed=seed)
        shares = torch.softmax(draws(3, seed=10 + seed), 0)
        probs = shared_optimum(_wins(group_rewards), shares, ref_probs, beta)
        sum_to_one(probs)
        differ_alike(
            implied_rewards(probs, ref_probs, beta),
            shares @ group_rewards,
            "the implied rewards of two answers do not differ as the mean over annotators of their "
            "rewards does",
        )


def _shared_from_pooled(group_wins, shares, ref_probs, beta):
    """This pools the labels first: the log-odds of a mean are no mean of log-odds, and whoever
    feels strongly is lost.
    """
    pooled = torch.einsum("g,gab->ab", shares, group_wins)
    return _normalised(ref_probs.log() + torch.logit(pooled[:, 0]) / beta)


def _shared_of_borda(group_wins, shares, ref_probs, beta):
    """This tilts by how often an answer wins, the Borda count: it is no reward."""
    pooled = torch.einsum("g,gab->ab", shares, group_wins)
    return _normalised(ref_probs.log() + pooled.mean(1) / beta)


def _shared_of_policies(group_wins, shares, ref_probs, beta):
    """This is a mean of the groups' policies: average their rewards, then tilt once."""
    each = torch.softmax(ref_probs.log() + torch.logit(group_wins[:, :, 0]) / beta, 1)
    return shares @ each


def _shared_unweighted(group_wins, shares, ref_probs, beta):
    """The shares are missing: each group counts as much as its share of the people."""
    rewards = torch.logit(group_wins[:, :, 0]).mean(0)
    return _normalised(ref_probs.log() + rewards / beta)


def _shared_without_reference(group_wins, shares, ref_probs, beta):
    """The reference is missing: the best policy tilts it."""
    return _normalised(shares @ torch.logit(group_wins[:, :, 0]) / beta)


def _shared_losses(group_wins, shares, ref_probs, beta):
    """Rows and columns are exchanged: this rewards the answers that lose."""
    return _normalised(ref_probs.log() + shares @ torch.logit(group_wins[:, 0]) / beta)


EXERCISES = (
    Exercise(
        "13.1",
        cases=((REF_PROBS, REWARDS, 0.5), (REF_PROBS.flip(0), REWARDS, 2.0)),
        judge=judge_nats_gained,
        mistakes=(
            _gained_without_z,
            _gained_in_reward,
            _gained_above_the_mean,
            _gained_of_z,
            _gained_z_in_reward,
            _gained_optimum,
            _gained_in_probability,
            _gained_at_beta_one,
            _gained_with_z_added,
        ),
        shape=lambda ref_probs, rewards, beta: ref_probs.shape,
    ),
    Exercise(
        "13.2",
        cases=((REF_PROBS, FEATURES, 0, 1, 0.5), (REF_PROBS, FEATURES, 3, 0, 2.0)),
        judge=judge_chosen_rate,
        mistakes=(
            _rate_without_mean,
            _rate_of_margin,
            _rate_without_half,
            _rate_without_beta,
            _rate_of_rejected,
            _rate_plain_mean,
            _rate_turned_round,
            _rate_of_probability,
        ),
    ),
    Exercise(
        "13.3",
        cases=((REF_PROBS, REWARDS, LENGTHS, 0.5), (REF_PROBS, -REWARDS, LENGTHS, 2.0)),
        judge=judge_mean_policy,
        mistakes=(
            _mean_normalised,
            _mean_of_sums,
            _mean_divided,
            _mean_not_normalised,
            _mean_without_reference,
        ),
        shape=lambda ref_probs, rewards, lengths, beta: ref_probs.shape,
    ),
    Exercise(
        "13.4",
        cases=(
            (_wins(GROUP_REWARDS), SHARES, REF_PROBS, 0.5),
            (_wins(GROUP_REWARDS.flip(1)), SHARES, REF_PROBS, 2.0),
        ),
        judge=judge_shared_optimum,
        mistakes=(
            _shared_from_pooled,
            _shared_of_borda,
            _shared_of_policies,
            _shared_unweighted,
            _shared_without_reference,
            _shared_losses,
        ),
        shape=lambda group_wins, shares, ref_probs, beta: ref_probs.shape,
    ),
)
