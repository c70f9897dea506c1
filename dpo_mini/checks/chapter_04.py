"""Chapter 04: the reward read off the policy."""

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, draws, other_instances, random_policies
from dpo_mini.checks.theorems import differ_alike, optimum, sum_to_one

REF = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
POLICY = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)
WIDER_REF = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
WIDER_REWARDS = torch.tensor([2.0, 1.0, 0.0, 0.3], dtype=torch.float64)
WIDER_POLICY = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
WIDER_EVEN = torch.full((4,), 0.25, dtype=torch.float64)
TOKENS = torch.tensor([[-0.2, -1.1, -0.7], [-2.0, -0.3, -0.4]], dtype=torch.float64)
REF_TOKENS = torch.tensor([[-0.9, -0.8, -1.3], [-1.0, -0.6, -0.1]], dtype=torch.float64)
LONGER = torch.tensor(
    [[-0.5, -0.1, -2.2, -0.3], [-1.4, -0.2, -0.9, -0.6], [-0.1, -3.0, -0.2, -0.8]],
    dtype=torch.float64,
)
REF_LONGER = torch.tensor(
    [[-0.7, -0.4, -1.0, -0.2], [-1.1, -0.9, -0.3, -0.5], [-0.6, -1.7, -1.2, -0.4]],
    dtype=torch.float64,
)


def judge_implied_rewards(implied_rewards):
    """4.1: all answers of two tokens; e^(implied / beta) turns the reference into the policy."""
    for seed, (_, _, beta) in enumerate(other_instances(seed=4)):
        n = 3 + seed
        first, then = (draws(n, seed=seed), draws(n, n, seed=seed + 10))
        ref_first, ref_then = draws(n, seed=seed + 20), draws(n, n, seed=seed + 30)
        token_logps = _of_all_answers(first, then)
        ref_token_logps = _of_all_answers(ref_first, ref_then)
        tilted = (
            ref_token_logps.sum(1) + implied_rewards(token_logps, ref_token_logps, beta) / beta
        ).exp()
        agree(
            tilted,
            token_logps.sum(1).exp(),
            "pi_ref e^(implied / beta) is not the policy whose log-probabilities you were given",
        )


def _of_all_answers(first, then):
    """From logits of the first token `[V]` and of the second, given the first, `[V, V]`: log-
    probabilities of the tokens of all answers, `[V * V, 2]`.
    """
    n = len(first)
    tokens = [first.log_softmax(0)[:, None].expand(n, n), then.log_softmax(1)]
    return torch.stack(tokens, -1).flatten(0, 1)


def _mean_of_the_tokens(token_logps, ref_token_logps, beta):
    """The mean over the tokens: an answer's log-probability is their sum."""
    return beta * (token_logps - ref_token_logps).mean(1)


def _without_the_reference(token_logps, ref_token_logps, beta):
    """The reference is missing: this is beta times the log-probability, not a log-ratio."""
    return beta * token_logps.sum(1)


def _log_ratio_in_nats(token_logps, ref_token_logps, beta):
    """Beta is missing: this is the log-ratio in nats."""
    return (token_logps - ref_token_logps).sum(1)


def _beta_divides(token_logps, ref_token_logps, beta):
    """Beta divides: nats times reward per nat gives reward."""
    return (token_logps - ref_token_logps).sum(1) / beta


def _last_token_alone(token_logps, ref_token_logps, beta):
    """Only the last token is counted: every token of the answer is."""
    return beta * (token_logps - ref_token_logps)[:, -1]


def _ratio_of_logarithms(token_logps, ref_token_logps, beta):
    """One logarithm is divided by the other: the logarithm of a ratio is a difference."""
    return beta * token_logps.sum(1) / ref_token_logps.sum(1)


def _ratio_of_probabilities(token_logps, ref_token_logps, beta):
    """The ratio of the probabilities lacks its logarithm."""
    return beta * (token_logps - ref_token_logps).sum(1).exp()


def judge_representative(representative):
    """4.2: it is of the same class, and its Z is 1."""
    for (ref_probs, _), (rewards, _), beta in other_instances(seed=1):
        found = representative(rewards, ref_probs, beta)
        differ_alike(found, rewards, "two answers no longer differ as they did")
        z = (ref_probs * (found / beta).exp()).sum()
        agree(z, 1.0, "Z of what you return is not 1, so it is no implied reward")


def _without_beta(rewards, ref_probs, beta):
    """log Z is in nats: multiply it by beta before it is taken off a reward."""
    return rewards - torch.log((ref_probs * torch.exp(rewards / beta)).sum())


def _mean_taken_off(rewards, ref_probs, beta):
    """This reward has mean 0 under the reference; the one that is wanted has Z = 1."""
    return rewards - (ref_probs * rewards).sum()


def _best_taken_off(rewards, ref_probs, beta):
    """This reward has maximum 0; the one that is wanted has Z = 1."""
    return rewards - rewards.max()


def _plain_sum(rewards, ref_probs, beta):
    """The sum lacks the reference: Z weighs each completion by its probability."""
    return rewards - beta * torch.logsumexp(rewards / beta, 0)


def _added(rewards, ref_probs, beta):
    """The sign is reversed: beta log Z is added, so log Z doubles where it should vanish."""
    return rewards + beta * torch.log((ref_probs * torch.exp(rewards / beta)).sum())


def _beta_one_inside(rewards, ref_probs, beta):
    """Inside Z the rewards are not divided by beta."""
    return rewards - beta * torch.log((ref_probs * torch.exp(rewards)).sum())


def _z_for_log_z(rewards, ref_probs, beta):
    """The logarithm is missing: beta Z is taken off where beta log Z is due."""
    return rewards - beta * (ref_probs * torch.exp(rewards / beta)).sum()


def _reference_left_in(rewards, ref_probs, beta):
    """This is beta log pi*: an implied reward has the reference's log-probability taken off."""
    return beta * torch.log_softmax(ref_probs.log() + rewards / beta, 0)


def judge_anchored_rewards(anchored_rewards):
    """4.3: read off a policy that was made with known rewards, they come back."""
    for (ref_probs, _), (rewards, _), beta in other_instances(seed=2):
        probs = optimum(ref_probs, rewards, beta)
        agree(
            anchored_rewards(probs, ref_probs, beta, float(rewards[0])),
            rewards,
            "the policy was made with known rewards, and these are others",
        )


def _not_anchored(probs, ref_probs, beta, reward_of_first):
    """These are implied rewards: the one that is known fixes the number beta log Z still to add."""
    return beta * torch.log(probs / ref_probs)


def _first_stays(probs, ref_probs, beta, reward_of_first):
    """The known reward is added on top: take the implied reward of answer 0 off first."""
    return beta * torch.log(probs / ref_probs) + reward_of_first


def _reference_forgotten(probs, ref_probs, beta, reward_of_first):
    """The reference is missing: what it liked already would look rewarded."""
    return reward_of_first + beta * torch.log(probs / probs[0])


def _in_nats(probs, ref_probs, beta, reward_of_first):
    """Beta is missing: the differences are in nats, not in units of reward."""
    odds = (probs / ref_probs) / (probs[0] / ref_probs[0])
    return reward_of_first + torch.log(odds)


def _logarithm_forgotten(probs, ref_probs, beta, reward_of_first):
    """The logarithm is missing: a difference of ratios is not one of rewards."""
    ratios = probs / ref_probs
    return reward_of_first + beta * (ratios - ratios[0])


def _scaled(probs, ref_probs, beta, reward_of_first):
    """The implied rewards are multiplied to fit: their unit is right, a constant is missing."""
    implied = beta * torch.log(probs / ref_probs)
    return implied * reward_of_first / implied[0]


def _overwritten(probs, ref_probs, beta, reward_of_first):
    """Only answer 0 has been moved: the same constant is missing from every answer."""
    implied = beta * torch.log(probs / ref_probs)
    return torch.cat([torch.tensor([reward_of_first], dtype=implied.dtype), implied[1:]])


def judge_move_to_reference(move_to_reference):
    """4.4: optima of one reward and beta at two references, made with both known."""
    for seed, ((old, _), (rewards, _), beta) in enumerate(other_instances(seed=3)):
        new = random_policies(old, seed)
        optima = [optimum(ref, rewards, beta) for ref in (old, new)]
        got = move_to_reference(optima[0], old, new)
        sum_to_one(got)
        agree(got, optima[1], "the optimum of the same reward at the new reference is another")


def _old_kept(probs, old_ref_probs, new_ref_probs):
    """The old reference is still inside: divide it out before the new one comes in."""
    weights = probs * new_ref_probs
    return weights / weights.sum()


def _no_new(probs, old_ref_probs, new_ref_probs):
    """This is e^(r/beta) made to sum to 1: the new reference has not come in."""
    weights = probs / old_ref_probs
    return weights / weights.sum()


def _no_sum(probs, old_ref_probs, new_ref_probs):
    """The weights are right but do not sum to 1: a new reference has a new Z."""
    return probs * new_ref_probs / old_ref_probs


def _turned_round(probs, old_ref_probs, new_ref_probs):
    """The references have changed places: this moves from the new one to the old."""
    weights = probs * old_ref_probs / new_ref_probs
    return weights / weights.sum()


def _moved_by_the_difference(probs, old_ref_probs, new_ref_probs):
    """The references' difference is added: the reward tilts a reference by factors."""
    return probs + new_ref_probs - old_ref_probs


EXERCISES = (
    Exercise(
        "4.1",
        cases=((TOKENS, REF_TOKENS, 0.5), (LONGER, REF_LONGER, 2.0)),
        judge=judge_implied_rewards,
        mistakes=(
            _mean_of_the_tokens,
            _without_the_reference,
            _log_ratio_in_nats,
            _beta_divides,
            _last_token_alone,
            _ratio_of_logarithms,
            _ratio_of_probabilities,
        ),
        shape=lambda token_logps, ref_token_logps, beta: token_logps.shape[:1],
    ),
    Exercise(
        "4.2",
        cases=((REWARDS, REF, 0.5), (WIDER_REWARDS, WIDER_REF, 2.0)),
        judge=judge_representative,
        mistakes=(
            _without_beta,
            _mean_taken_off,
            _best_taken_off,
            _plain_sum,
            _added,
            _beta_one_inside,
            _z_for_log_z,
            _reference_left_in,
        ),
        shape=lambda rewards, ref_probs, beta: rewards.shape,
    ),
    Exercise(
        "4.3",
        cases=((POLICY, REF, 0.5, 3.0), (WIDER_POLICY, WIDER_REF, 2.0, -1.0)),
        judge=judge_anchored_rewards,
        mistakes=(
            _not_anchored,
            _first_stays,
            _reference_forgotten,
            _in_nats,
            _logarithm_forgotten,
            _scaled,
            _overwritten,
        ),
        shape=lambda probs, ref_probs, beta, reward_of_first: probs.shape,
    ),
    Exercise(
        "4.4",
        cases=((POLICY, REF, REF.flip(0)), (WIDER_POLICY, WIDER_REF, WIDER_EVEN)),
        judge=judge_move_to_reference,
        mistakes=(
            _old_kept,
            _no_new,
            _no_sum,
            _turned_round,
            _moved_by_the_difference,
        ),
        shape=lambda probs, old_ref_probs, new_ref_probs: probs.shape,
    ),
)
