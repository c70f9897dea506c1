"""Plausible wrong answers to the exercises of chapter 04, and words of what each must be told."""


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


MISTAKES = {
    "4.1": {
        "is in nats": representative_in_nats,
        "mean 0": representative_with_mean_zero,
        "maximum 0": representative_with_maximum_zero,
        "lacks the reference": representative_without_the_reference,
        "reversed": representative_that_adds,
    },
    "4.2": {
        "still to add": rewards_that_ignore_the_anchor,
        "on top": rewards_with_the_anchor_on_top,
        "reference is missing": rewards_of_plain_odds,
        "Beta is missing": rewards_without_beta,
    },
    "4.3": {
        "still inside": optimum_with_both_references,
        "has not come in": optimum_without_a_reference,
        "do not sum to 1": optimum_that_keeps_z,
        "changed places": optimum_the_other_way,
    },
}
