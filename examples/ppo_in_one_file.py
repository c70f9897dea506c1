"""PPO in one file: a tiny language model learns from rewards and is compared with the best policy.

The model sells ice cream: to "a child wants" it answers with at most three scoops, one token each.
PPO draws answers, asks how much better than expected each token turned out, and makes the better
ones likelier, in small steps. With only 85 answers, the best policy pi* can be computed exactly.

Shapes: B rows, P prompt tokens, T answer tokens, V answer words, X prompts, Y answers.
"""

import copy

import torch
from torch import Generator, Tensor, nn
from torch.optim import Adam

WORDS = ["<end>", "vanilla", "chocolate", "lemon", "chili", "a", "child", "chef", "wants"]
V, T = 5, 3  # an answer has at most T tokens, each of them one of the first V words
END, PAD = 0, -1  # the token that ends an answer early, and what fills its row after that
PROMPTS = torch.tensor([[5, 6, 8], [5, 7, 8]])  # [X, P]: "a child wants" and "a chef wants"
TASTE = torch.tensor([[0, 1, 1.5, -0.5, -2], [0, -0.5, 0.5, 1, 1.5]]).double()  # [X, V]
BETA = 0.8  # the price of one nat of KL, in units of reward
BATCHES, EPOCHS, CLIP, LAMBDA, VALUE_WEIGHT = 100, 4, 0.2, 0.95, 0.05


class ActorCritic(nn.Module):
    """A recurrent language model in float64 that also guesses the reward still to come."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(len(WORDS), 16), nn.GRU(16, 16, batch_first=True)
        self.head, self.value_head = nn.Linear(16, V), nn.Linear(16, 1)
        for weight in self.double().parameters():
            nn.init.normal_(weight, std=0.3, generator=generator)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """After tokens 0 to s: logits of token s + 1, `[B, S, V]`, and the guess, `[B, S]`."""
        states = self.gru(self.embed(tokens))[0]
        return self.head(states), self.value_head(states)[:, :, 0]


def read(model: nn.Module, prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """log pi of each answer token given all before it, and the value there: `[B, T]` each."""
    tokens = torch.cat([prompts, answers], dim=1).clamp(min=0)  # [B, P + T]; PAD has no embedding
    logits, values = model(tokens[:, :-1])  # the shift: a token is predicted before it is read
    logps = logits[:, -T:].log_softmax(-1).gather(2, answers.clamp(min=0)[:, :, None])[:, :, 0]
    return logps * (answers != PAD), values[:, -T:] * (answers != PAD)  # <end> counts, PAD not


def sample(model: nn.Module, prompts: Tensor, generator: Generator) -> Tensor:
    """Draw an answer to each prompt, token by token: `[B, T]`."""
    tokens = prompts
    for _ in range(T):
        probs = model(tokens)[0][:, -1].softmax(-1)  # [B, V], of the next token
        tokens = torch.cat([tokens, torch.multinomial(probs, 1, generator=generator)], dim=1)
    answers = tokens[:, -T:]  # what was drawn after an <end> is no part of the answer
    return answers.masked_fill((answers == END).cumsum(1) > (answers == END), PAD)


def reward(prompts: Tensor, answers: Tensor) -> Tensor:
    """How much a guest likes an answer, `[B]`: the TASTE for each flavour in it, counted once."""
    served = (answers[:, :, None] == torch.arange(V)).any(1)  # [B, V]
    return (served * TASTE[prompts[:, 1] - 6]).sum(1)  # the prompt's second word names the guest


def token_rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """Every token pays its share of the KL, and the last one earns the answer's score: `[B, T]`."""
    is_last = torch.arange(T) == mask.sum(1, keepdim=True) - 1
    return is_last * scores[:, None] - BETA * (logps - ref_logps)


def gae(rewards: Tensor, values: Tensor) -> Tensor:
    """How much better than expected each token turned out, `[B, T]`; all are 0 on padding."""
    advantages = rewards - values  # this is all for the last token: nothing comes after it
    for t in reversed(range(T - 1)):  # the others add what is expected next, and later surprises
        advantages[:, t] += values[:, t + 1] + LAMBDA * advantages[:, t + 1]
    return advantages


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale to mean 0 and variance 1 over all tokens of the batch: `[B, T]`."""
    return (x - x[mask].mean()) / (x[mask].var(correction=0) + 1e-8).sqrt() * mask


def clipped_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor) -> Tensor:
    """PPO's loss, `[B, T]`: no gradient once a ratio has moved by CLIP in the direction of A."""
    ratios = (logps - old_logps).exp()
    return -torch.min(ratios * advantages, ratios.clamp(1 - CLIP, 1 + CLIP) * advantages)


def improve(model: nn.Module, ref: nn.Module, prompts: Tensor, answers: Tensor, adam: Adam) -> None:
    """Take EPOCHS steps of Adam on a batch of answers that the model has just drawn."""
    mask = answers != PAD
    with torch.no_grad():  # advantages, returns and old log-probabilities are data from here on
        (old_logps, values), (ref_logps, _) = (read(m, prompts, answers) for m in (model, ref))
        raw = gae(token_rewards(reward(prompts, answers), old_logps, ref_logps, mask), values)
        advantages, returns = whiten(raw, mask), raw + values  # returns: what values aim at
    for _ in range(EPOCHS):
        logps, values = read(model, prompts, answers)
        losses = clipped_loss(logps, old_logps, advantages) + VALUE_WEIGHT * (values - returns) ** 2
        adam.zero_grad()
        losses[mask].mean().backward()
        adam.step()


def referee(when: str, model: nn.Module, ref: nn.Module) -> float:
    """Exact KL(pi || pi*), printed and returned, and J(pi) = E[reward] - beta KL(pi || pi_ref)."""
    rows = torch.cartesian_prod(*[torch.arange(V)] * T)  # [V^T, T]: all rows of T words
    answers = rows.masked_fill((rows == END).cumsum(1) > (rows == END), PAD).unique(dim=0)  # [Y, T]
    every = PROMPTS.repeat_interleave(len(answers), 0), answers.repeat(len(PROMPTS), 1)
    rewards = reward(*every).view(len(PROMPTS), -1)  # [X, Y], like the tables that follow
    logps, ref_logps = (read(m, *every)[0].sum(1).view_as(rewards) for m in (model, ref))
    best = (ref_logps + rewards / BETA).log_softmax(1)  # log pi*: pi* = pi_ref e^(r / beta) / Z
    kl = (logps.exp() * (logps - best)).sum(1).mean()  # of each prompt, then their mean
    j = (logps.exp() * (rewards - BETA * (logps - ref_logps))).sum(1).mean()
    print(f"{when}: KL(pi || pi*) = {kl:.4f}, J(pi) = {j:.4f}, J(pi*) = {j + BETA * kl:.4f}")
    return kl.item()


def main(seed: int = 1) -> tuple[float, float]:
    """Train, and return KL(pi || pi*) before and after."""
    generator = Generator().manual_seed(seed)
    ref = ActorCritic(generator)  # stands for the fine-tuned model that PPO usually starts from
    model, prompts = copy.deepcopy(ref), PROMPTS.repeat(100, 1)
    before, adam = referee("before", model, ref), Adam(model.parameters(), lr=0.003)
    for _ in range(BATCHES):
        improve(model, ref, prompts, sample(model, prompts, generator), adam)
    return before, referee("after ", model, ref)


if __name__ == "__main__":
    main()
