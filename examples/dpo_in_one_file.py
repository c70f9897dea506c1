"""DPO in one file: a tiny language model learns from choices and is compared with the best policy.

To "a child wants" the model answers with at most three scoops of ice cream, one token each. A guest
sees two answers and chooses one by `reward`. DPO never sees the reward, and learns from the choices
alone. There are only 85 answers, so the best policy pi* and the distance from it can be computed.
Shapes: B rows, P prompt tokens, T answer tokens, V answer words, X prompts, Y answers.
"""

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import logsigmoid
from torch.optim import Adam

WORDS = ["<end>", "vanilla", "chocolate", "lemon", "chili", "a", "child", "chef", "wants"]
V, T = 5, 3  # an answer has at most T tokens, each of them one of the first V words
END, PAD = 0, -1  # the token that ends an answer early, and what fills its row after that
PROMPTS = torch.tensor([[5, 6, 8], [5, 7, 8]])  # [X, P]: "a child wants" and "a chef wants"
TASTE = torch.tensor([[0, 1, 1.5, -0.5, -2], [0, -0.5, 0.5, 1, 1.5]]).double()  # [X, V]
BETA = 0.8  # the price of one nat of KL, in units of reward
N_PAIRS, EPOCHS, BATCH_SIZE = 20_000, 2, 100

ROWS = torch.cartesian_prod(*[torch.arange(V)] * T)  # [V^T, T]: all rows of T words
ANSWERS = ROWS.masked_fill((ROWS == END).cumsum(1) > (ROWS == END), PAD).unique(dim=0)  # [Y, T]
# Every prompt with every answer, in the order in which the cells of a table [X, Y] are stored.
EVERY = PROMPTS.repeat_interleave(len(ANSWERS), 0), ANSWERS.repeat(len(PROMPTS), 1)


class Policy(nn.Module):
    """A recurrent language model in float64: after each word that it reads it scores the next."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.embed, self.gru = nn.Embedding(len(WORDS), 16), nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, V)
        for weight in self.double().parameters():
            nn.init.normal_(weight, std=0.3, generator=generator)

    def forward(self, prompts: Tensor, answers: Tensor) -> Tensor:
        """log pi(answer | prompt), `[B]`, in nats."""
        tokens = torch.cat([prompts, answers], dim=1).clamp(min=0)  # PAD has no embedding
        states, _ = self.gru(self.embed(tokens[:, :-1]))  # the shift: predicted before it is read
        logits = self.head(states[:, -T:])  # [B, T, V]: the last T predictions are the answer's
        logps = logits.log_softmax(-1).gather(2, answers.clamp(min=0)[:, :, None])[:, :, 0]
        logps = logps * (answers != PAD)  # the mask: <end> was chosen and counts, padding does not
        return logps.sum(1)  # the sum over tokens, because their probabilities multiply


def reward(prompts: Tensor, answers: Tensor) -> Tensor:
    """How much a guest likes an answer, `[B]`: the TASTE for each flavour in it, counted once."""
    served = (answers[:, :, None] == torch.arange(V)).any(1)  # [B, V]
    return (served * TASTE[prompts[:, 1] - 6]).sum(1)  # the prompt's second word names the guest


def draw_pairs(ref: nn.Module, generator: Generator) -> list[Tensor]:
    """Each guest sees two different answers of the reference, and chooses by Bradley-Terry."""
    guests = torch.randint(len(PROMPTS), (N_PAIRS,), generator=generator)
    prompts = PROMPTS[guests]  # [n, P]
    probs = ref(*EVERY).exp().view(len(PROMPTS), -1)[guests]  # [n, Y]
    first, second = ANSWERS[torch.multinomial(probs, 2, generator=generator)].unbind(1)  # [n, T]
    p_first = (reward(prompts, first) - reward(prompts, second)).sigmoid()  # [n]
    wins = torch.rand(N_PAIRS, 1, dtype=torch.float64, generator=generator) < p_first[:, None]
    return [prompts, torch.where(wins, first, second), torch.where(wins, second, first)]


def train(
    policy: nn.Module, ref: nn.Module, pairs: list[Tensor], adam: Adam, generator: Generator
) -> None:
    """Minimise the mean DPO loss of pairs: prompts `[n, P]`, chosen and rejected `[n, T]`."""
    prompts, chosen, rejected = pairs
    with torch.no_grad():  # the reference is frozen, so it reads every answer once
        ref_chosen, ref_rejected = ref(prompts, chosen), ref(prompts, rejected)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(prompts), generator=generator).split(BATCH_SIZE):
            chosen_logratios = policy(prompts[rows], chosen[rows]) - ref_chosen[rows]
            rejected_logratios = policy(prompts[rows], rejected[rows]) - ref_rejected[rows]
            # -log p(choice), as if guests chose by the reward beta log(pi / pi_ref)
            losses = -logsigmoid(BETA * (chosen_logratios - rejected_logratios))
            adam.zero_grad()
            losses.mean().backward()
            adam.step()


def referee(when: str, policy: nn.Module, ref: nn.Module) -> None:
    """Print the exact KL(pi || pi*) and J(pi) = E[reward] - beta KL(pi || pi_ref)."""
    rewards = reward(*EVERY).view(len(PROMPTS), -1)  # [X, Y], like the tables that follow
    logps, ref_logps = (each(*EVERY).view_as(rewards) for each in (policy, ref))
    best = (ref_logps + rewards / BETA).log_softmax(1)  # log pi*: pi* = pi_ref e^(r / beta) / Z
    kl = (logps.exp() * (logps - best)).sum(1).mean()  # of each prompt, then their mean
    j = (logps.exp() * (rewards - BETA * (logps - ref_logps))).sum(1).mean()
    print(f"{when}: KL(pi || pi*) = {kl:.4f}, J(pi) = {j:.4f}, J(pi*) = {j + BETA * kl:.4f}")


if __name__ == "__main__":
    generator = Generator().manual_seed(1)
    ref, policy = Policy(generator), Policy(generator)
    policy.load_state_dict(ref.state_dict())  # training starts at ref, usually a fine-tuned model
    referee("before", policy, ref)
    adam = Adam(policy.parameters(), lr=0.003)
    train(policy, ref, draw_pairs(ref, generator), adam, generator)
    referee("after ", policy, ref)
