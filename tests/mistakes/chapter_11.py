"""Plausible wrong answers to the exercises of chapter 11, and a word of each one's sentence."""

import torch


def margin_that_trusts_the_labels(shown, flip_rate):
    return shown.log() - (1 - shown).log()


def margin_with_label_smoothing(shown, flip_rate):
    return torch.logit(shown + flip_rate - 2 * flip_rate * shown)


def margin_less_the_flips(shown, flip_rate):
    return torch.logit(shown - flip_rate)


def margin_that_is_a_probability(shown, flip_rate):
    return 0.5 + (shown - 0.5) / (1 - 2 * flip_rate)


def policy_from_uniform(ref_probs, wins, beta):
    return (wins.mean(1) / beta).softmax(0)


def policy_by_columns(ref_probs, wins, beta):
    return (ref_probs.log() + wins.mean(0) / beta).softmax(0)


def policy_of_totals(ref_probs, wins, beta):
    return (ref_probs.log() + wins.sum(1) / beta).softmax(0)


def policy_against_others(ref_probs, wins, beta):
    n = len(wins)
    off_diagonal = wins * (1 - torch.eye(n).to(wins))
    return (ref_probs.log() + off_diagonal.sum(1) / (n - 1) / beta).softmax(0)


def policy_of_logits(ref_probs, wins, beta):
    return (ref_probs.log() + wins.mean(1).logit() / beta).softmax(0)


def policy_with_two_beta(ref_probs, wins, beta):
    return (ref_probs.log() + wins.mean(1) / (2 * beta)).softmax(0)


def nash_of_the_strong(wins):
    margins = torch.tensor([wins[0, 1], wins[1, 2], wins[2, 0]]) - 0.5
    return margins / margins.sum()


def nash_of_the_weak(wins):
    lost = 0.5 - torch.tensor([wins[0, 2], wins[1, 0], wins[2, 1]])
    return lost / lost.sum()


def nash_of_win_rates(wins):
    return wins.mean(1) / wins.mean(1).sum()


def nash_of_the_winner(wins):
    policy = torch.zeros(3)
    policy[wins.mean(1).argmax()] = 1.0
    return policy


def nash_without_a_half(wins):
    total = wins[1, 2] + wins[2, 0] + wins[0, 1]
    return torch.tensor([wins[1, 2], wins[2, 0], wins[0, 1]]) / total


def margin_rescaled_once(shown, flip_rate):
    return torch.logit((shown - flip_rate) / (1 - flip_rate))


def margin_divided(shown, flip_rate):
    return torch.logit(shown) / (1 - 2 * flip_rate)


def margin_of_log_p(shown, flip_rate):
    return ((shown - flip_rate) / (1 - 2 * flip_rate)).log()


def margin_as_difference(shown, flip_rate):
    return (2 * shown - 1) / (1 - 2 * flip_rate)


def policy_against_reference(ref_probs, wins, beta):
    return (ref_probs.log() + wins @ ref_probs / beta).softmax(0)


def policy_of_mean_log_odds(ref_probs, wins, beta):
    return (ref_probs.log() + wins.logit().mean(1) / beta).softmax(0)


def nash_by_softmax(wins):
    return torch.stack([wins[1, 2], wins[2, 0], wins[0, 1]]).softmax(0)


def nash_as_uniform(wins):
    return torch.full((3,), 1 / 3)


MISTAKES = {
    "11.1": {
        "labels as shown": margin_that_trusts_the_labels,
        "once more": margin_with_label_smoothing,
        "must again be a probability": margin_less_the_flips,
        "log-odds": margin_that_is_a_probability,
        "This undoes flips in one direction": margin_rescaled_once,
        "The margin of the labels is divided": margin_divided,
        "This is the log-probability before the flips": margin_of_log_p,
        "This is how much more often the first answer wins": margin_as_difference,
    },
    "11.2": {
        "reference is missing": policy_from_uniform,
        "averages columns": policy_by_columns,
        "sums wins": policy_of_totals,
        "itself included": policy_against_others,
        "linear in the probability": policy_of_logits,
        "factor 2": policy_with_two_beta,
        "The opponents are weighted by the reference": policy_against_reference,
        "These are means of log-odds, a Bradley-Terry reward": policy_of_mean_log_odds,
    },
    "11.4": {
        "with which it wins": nash_of_the_strong,
        "with which it is beaten": nash_of_the_weak,
        "shares of all wins": nash_of_win_rates,
        "something beats it": nash_of_the_winner,
        "one half are needed": nash_without_a_half,
        "A softmax is taken of the margins": nash_by_softmax,
        "plays all three alike": nash_as_uniform,
    },
}
