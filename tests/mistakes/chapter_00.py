"""Plausible wrong answers to the exercises of chapter 00, with words of the sentence each gets."""


def tilt_with_beta_upside_down(ref_probs, rewards, beta):
    weights = ref_probs * (rewards * beta).exp()
    return weights / weights.sum()


def tilt_that_forgets_the_reference(ref_probs, rewards, beta):
    weights = (rewards / beta).exp()
    return weights / weights.sum()


def tilt_without_z(ref_probs, rewards, beta):
    return (ref_probs.log() + rewards / beta).exp()


def tilt_that_adds_probabilities_to_logits(ref_probs, rewards, beta):
    return (rewards / beta + ref_probs).softmax(0)


def margin_that_forgets_the_reference(probs, ref_probs, beta):
    return beta * (probs[0].log() - probs[1].log())


def margin_in_nats(probs, ref_probs, beta):
    return (probs / ref_probs).log()[0] - (probs / ref_probs).log()[1]


def margin_of_the_second_over_the_first(probs, ref_probs, beta):
    return beta * ((probs[1] / ref_probs[1]).log() - (probs[0] / ref_probs[0]).log())


def margin_without_a_logarithm(probs, ref_probs, beta):
    ratios = probs / ref_probs
    return beta * (ratios[0] - ratios[1])


def reference_divides(ref_probs, rewards, beta):
    weights = (rewards / beta).exp() / ref_probs
    return weights / weights.sum()


def margin_with_reference_added(probs, ref_probs, beta):
    return beta * (probs[0] * ref_probs[0] / probs[1] / ref_probs[1]).log()


def margin_of_one_answer(probs, ref_probs, beta):
    return beta * (probs[0] / ref_probs[0]).log()


MISTAKES = {
    "0.1": {
        "multiplied by beta": tilt_with_beta_upside_down,
        "reference is missing": tilt_that_forgets_the_reference,
        "do not sum to 1": tilt_without_z,
        "takes its logarithm": tilt_that_adds_probabilities_to_logits,
        "The reference divides": reference_divides,
    },
    "0.2": {
        "reference is missing": margin_that_forgets_the_reference,
        "Beta is missing": margin_in_nats,
        "reversed": margin_of_the_second_over_the_first,
        "logarithm is missing": margin_without_a_logarithm,
        "The reference multiplies where it should divide": margin_with_reference_added,
        "This reads off answer 0 alone, so Z is still in it": margin_of_one_answer,
    },
}
