"""Chapter 12: break it."""

import torch

from dpo_mini.checks import Exercise

REF_PROBS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.2, -0.4, 0.8], dtype=torch.float64)
LENGTHS = torch.tensor([3.0, 1.0, 2.0, 5.0], dtype=torch.float64)
FEATURES = torch.tensor([[1.0, 0.5], [0.0, -0.5], [6.0, 2.0], [2.0, -1.5]], dtype=torch.float64)


def nats_gained(ref_probs, rewards, beta):
    """12.1: (r - beta log Z) / beta, `[Y]`, nats."""
    log_z = torch.log((ref_probs * torch.exp(rewards / beta)).sum())
    return (rewards - beta * log_z) / beta


def _gained_without_z(ref_probs, rewards, beta):
    """Log Z is missing: not all answers with a reward above 0 rise, probabilities sum to 1."""
    return rewards / beta


def _gained_in_reward(ref_probs, rewards, beta):
    """This is in units of reward: divide by beta to have nats."""
    return beta * nats_gained(ref_probs, rewards, beta)


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
    return ref_probs.log() + nats_gained(ref_probs, rewards, beta)


def chosen_rate(ref_probs, features, chosen, rejected, beta):
    """12.2: beta sigma(0) (phi_w - mean phi) . (phi_w - phi_l)."""
    mean = (ref_probs[:, None] * features).sum(0)
    return 0.5 * beta * ((features[chosen] - mean) * (features[chosen] - features[rejected])).sum()


def _rate_without_mean(ref_probs, features, chosen, rejected, beta):
    """The mean feature is missing: when theta moves, the normaliser moves with it."""
    return 0.5 * beta * (features[chosen] @ (features[chosen] - features[rejected]))


def _rate_of_margin(ref_probs, features, chosen, rejected, beta):
    """This is the rate of the margin, which always grows; the chosen answer's own may not."""
    gap = features[chosen] - features[rejected]
    return 0.5 * beta * (gap @ gap)


def _rate_without_half(ref_probs, features, chosen, rejected, beta):
    """The weight of the pair is missing: at margin 0 it is beta times sigmoid(0), a half."""
    return 2 * chosen_rate(ref_probs, features, chosen, rejected, beta)


def _rate_without_beta(ref_probs, features, chosen, rejected, beta):
    """Beta is missing: the pull of a pair is beta sigmoid(-beta d)."""
    return chosen_rate(ref_probs, features, chosen, rejected, 1.0)


def _rate_of_rejected(ref_probs, features, chosen, rejected, beta):
    """This is the rejected answer's rate."""
    mean = ref_probs @ features
    gap = features[chosen] - features[rejected]
    return 0.5 * beta * ((features[rejected] - mean) @ gap)


def _rate_plain_mean(ref_probs, features, chosen, rejected, beta):
    """The mean feature is the policy's: weigh each answer by its probability."""
    uniform = torch.full_like(ref_probs, 1 / len(ref_probs))
    return chosen_rate(uniform, features, chosen, rejected, beta)


def _rate_turned_round(ref_probs, features, chosen, rejected, beta):
    """The sign is turned round: descent on the loss moves theta along phi_w - phi_l."""
    return -chosen_rate(ref_probs, features, chosen, rejected, beta)


def mean_policy(ref_probs, rewards, lengths, beta):
    """12.3: pi_ref exp(n (r + c) / beta) with the one c at which it sums to 1, `[Y]`."""
    low, high = -1e3, 1e3
    for _ in range(200):
        c = (low + high) / 2
        total = (ref_probs.log() + lengths * (rewards + c) / beta).logsumexp(0)
        low, high = (low, c) if total > 0 else (c, high)
    return ref_probs * torch.exp(lengths * (rewards + c) / beta)


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
    return mean_policy(torch.ones_like(ref_probs) / len(ref_probs), rewards, lengths, beta)


EXERCISES = (
    Exercise(
        "12.1",
        cases=((REF_PROBS, REWARDS, 0.5), (REF_PROBS.flip(0), REWARDS, 2.0)),
        answer=nats_gained,
        mistakes=(
            _gained_without_z,
            _gained_in_reward,
            _gained_above_the_mean,
            _gained_of_z,
            _gained_z_in_reward,
            _gained_optimum,
        ),
    ),
    Exercise(
        "12.2",
        cases=((REF_PROBS, FEATURES, 0, 1, 0.5), (REF_PROBS, FEATURES, 3, 0, 2.0)),
        answer=chosen_rate,
        mistakes=(
            _rate_without_mean,
            _rate_of_margin,
            _rate_without_half,
            _rate_without_beta,
            _rate_of_rejected,
            _rate_plain_mean,
            _rate_turned_round,
        ),
    ),
    Exercise(
        "12.3",
        cases=((REF_PROBS, REWARDS, LENGTHS, 0.5), (REF_PROBS, -REWARDS, LENGTHS, 2.0)),
        answer=mean_policy,
        mistakes=(
            _mean_normalised,
            _mean_of_sums,
            _mean_divided,
            _mean_not_normalised,
            _mean_without_reference,
        ),
    ),
)
