"""Plausible wrong answers to the homework, a few words of each one's sentence, and right ones."""

import torch
from torch.nn.functional import logsigmoid

from dpo_mini import losses
from dpo_mini.checks.homework import instance

REFS, TABLES, BETA = instance(seed=0)


# --- 1 derive the optimum --------------------------------------------------------------------


def slope_times_p(probs, ref_probs, rewards, beta):
    return probs * (rewards - beta * torch.log(probs / ref_probs))


def slope_of_entropy(probs, ref_probs, rewards, beta):
    return rewards - beta * (torch.log(probs) + 1)


def slope_with_the_sign_wrong(probs, ref_probs, rewards, beta):
    return rewards + beta * (torch.log(probs / ref_probs) + 1)


def slope_of_the_kl_turned_round(probs, ref_probs, rewards, beta):
    return rewards + beta * ref_probs / probs


def slope_without_the_one(probs, ref_probs, rewards, beta):
    return rewards - beta * torch.log(probs / ref_probs)


def multiplier_in_nats(ref_probs, rewards, beta):
    return torch.logsumexp(torch.log(ref_probs) + rewards / beta, 0) - 1


def multiplier_without_beta(ref_probs, rewards, beta):
    return beta * torch.logsumexp(torch.log(ref_probs) + rewards / beta, 0)


def multiplier_without_reference(ref_probs, rewards, beta):
    return beta * torch.logsumexp(rewards / beta, 0) - beta


def multiplier_of_the_mean(ref_probs, rewards, beta):
    return ref_probs @ rewards - beta


def policy_unnormalised(ref_probs, rewards, beta):
    return ref_probs * torch.exp(rewards / beta)


def policy_without_reference(ref_probs, rewards, beta):
    return torch.softmax(rewards / beta, 0)


def policy_at_beta_upside_down(ref_probs, rewards, beta):
    return torch.softmax(torch.log(ref_probs) + rewards * beta, 0)


def policy_of_the_worst(ref_probs, rewards, beta):
    return torch.softmax(torch.log(ref_probs) - rewards / beta, 0)


def policy_that_overflows(ref_probs, rewards, beta):
    weights = ref_probs * torch.exp(rewards / beta)
    return weights / weights.sum()


def best_policy(ref_probs, rewards, beta):
    return torch.softmax(torch.log(ref_probs) + rewards / beta, 0)


def shortfall_turned_round(probs, ref_probs, rewards, beta):
    best = best_policy(ref_probs, rewards, beta)
    return beta * torch.xlogy(best, best / probs).sum()


def shortfall_in_nats(probs, ref_probs, rewards, beta):
    return torch.xlogy(probs, probs / best_policy(ref_probs, rewards, beta)).sum()


def shortfall_from_the_reference(probs, ref_probs, rewards, beta):
    return beta * torch.xlogy(probs, probs / ref_probs).sum()


# --- 2 watch Z cancel, and stay --------------------------------------------------------------


def log_partitions(ref_probs, rewards, beta):
    return torch.logsumexp(torch.log(ref_probs) + rewards / beta, 1)


def margin_in_nats(ref_probs, rewards, beta):
    z = log_partitions(ref_probs, rewards, beta)
    return z[0] - z[1]


def margin_turned_round(ref_probs, rewards, beta):
    z = log_partitions(ref_probs, rewards, beta)
    return beta * (z[1] - z[0])


def margin_of_means(ref_probs, rewards, beta):
    means = (ref_probs * rewards).sum(1)
    return means[0] - means[1]


def ranking_of_neighbours(logratios, beta):
    return logsigmoid(beta * (logratios[:-1] - logratios[1:])).sum()


def ranking_with_replacement(logratios, beta):
    return torch.log_softmax(beta * logratios, 0).sum()


def ranking_without_beta(logratios, beta):
    return sum(logratios[k] - logratios[k:].logsumexp(0) for k in range(len(logratios)))


def always_loses(likelihood):
    return True


def scale_for_shift(likelihood):
    rewards = torch.tensor([1.0, 1.0, 2.0])
    return bool(abs(likelihood(rewards) - likelihood(rewards + 1)) < 1e-9)  # equal rewards hide it


def one_reward_moved(likelihood):
    rewards = torch.tensor([0.7, -0.4, 0.2])
    moved = rewards + torch.tensor([1.0, 0.0, 0.0])
    return bool(abs(likelihood(rewards) - likelihood(moved)) < 1e-9)


def two_rewards_moved(likelihood):
    rewards = torch.tensor([0.7, -0.4, 0.2])
    moved = rewards + torch.tensor([1.0, 1.0, 0.0])
    return bool(abs(likelihood(rewards) - likelihood(moved)) < 1e-9)


def link_ignored(reward_gap):
    return reward_gap


def link_probability(reward_gap):
    return torch.special.ndtr(reward_gap / 2**0.5)


def link_log_probability(reward_gap):
    return torch.special.ndtr(reward_gap / 2**0.5).log()


def link_without_root_two(reward_gap):
    return torch.logit(torch.special.ndtr(reward_gap))


# --- 3 score a sample, and clip it -----------------------------------------------------------


def score_by_columns(logits):
    return torch.eye(len(logits)) - torch.softmax(logits, 0)[:, None]


def score_of_the_probability(logits):
    p = torch.softmax(logits, 0)
    return p[:, None] * (torch.eye(len(logits)) - p)


def score_turned_round(logits):
    return torch.softmax(logits, 0) - torch.eye(len(logits))


def score_doubled(logits):
    return 2 * (torch.eye(len(logits)) - torch.softmax(logits, 0))


def estimates(logits, rewards, baseline):
    p = torch.softmax(logits, 0)
    return p, (rewards - baseline)[:, None] * (torch.eye(len(logits)) - p)


def variance_without_baseline(logits, rewards, baseline):
    p, table = estimates(logits, rewards, 0.0)
    return p @ (table - p @ table).square().sum(1)


def variance_unweighted(logits, rewards, baseline):
    _, table = estimates(logits, rewards, baseline)
    return (table - table.mean(0)).square().sum(1).mean()


def variance_second_moment(logits, rewards, baseline):
    p = torch.softmax(logits, 0)
    estimates = (rewards - baseline)[:, None] * (torch.eye(len(logits)) - p)
    return p @ estimates.square().sum(1)


def variance_rooted(logits, rewards, baseline):
    p, table = estimates(logits, rewards, baseline)
    return (p @ (table - p @ table).square().sum(1)).clamp(min=0).sqrt()


def neighbours_and_itself(rewards):
    return rewards - rewards.mean()


def neighbours_over_all(rewards):
    return rewards - (rewards.sum() - rewards) / len(rewards)


def neighbours_normalised(rewards):
    return (rewards - rewards.mean()) / rewards.std(correction=0)


def clip_always(logps, old_logps, advantages, clip_eps):
    return -torch.exp(logps - old_logps).clamp(1 - clip_eps, 1 + clip_eps) * advantages


def clip_never(logps, old_logps, advantages, clip_eps):
    return -torch.exp(logps - old_logps) * advantages


def clip_as_an_objective(logps, old_logps, advantages, clip_eps):
    ratios = torch.exp(logps - old_logps)
    return torch.minimum(ratios * advantages, ratios.clamp(1 - clip_eps, 1 + clip_eps) * advantages)


# --- 4 a loss of your own --------------------------------------------------------------------


def brier(margin):
    return torch.sigmoid(-margin) ** 2


def loss_of_the_chosen(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    return brier(beta * (chosen - ref_chosen))


def loss_without_reference(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    return brier(beta * (chosen - rejected))


def loss_turned_round(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    return brier(-beta * (chosen - ref_chosen - rejected + ref_rejected))


def loss_without_beta(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    return brier(chosen - ref_chosen - rejected + ref_rejected)


def loss_of_dpo(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    return 2 * losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)


def loss_of_boosting(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    return torch.exp(-0.5 * beta * (chosen - ref_chosen - rejected + ref_rejected))


def loss_linear(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    return torch.sigmoid(-beta * (chosen - ref_chosen - rejected + ref_rejected))


def loss_of_ipo(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    return (beta * (chosen - ref_chosen - rejected + ref_rejected) - 0.5) ** 2


def slopes_of_the_mean(loss, margins, wins):
    margins = margins.clone().requires_grad_()
    mean = wins * loss(margins) + (1 - wins) * loss(-margins)
    return torch.autograd.grad(mean.sum(), margins)[0]


def proper_at_a_fair_coin(loss):
    half = torch.tensor([0.5])
    return bool(slopes_of_the_mean(loss, torch.zeros(1), half).abs() < 1e-9)


def proper_if_never_below_zero(loss):
    return bool((loss(torch.linspace(-9, 9, 41)) >= 0).all())


def proper_if_smooth_and_bounded_below(loss):
    m = torch.linspace(-4, 4, 41).requires_grad_()
    (slopes,) = torch.autograd.grad(loss(m).sum(), m)
    kinked = bool((slopes.diff().abs() > 0.7).any())
    return not kinked and proper_if_never_below_zero(loss)


def proper_if_the_slope_is_bounded(loss):
    m = torch.tensor([-2.1, 0.3, 1.6])
    right = bool((slopes_of_the_mean(loss, m, torch.sigmoid(m)).abs() < 1e-9).all())
    return right and bool(loss(torch.tensor([-60.0])) < 100)


def proper_the_wrong_way(loss):
    m = torch.tensor([-2.1, 0.3, 1.6])
    return bool((slopes_of_the_mean(loss, m, torch.sigmoid(-m)).abs() < 1e-9).all())


def ipo_as_dpo(win_prob, beta):
    return torch.logit(win_prob) / beta


def ipo_from_zero(win_prob, beta):
    return win_prob / (2 * beta)


def ipo_twice(win_prob, beta):
    return (2 * win_prob - 1) / beta


def flips_again(loss, margin, flip_rate):
    return (1 - flip_rate) * loss(margin) + flip_rate * loss(-margin)


def flips_not_rescaled(loss, margin, flip_rate):
    return (1 - flip_rate) * loss(margin) - flip_rate * loss(-margin)


def flips_exchanged(loss, margin, flip_rate):
    share = 1 - 2 * flip_rate
    return ((1 - flip_rate) * loss(-margin) - flip_rate * loss(margin)) / share


def flips_too_many(loss, margin, flip_rate):
    return ((1 + flip_rate) * loss(margin) - flip_rate * loss(-margin)) / 1.0


# --- numbers: those of the instance of seed 0 --------------------------------------------------


def numbers(sheet: int) -> list[float]:
    """The right numbers, by sums written out."""
    weights = REFS * torch.exp(TABLES / BETA)
    z, best = weights.sum(1), weights / weights.sum(1, keepdim=True)
    q, r = REFS[0], TABLES[0]
    if sheet == 1:
        ceiling = BETA * z[0].log()
        four = (z[0].log(), ceiling, ceiling - BETA, best[0, 0])
    elif sheet == 2:
        gap = TABLES[0, 0] - TABLES[1, 0]
        implied = BETA * (best / REFS).log()
        four = (*BETA * z.log(), gap.sigmoid(), (implied[0, 0] - implied[1, 0]).sigmoid())
    elif sheet == 3:
        lengths = (torch.eye(4) - q).square().sum(1)
        baseline = (q * lengths * r).sum() / (q * lengths).sum()
        slope = q * (r - q @ r)
        noise = [(q * lengths * (r - b) ** 2).sum() - slope @ slope for b in (0.0, baseline)]
        four = (q @ r, baseline, *noise)
    else:
        wins = (r[0] - r[1]).sigmoid()
        odds = (best[0, 0] / best[0, 1]).log()
        four = (wins, (r[0] - r[1]) / BETA, (2 * wins - 1) / (2 * BETA), odds)
    return [round(float(x), 4) for x in four]


def changed(sheet: int, **places: float) -> list[float]:
    """The right numbers but for some: `at_1=0.3` is the second."""
    four = numbers(sheet)
    for place, value in places.items():
        four[int(place[-1])] = value
    return four


ONE, TWO, THREE, FOUR = (numbers(sheet) for sheet in (1, 2, 3, 4))

MISTAKES = {
    "h1-slope-test": {
        "add 1 to every reward": slope_times_p,
        "is it in yours": slope_of_entropy,
        "leaving the reference pays": slope_with_the_sign_wrong,
        "the KL is reversed": slope_of_the_kl_turned_round,
        "product rule": slope_without_the_one,
    },
    "h1-multiplier-test": {
        "it is no log of Z": multiplier_in_nats,
        "the p sum to 1/e": multiplier_without_beta,
        "weighed by q": multiplier_without_reference,
        "do not sum to 1": multiplier_of_the_mean,
    },
    "h1-policy-test": {
        "do not sum to 1": policy_unnormalised,
        "the reference itself is best": policy_without_reference,
        "only r / beta matters": policy_at_beta_upside_down,
        "mind the sign": policy_of_the_worst,
        "use logarithms": policy_that_overflows,
    },
    "h1-shortfall-test": {
        "The KL is reversed": shortfall_turned_round,
        "Beta is missing": shortfall_in_nats,
        "the distance from the reference": shortfall_from_the_reference,
    },
    "h1-numbers-test": {
        "is a probability": changed(1, at_3=ONE[3] - 2),
        "differ by beta": changed(1, at_2=ONE[1]),
        "in nats and J* in units": changed(1, at_1=ONE[0], at_2=ONE[0] - BETA),
        "not the chance of answer 1": changed(1, at_3=float(REFS[0, 0])),
    },
    "h2-margin-test": {
        "in nats": margin_in_nats,
        "The sign is reversed": margin_turned_round,
        "Jensen": margin_of_means,
    },
    "h2-ranking-test": {
        "neighbours": ranking_of_neighbours,
        "already placed": ranking_with_replacement,
        "Beta is missing": ranking_without_beta,
    },
    "h2-tester-test": {
        "a thumb speaks of one answer": always_loses,
        "not a factor": scale_for_shift,
        "one constant moves both": one_reward_moved,
        "moves all three": two_rewards_moved,
    },
    "h2-link-test": {
        "if raters were Bradley-Terry": link_ignored,
        "how often it wins": link_probability,
        "change its sign only": link_log_probability,
        "win as often as with the raters": link_without_root_two,
    },
    "h2-numbers-test": {
        "are probabilities": changed(2, at_2=3.0),
        "between the mean reward and the best": changed(2, at_0=ONE[0] * 9),
        "the log-odds must differ": changed(2, at_3=TWO[2]),
    },
    "h3-score-test": {
        "each row sums to 0": score_by_columns,
        "averaged over the policy's own samples": score_of_the_probability,
        "must make it likelier": score_turned_round,
        "the length is not": score_doubled,
    },
    "h3-variance-test": {
        "changes nothing in yours": variance_without_baseline,
        "weigh samples by the policy": variance_unweighted,
        "Is the mean taken off": variance_second_moment,
        "take no root": variance_rooted,
    },
    "h3-neighbours-test": {
        "holds the sample's own reward": neighbours_and_itself,
        "divided by K": neighbours_over_all,
        "GRPO": neighbours_normalised,
    },
    "h3-clip-test": {
        "gets no push back": clip_always,
        "Nothing is clipped": clip_never,
        "a loss has the other sign": clip_as_an_objective,
    },
    "h3-numbers-test": {
        "lie among the rewards": changed(3, at_1=7.0),
        "cannot add noise": changed(3, at_2=THREE[3], at_3=THREE[2]),
        "saves b^2": changed(3, at_1=THREE[0]),
    },
    "h4-form-test": {
        "as log Z does": loss_of_the_chosen,
        "only ratios to the reference": loss_without_reference,
        "must lower the loss": loss_turned_round,
        "beta d alone": loss_without_beta,
        "NaN or an infinity": loss_of_boosting,
        "DPO's own loss": loss_of_dpo,
    },
    "h4-end-test": {
        "runs to one answer": loss_linear,
        "where beta is 1": loss_without_beta,
        "ends at another policy": loss_of_ipo,
    },
    "h4-proper-test": {
        "DPO's own loss finds the truth": proper_the_wrong_way,
        "never content": proper_at_a_fair_coin,
        "content with margin 1": proper_if_never_below_zero,
        "IPO's": proper_if_smooth_and_bounded_below,
        "its slope has no bound": proper_if_the_slope_is_bounded,
    },
    "h4-ipo-test": {
        "IPO stays finite": ipo_as_dpo,
        "a fair coin says nothing": ipo_from_zero,
        "gets the target": ipo_twice,
    },
    "h4-flips-test": {
        "nothing to correct": flips_exchanged,
        "flips once more": flips_again,
        "must stay 1": flips_not_rescaled,
        "not the clean loss": flips_too_many,
    },
    "h4-numbers-test": {
        "is a probability": changed(4, at_0=-0.3),
        "must be the first number": changed(4, at_1=FOUR[1] * BETA),
        "holds its reference too": changed(4, at_3=FOUR[1]),
        "how much more often": changed(4, at_2=FOUR[1]),
    },
}
