"""Chapter 03: the partition function."""

import math

import torch

from dpo_mini.checks import Exercise
from dpo_mini.checks.homework import agree, other_instances
from dpo_mini.checks.theorems import every_draw, kl, optimum

PROBS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
WIDER = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
WIDER_REWARDS = torch.tensor([2.0, 1.0, 0.0, 0.3], dtype=torch.float64)


def judge_log_z_of_tokens(log_z_of_tokens):
    """3.1: the sum over every sentence, one by one."""
    for (token_probs, _), (token_rewards, _), beta in other_instances(seed=1):
        for n_tokens in (1, 2, 4):
            said, chances = every_draw(token_probs, n_tokens)
            z = chances @ (token_rewards[said].sum(1) / beta).exp()
            agree(
                log_z_of_tokens(token_probs, token_rewards, beta, n_tokens),
                z.log(),
                "the sum over every sentence, one by one, has another logarithm",
            )


def _reward_times_length(token_probs, token_rewards, beta, n_tokens):
    """The length multiplies the reward inside the sum: that is one token said n times over, where
    each place draws a token of its own.
    """
    return torch.log((token_probs * torch.exp(n_tokens * token_rewards / beta)).sum())


def _one_token(token_probs, token_rewards, beta, n_tokens):
    """This is log Z of a single token: every one of the n places has such a factor."""
    return torch.log((token_probs * torch.exp(token_rewards / beta)).sum())


def _mean_reward(token_probs, token_rewards, beta, n_tokens):
    """The logarithm of an average is not the average of the logarithm: this is E[r]/beta, which
    Jensen's inequality puts below log Z.
    """
    return n_tokens * (token_probs * token_rewards).sum() / beta


def _no_base(token_probs, token_rewards, beta, n_tokens):
    """The token probabilities are missing: the sum is over the reference, not a plain count."""
    return n_tokens * torch.logsumexp(token_rewards / beta, 0)


def _sum_for_power(token_probs, token_rewards, beta, n_tokens):
    """The factors of the places are added up: they multiply, so their logarithms add."""
    return torch.log(n_tokens * (token_probs * torch.exp(token_rewards / beta)).sum())


def _beta_outside(token_probs, token_rewards, beta, n_tokens):
    """Beta divides the logarithm: it belongs in the exponent, below the reward."""
    return n_tokens * torch.log((token_probs * torch.exp(token_rewards)).sum()) / beta


def judge_draws_needed(draws_needed):
    """3.2: the relative error of N draws, over all that N draws can be, takes N draws."""
    for (ref_probs, _), (rewards, _), beta in other_instances(seed=2):
        weights = (rewards / beta).exp()
        z = ref_probs @ weights
        for n_draws in (1, 2, 3):
            drawn, chances = every_draw(ref_probs, n_draws)
            variance = chances @ (weights[drawn].mean(1) / z - 1) ** 2
            agree(
                draws_needed(ref_probs, rewards, beta, float(variance.sqrt())),
                n_draws,
                "the exact relative error of N draws, asked of your function, does not give N",
            )


def _chi_squared(ref_probs, rewards, beta):
    weights = torch.exp(rewards / beta)
    weights = weights / (ref_probs * weights).sum()
    return (ref_probs * (weights - 1) ** 2).sum()


def _error_not_squared(ref_probs, rewards, beta, error):
    """The error enters once where it should be squared: half the error costs four times the
    draws.
    """
    return _chi_squared(ref_probs, rewards, beta) / error


def _absolute(ref_probs, rewards, beta, error):
    """This is the variance of exp(r/beta) itself: for a relative error divide it by Z squared."""
    weights = torch.exp(rewards / beta)
    z = (ref_probs * weights).sum()
    return (ref_probs * (weights - z) ** 2).sum() / error**2


def _second_moment(ref_probs, rewards, beta, error):
    """The mean is not taken off: chi-squared is the second moment of the weight minus 1."""
    return (_chi_squared(ref_probs, rewards, beta) + 1) / error**2


def _kl_for_chi(ref_probs, rewards, beta, error):
    """KL stands where chi-squared belongs: the variance is of the weight, not of its logarithm."""
    best = optimum(ref_probs, rewards, beta)
    return kl(best, ref_probs) / error**2


def _divided_by_z(ref_probs, rewards, beta, error):
    """The variance is divided by Z: for a relative error it is Z squared."""
    weights = torch.exp(rewards / beta)
    z = (ref_probs * weights).sum()
    return (ref_probs * (weights - z) ** 2).sum() / z / error**2


def _reverse_chi(ref_probs, rewards, beta, error):
    """The chi-squared is reversed: the draws come from the reference."""
    best = optimum(ref_probs, rewards, beta)
    return (best * (ref_probs / best - 1) ** 2).sum() / error**2


def _rounded_up(ref_probs, rewards, beta, error):
    """This is rounded: return the number as it is."""
    return torch.ceil(_chi_squared(ref_probs, rewards, beta) / error**2)


def judge_estimate_log_z(estimate_log_z):
    """3.3: over all that N draws can be, the estimate is Z on average, and so is its variance."""
    for (ref_probs, _), (rewards, _), beta in other_instances(seed=3):
        weights = (rewards / beta).exp()
        z = ref_probs @ weights
        variance = ref_probs @ (weights - z) ** 2
        for n_draws in (2, 3):
            drawn, chances = every_draw(ref_probs, n_draws)
            log_z, error = torch.stack(
                [estimate_log_z(rewards[said], beta) for said in drawn]
            ).unbind(1)
            agree(
                chances @ (log_z - z.log()).exp(),
                1.0,
                "averaged over all that N draws can be, your estimate is not Z",
            )
            agree(
                chances @ ((log_z - z.log()).exp() * error) ** 2 * z**2 / variance,
                1.0 / n_draws,
                "averaged over all that N draws can be, the square of your error, times that of "
                "your estimate, is not the variance of the mean",
            )
            agree(
                (error >= 0).all(),
                True,
                "an error is negative",
            )
            raised = estimate_log_z(rewards[drawn[1]] + 400 * beta, beta)
            agree(
                raised - estimate_log_z(rewards[drawn[1]], beta),
                torch.tensor([400.0, 0.0], dtype=torch.float64),
                "with 400 beta added to every reward, log Z does not rise by 400 while its "
                "error stays",
            )


def _log_mean(scaled):
    return torch.logsumexp(scaled, 0) - math.log(len(scaled))


def _relative_error(scaled, correction=1):
    weights = (scaled - scaled.max()).exp()
    return weights.std(correction=correction) / math.sqrt(len(scaled)) / weights.mean()


def _mean_of_logs(drawn_rewards, beta):
    """This is the mean of r/beta, the logarithm inside the average: take it of the average."""
    scaled = drawn_rewards / beta
    return torch.stack([scaled.mean(), _relative_error(scaled)])


def _sum_of_draws(drawn_rewards, beta):
    """The sum over the draws is not divided by their number: Z is a mean."""
    scaled = drawn_rewards / beta
    return torch.stack([torch.logsumexp(scaled, 0), _relative_error(scaled)])


def _spread_of_one(drawn_rewards, beta):
    """The error is that of a single draw: a mean of N draws has a smaller one."""
    scaled = drawn_rewards / beta
    return torch.stack([_log_mean(scaled), _relative_error(scaled) * math.sqrt(len(scaled))])


def _divided_by_n(drawn_rewards, beta):
    """The spread of one draw is divided by N: variances fall like 1/N, and this is no variance."""
    scaled = drawn_rewards / beta
    return torch.stack([_log_mean(scaled), _relative_error(scaled) / math.sqrt(len(scaled))])


def _spread_of_rewards(drawn_rewards, beta):
    """The error is the spread of r/beta: what is averaged is its exponential."""
    scaled = drawn_rewards / beta
    return torch.stack([_log_mean(scaled), scaled.std() / math.sqrt(len(scaled))])


def _variance_by_n(drawn_rewards, beta):
    """The sample's variance is divided by N: around a mean from the same draws, use N - 1."""
    scaled = drawn_rewards / beta
    return torch.stack([_log_mean(scaled), _relative_error(scaled, correction=0)])


def _absolute_error(drawn_rewards, beta):
    """This is the error of Z itself: divide it by the estimate, for a relative one."""
    weights = torch.exp(drawn_rewards / beta)
    error = weights.std() / math.sqrt(len(weights))
    return torch.stack([weights.mean().log(), error])


def _overflows(drawn_rewards, beta):
    """A large reward makes this overflow: take the largest r/beta out before the exponential."""
    weights = torch.exp(drawn_rewards / beta)
    error = weights.std() / math.sqrt(len(weights)) / weights.mean()
    return torch.stack([weights.mean().log(), error])


def judge_count_solutions(count_solutions):
    """3.5: log Z of a formula whose solutions were counted beforehand, by its truth table."""
    generator = torch.Generator().manual_seed(3)
    for n_bits, beta in ((3, 0.5), (6, 2.0), (8, 0.25), (5, 1.25)):
        holds = torch.rand(2**n_bits, dtype=torch.float64, generator=generator) < 0.3
        log_z = (holds.double() / beta).exp().mean().log()
        agree(
            count_solutions(float(log_z), beta, n_bits),
            int(holds.sum()),
            "a truth table whose log Z you were given has another number of solutions",
        )


def _failures_forgotten(log_z, beta, n_bits):
    """Completions with reward 0 are forgotten: each still adds exp(0) = 1 times its probability."""
    return math.exp(log_z) / math.exp(1 / beta) * 2**n_bits


def _a_share(log_z, beta, n_bits):
    """This is the share of solutions: the reference gives each completion 2^-n_bits."""
    return (math.exp(log_z) - 1) / (math.exp(1 / beta) - 1)


def _log_for_z(log_z, beta, n_bits):
    """log Z is used where Z belongs."""
    return log_z / (math.exp(1 / beta) - 1) * 2**n_bits


def _beta_turned(log_z, beta, n_bits):
    """Beta is upside down: a solution weighs exp(1/beta)."""
    return (math.exp(log_z) - 1) / (math.exp(beta) - 1) * 2**n_bits


def _one_not_taken(log_z, beta, n_bits):
    """A solution adds exp(1/beta) where a failure adds 1: it raises Z by their difference only."""
    return (math.exp(log_z) - 1) / math.exp(1 / beta) * 2**n_bits


def _z_as_a_count(log_z, beta, n_bits):
    """Z is taken for a sum over completions: it is their mean, each weighs 2^-n_bits."""
    return (math.exp(log_z) - 2**n_bits) / (math.exp(1 / beta) - 1)


def _one_taken_below_only(log_z, beta, n_bits):
    """Z holds the failures too: subtract what they add before you divide."""
    return math.exp(log_z) / (math.exp(1 / beta) - 1) * 2**n_bits


def _powers_of_two(log_z, beta, n_bits):
    """These are powers of 2: log Z is in nats, which are powers of e."""
    return (2**log_z - 1) / (2 ** (1 / beta) - 1) * 2**n_bits


def _log_z_of(solutions: int, beta: float, n_bits: int) -> float:
    share = solutions / 2**n_bits
    return math.log(share * math.exp(1 / beta) + 1 - share)


EXERCISES = (
    Exercise(
        "3.1",
        cases=((PROBS, REWARDS, 0.5, 7), (WIDER, WIDER_REWARDS, 2.0, 3)),
        judge=judge_log_z_of_tokens,
        mistakes=(
            _reward_times_length,
            _one_token,
            _mean_reward,
            _no_base,
            _sum_for_power,
            _beta_outside,
        ),
    ),
    Exercise(
        "3.2",
        cases=((PROBS, REWARDS, 0.5, 0.1), (WIDER, WIDER_REWARDS, 2.0, 0.25)),
        judge=judge_draws_needed,
        mistakes=(
            _error_not_squared,
            _absolute,
            _second_moment,
            _kl_for_chi,
            _divided_by_z,
            _reverse_chi,
            _rounded_up,
        ),
    ),
    Exercise(
        "3.3",
        cases=((REWARDS, 0.5), (WIDER_REWARDS, 2.0), (200 * REWARDS, 0.5)),
        judge=judge_estimate_log_z,
        mistakes=(
            _mean_of_logs,
            _sum_of_draws,
            _spread_of_one,
            _divided_by_n,
            _spread_of_rewards,
            _variance_by_n,
            _absolute_error,
            _overflows,
        ),
        shape=lambda drawn_rewards, beta: (2,),
    ),
    Exercise(
        "3.5",
        cases=((_log_z_of(37, 0.5, 8), 0.5, 8), (_log_z_of(5, 2.0, 10), 2.0, 10)),
        judge=judge_count_solutions,
        mistakes=(
            _failures_forgotten,
            _a_share,
            _log_for_z,
            _beta_turned,
            _one_not_taken,
            _z_as_a_count,
            _one_taken_below_only,
            _powers_of_two,
        ),
    ),
)
