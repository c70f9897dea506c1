"""PPO in one file: a tiny language model learns from rewards and is compared with the best policy.

To "a child wants" the model answers with at most three scoops of ice cream, one token each. PPO
draws answers, finds the tokens that turned out better than expected, and makes those likelier.
Shapes: B rows, P prompt tokens, T answer tokens, V answer words, X prompts, Y answers.
"""

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

    def forward(self, prompts: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """log pi of each answer token given all before it, and the value there: `[B, T]` each."""
        tokens = torch.cat([prompts, answers], dim=1).clamp(min=0)  # PAD has no embedding
        states, _ = self.gru(self.embed(tokens[:, :-1]))  # the shift: predicted before it is read
        logits, values = self.head(states[:, -T:]), self.value_head(states[:, -T:])[:, :, 0]
        logps = logits.log_softmax(-1).gather(2, answers.clamp(min=0)[:, :, None])[:, :, 0]
        return logps * (answers != PAD), values * (answers != PAD)  # <end> counts, PAD does not

    @torch.no_grad()
    def sample(self, prompts: Tensor, generator: Generator) -> Tensor:
        """Draw an answer to each prompt, token by token: `[B, T]`."""
        answers = prompts.new_zeros(len(prompts), T)
        for t in range(T):
            states, _ = self.gru(self.embed(torch.cat([prompts, answers[:, :t]], dim=1)))
            probs = self.head(states[:, -1]).softmax(-1)  # [B, V], of the next token
            answers[:, t] = torch.multinomial(probs, 1, generator=generator)[:, 0]
        return answers.masked_fill((answers == END).cumsum(1) > (answers == END), PAD)


def reward(prompts: Tensor, answers: Tensor) -> Tensor:
    """How much a guest likes an answer, `[B]`: the TASTE for each flavour in it, counted once."""
    served = (answers[:, :, None] == torch.arange(V)).any(1)  # [B, V]
    return (served * TASTE[prompts[:, 1] - 6]).sum(1)  # the prompt's second word names the guest


def improve(model: nn.Module, ref: nn.Module, prompts: Tensor, answers: Tensor, adam: Adam) -> None:
    """Take EPOCHS steps of Adam on a batch of answers that the model has just drawn."""
    mask = answers != PAD
    with torch.no_grad():  # what is computed from these is data: no gradient goes back into it
        (old_logps, values), (ref_logps, _) = model(prompts, answers), ref(prompts, answers)
    rewards = -BETA * (old_logps - ref_logps)  # every token pays its own share of the KL
    rewards[range(len(answers)), mask.sum(1) - 1] += reward(prompts, answers)  # the last one earns
    advantages = rewards - values  # GAE: how much better than expected each token turned out
    for t in reversed(range(T - 1)):  # add what is expected next, and later surprises
        advantages[:, t] += values[:, t + 1] + LAMBDA * advantages[:, t + 1]
    returns = advantages + values  # what the values should have been
    variance, mean = torch.var_mean(advantages[mask], correction=0)
    advantages = (advantages - mean) / (variance + 1e-8).sqrt()  # whitened: mean 0, variance 1
    for _ in range(EPOCHS):
        logps, values = model(prompts, answers)
        ratios = (logps - old_logps).exp()  # moving one beyond the clip gains nothing more
        gains = torch.min(ratios * advantages, ratios.clamp(1 - CLIP, 1 + CLIP) * advantages)
        losses = VALUE_WEIGHT * (values - returns) ** 2 - gains
        adam.zero_grad()
        losses[mask].mean().backward()
        adam.step()


def referee(when: str, model: nn.Module, ref: nn.Module) -> None:
    """Print the exact KL(pi || pi*) and J(pi) = E[reward] - beta KL(pi || pi_ref)."""
    rows = torch.cartesian_prod(*[torch.arange(V)] * T)  # [V^T, T]: all rows of T words
    answers = rows.masked_fill((rows == END).cumsum(1) > (rows == END), PAD).unique(dim=0)  # [Y, T]
    every = PROMPTS.repeat_interleave(len(answers), 0), answers.repeat(len(PROMPTS), 1)
    rewards = reward(*every).view(len(PROMPTS), -1)  # [X, Y], like the tables that follow
    logps, ref_logps = (each(*every)[0].sum(1).view_as(rewards) for each in (model, ref))
    best = (ref_logps + rewards / BETA).log_softmax(1)  # log pi*: pi* = pi_ref e^(r / beta) / Z
    kl = (logps.exp() * (logps - best)).sum(1).mean()  # of each prompt, then their mean
    j = (logps.exp() * (rewards - BETA * (logps - ref_logps))).sum(1).mean()
    print(f"{when}: KL(pi || pi*) = {kl:.4f}, J(pi) = {j:.4f}, J(pi*) = {j + BETA * kl:.4f}")


if __name__ == "__main__":
    generator = Generator().manual_seed(1)
    ref, model = ActorCritic(generator), ActorCritic(generator)
    model.load_state_dict(ref.state_dict())  # training starts at ref, usually a fine-tuned model
    referee("before", model, ref)
    adam, prompts = Adam(model.parameters(), lr=0.003), PROMPTS.repeat(100, 1)
    for _ in range(BATCHES):
        improve(model, ref, prompts, model.sample(prompts, generator), adam)
    referee("after ", model, ref)
