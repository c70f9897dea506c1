"""Solutions of chapter 14, and the repairs of its museum."""

import torch
from torch.nn.functional import logsigmoid, softplus


def token_weights(lengths, n_steps):
    """14.1: one mean per micro-batch, then the mean of these."""
    totals = lengths.double().reshape(n_steps, -1).sum(1)
    return (1 / (n_steps * totals)).repeat_interleave(len(lengths) // n_steps)


def top_p_probs(logits, top_p):
    """14.2: keep a token where likelier ones have less than top_p."""
    probs, order = torch.softmax(logits, 0).sort(descending=True)
    kept = probs * (probs.cumsum(0) - probs < top_p)
    return torch.zeros_like(probs).index_put((order,), kept / kept.sum())


SOLUTIONS = {
    "14.1": token_weights,
    "14.2": top_p_probs,
}


def completion_logp(token_logps, tokens, pad_token):
    """Padding is what comes *after* an end token."""
    is_end = (tokens == pad_token).long()
    after_end = is_end.cumsum(1) - is_end > 0
    return token_logps.masked_fill(after_end, 0.0).sum(1)


def batch_logp(token_logps, lengths):
    """A row's own columns, and no others."""
    mask = torch.arange(token_logps.shape[1]) < lengths[:, None]
    return torch.where(mask, token_logps, 0.0).sum(1)


def logp_after_prompt(logits, tokens, n_prompt):
    """Position n_prompt - 1 predicts the first token of the answer."""
    answer = tokens[:, n_prompt:]
    logps = logits[:, n_prompt - 1 : -1].log_softmax(-1)
    return logps.gather(2, answer.unsqueeze(2)).squeeze(2).sum(1)


def implied_reward(token_logps, ref_token_logps, mask, beta):
    """The logarithm of a product is a sum."""
    return beta * ((token_logps - ref_token_logps) * mask).sum(1)


def loss_and_rewards(chosen, rejected, ref_chosen, ref_rejected, beta):
    """One margin for both: what is logged is what is fitted."""
    reward_w = beta * (chosen - ref_chosen)
    reward_l = beta * (rejected - ref_rejected)
    loss = softplus(reward_l - reward_w)
    return loss, reward_w.detach(), reward_l.detach()


def frozen_logps(features, weight, generator):
    """A frozen model takes no random numbers."""
    return (features @ weight).log_softmax(-1)


def stored_logps(features, weight):
    """Keep the weights as the policy has them."""
    return torch.log_softmax(features @ weight, dim=-1)


def kl_estimate(logps, ref_logps):
    """KL(pi || pi_ref) is the mean of log pi - log pi_ref under pi."""
    return logps - ref_logps


def exact_kl(logps, ref_logps):
    """Or kl_div(ref_logps, logps, log_target=True, reduction="none")."""
    return (logps.exp() * (logps - ref_logps)).sum(1)


def token_rewards(scores, token_kls, lengths):
    """The end token is the last of `lengths` tokens."""
    is_last = torch.arange(token_kls.shape[1]) == lengths[:, None] - 1
    return is_last * scores[:, None] - token_kls


def accumulated_loss(token_losses, mask, n_steps):
    """Sums add up; divide by all tokens, once."""
    total = 0.0
    parts = zip(token_losses.chunk(n_steps), mask.chunk(n_steps), strict=True)
    for loss, counted in parts:
        total = total + (loss * counted).sum() / mask.sum()
    return total


def smoothed_loss(differences, beta, label_smoothing):
    """The label may be wrong: then the other answer won."""
    kept = (1 - label_smoothing) * softplus(-beta * differences)
    return kept + label_smoothing * softplus(beta * differences)


def examine(pair_loss):
    """Compare with log(1 + e^{-m}), computed by hand for each margin m."""
    differences = torch.tensor([-2.0, 0.0, 3.0])
    expected = torch.tensor([1.3132617, 0.6931472, 0.2014133])
    loss = pair_loss(differences, 0.5)
    torch.testing.assert_close(loss, expected.to(loss), rtol=0, atol=1e-6)


def pair_loss(differences, beta):
    """logsigmoid never takes the logarithm of 0."""
    return -logsigmoid(beta * differences)


def visible(lengths):
    """The past of a token, and of its own answer alone."""
    answer = torch.arange(len(lengths))
    answer = answer.repeat_interleave(torch.tensor(lengths))
    return (answer[:, None] == answer).tril()


def with_begin(tokens, begin):
    """The template may have written it already."""
    if tokens[0] == begin:
        return tokens
    return torch.cat([torch.tensor([begin]), tokens])


def reference_logps(features, base, sft, dpo):
    """Off is the new adapter alone: DPO begins after SFT."""
    return (features @ (base + sft)).log_softmax(-1)


def cut_answer(answer, n_prompt, longest, max_length):
    """What fits behind the prompt, whatever the other answer is."""
    return answer[: max_length - n_prompt]


def token_logps(logits):
    """log_softmax subtracts the maximum: nothing overflows."""
    return logits.log_softmax(-1)


def pair_rows(prompt, chosen, rejected, max_length):
    """One prompt for both, which fits before the longer answer."""
    longer = max(len(chosen), len(rejected))
    start = max(0, len(prompt) - (max_length - longer))
    prompt = prompt[start:]
    return torch.cat([prompt, chosen]), torch.cat([prompt, rejected])


def log_odds(logps):
    """expm1(x) = e^x - 1 does not cancel near 0."""
    return logps - torch.log(-torch.expm1(logps))


def token_ratios(logits, tokens, sampler_logps, kept):
    """Normalise the policy over the tokens that were kept, too."""
    logps = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    chosen = logps.gather(1, tokens[:, None]).squeeze(1)
    return (chosen - sampler_logps).exp()


def answer_logps(token_logps, chunk):
    """Add in float64: orders then differ by 1e-14 and no more."""
    parts = token_logps.double().split(chunk, dim=1)
    return sum(part.sum(1) for part in parts)


def adapter_gradient(layer, x, adapter, active, slopes):
    """Run again what was run: with all its arguments."""
    adapter = adapter.detach().requires_grad_()
    y = layer(x, adapter, active)
    return torch.autograd.grad(y, adapter, slopes)[0]


def examine_first_step(pair_loss):
    """Margins on both sides of 0, and numbers computed by hand."""
    examine(pair_loss)


REPAIRS = {
    "end token masked": completion_logp,
    "padding counted": batch_logp,
    "boundary off by one": logp_after_prompt,
    "mean for sum": implied_reward,
    "beta missing from logged rewards": loss_and_rewards,
    "reference with dropout": frozen_logps,
    "half-precision reference": stored_logps,
    "k1 with the sign inverted": kl_estimate,
    "kl_div without log_target": exact_kl,
    "reward one slot late": token_rewards,
    "mean of means": accumulated_loss,
    "smoothing ignored": smoothed_loss,
    "an assertion that cannot fail": examine,
    "log of a sigmoid": pair_loss,
    "packed answers see each other": visible,
    "two begin tokens": with_begin,
    "an adapter on an adapter": reference_logps,
    "an empty answer": cut_answer,
    "logits in half precision": token_logps,
    "one prompt, cut twice": pair_rows,
    "log of one minus p": log_odds,
    "a sampler that left tokens out": token_ratios,
    "rounded in another order": answer_logps,
    "recomputed without its mask": adapter_gradient,
    "a test at step 0": examine_first_step,
}
