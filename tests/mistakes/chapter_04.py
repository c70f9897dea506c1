"""Plausible wrong answers to the exercises of chapter 04, and words of what each must be told."""


def implied_by_the_mean(token_logps, ref_token_logps, beta):
    return beta * (token_logps.mean(-1) - ref_token_logps.mean(-1))


def implied_by_the_policy_alone(token_logps, ref_token_logps, beta):
    return beta * token_logps.sum(-1)


def implied_in_nats(token_logps, ref_token_logps, beta):
    return token_logps.sum(-1) - ref_token_logps.sum(-1)


def implied_over_beta(token_logps, ref_token_logps, beta):
    return (token_logps.sum(-1) - ref_token_logps.sum(-1)) / beta


def implied_by_the_end_token(token_logps, ref_token_logps, beta):
    return beta * token_logps[:, -1] - beta * ref_token_logps[:, -1]


def implied_by_dividing_logarithms(token_logps, ref_token_logps, beta):
    return token_logps.sum(-1) / ref_token_logps.sum(-1) * beta


def implied_without_a_logarithm(token_logps, ref_token_logps, beta):
    return beta * token_logps.sum(-1).exp() / ref_token_logps.sum(-1).exp()


def representative_in_nats(rewards, ref_probs, beta):
    return rewards - (ref_probs.log() + rewards / beta).logsumexp(0)


def representative_with_mean_zero(rewards, ref_probs, beta):
    return rewards - ref_probs @ rewards


def representative_with_maximum_zero(rewards, ref_probs, beta):
    return rewards - rewards.amax()


def representative_without_the_reference(rewards, ref_probs, beta):
    return beta * (rewards / beta).log_softmax(0)


def representative_that_adds(rewards, ref_probs, beta):
    return rewards + beta * (ref_probs.log() + rewards / beta).logsumexp(0)


def rewards_that_ignore_the_anchor(probs, ref_probs, beta, reward_of_first):
    return beta * (probs.log() - ref_probs.log())


def rewards_with_the_anchor_on_top(probs, ref_probs, beta, reward_of_first):
    return reward_of_first + beta * (probs.log() - ref_probs.log())


def rewards_of_plain_odds(probs, ref_probs, beta, reward_of_first):
    return reward_of_first + beta * (probs.log() - probs[0].log())


def rewards_without_beta(probs, ref_probs, beta, reward_of_first):
    implied = probs.log() - ref_probs.log()
    return reward_of_first + implied - implied[0]


def optimum_with_both_references(probs, old_ref_probs, new_ref_probs):
    return (probs.log() + new_ref_probs.log()).softmax(0)


def optimum_without_a_reference(probs, old_ref_probs, new_ref_probs):
    return (probs / old_ref_probs).log().softmax(0)


def optimum_that_keeps_z(probs, old_ref_probs, new_ref_probs):
    return new_ref_probs * (probs / old_ref_probs)


def optimum_the_other_way(probs, old_ref_probs, new_ref_probs):
    return (probs * old_ref_probs / new_ref_probs).log().softmax(0)


def log_z(ref_probs, rewards, beta):
    return (ref_probs.log() + rewards / beta).logsumexp(-1)


def implied(probs, ref_probs, beta):
    return beta * (probs / ref_probs).log()


def beta_one_inside(rewards, ref_probs, beta):
    return rewards - beta * log_z(ref_probs, rewards, 1.0)


def z_for_log_z(rewards, ref_probs, beta):
    return rewards - beta * log_z(ref_probs, rewards, beta).exp()


def reference_left_in(rewards, ref_probs, beta):
    return beta * (ref_probs.log() + rewards / beta).log_softmax(0)


def logarithm_forgotten(probs, ref_probs, beta, reward_of_first):
    return reward_of_first + beta * (probs / ref_probs - probs[0] / ref_probs[0])


def scaled(probs, ref_probs, beta, reward_of_first):
    found = implied(probs, ref_probs, beta)
    return found * (reward_of_first / found[0])


def overwritten(probs, ref_probs, beta, reward_of_first):
    found = implied(probs, ref_probs, beta)
    found[0] = reward_of_first
    return found


def moved_by_the_difference(probs, old_ref_probs, new_ref_probs):
    return probs + new_ref_probs - old_ref_probs


MISTAKES = {
    "4.1": {
        "The mean over the tokens": implied_by_the_mean,
        "not a log-ratio": implied_by_the_policy_alone,
        "this is the log-ratio in nats": implied_in_nats,
        "Beta divides": implied_over_beta,
        "Only the last token": implied_by_the_end_token,
        "One logarithm is divided": implied_by_dividing_logarithms,
        "lacks its logarithm": implied_without_a_logarithm,
    },
    "4.2": {
        "is in nats": representative_in_nats,
        "mean 0": representative_with_mean_zero,
        "maximum 0": representative_with_maximum_zero,
        "lacks the reference": representative_without_the_reference,
        "reversed": representative_that_adds,
        "Inside Z the rewards are not divided by beta": beta_one_inside,
        "beta Z is taken off": z_for_log_z,
        "This is beta log pi*": reference_left_in,
    },
    "4.3": {
        "still to add": rewards_that_ignore_the_anchor,
        "on top": rewards_with_the_anchor_on_top,
        "reference is missing": rewards_of_plain_odds,
        "Beta is missing": rewards_without_beta,
        "a difference of ratios": logarithm_forgotten,
        "The implied rewards are multiplied to fit": scaled,
        "Only answer 0 has been moved": overwritten,
    },
    "4.4": {
        "still inside": optimum_with_both_references,
        "has not come in": optimum_without_a_reference,
        "do not sum to 1": optimum_that_keeps_z,
        "changed places": optimum_the_other_way,
        "The references' difference is added": moved_by_the_difference,
    },
}
