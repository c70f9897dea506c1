"""DPO in one file: a tiny language model learns from choices and is compared with the best policy.

The model sells ice cream: to "a child wants" it answers with at most three scoops, one token each.
A guest looks at two answers and chooses one. Guests choose by `reward`, which the model never sees:
DPO learns from the choices alone. There are only 85 answers, so we can list them all, compute the
best policy pi* by its formula, and measure how far from it training ends. It takes a few seconds.

Shapes: B rows, P prompt tokens, T answer tokens, V answer words, X prompts, Y answers.
"""

import copy

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
ENDED = (ROWS == END).cumsum(1) > (ROWS == END)  # true after an <end>, but not on it
ANSWERS = ROWS.masked_fill(ENDED, PAD).unique(dim=0)  # [Y, T]: every answer once
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

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits `[B, S, V]`: position s has read tokens 0 to s and predicts token s + 1."""
        return self.head(self.gru(self.embed(tokens))[0])


def token_logps(policy: nn.Module, prompts: Tensor, answers: Tensor) -> Tensor:
    """log pi of each answer token given all tokens before it: `[B, T]`, in nats."""
    tokens = torch.cat([prompts, answers], dim=1).clamp(min=0)  # [B, P + T]; PAD has no embedding
    logits = policy(tokens[:, :-1])  # the shift: a token is predicted before it is read
    logits = logits[:, -T:]  # [B, T, V]: only the last T predictions are about the answer
    logps = logits.log_softmax(-1).gather(2, answers.clamp(min=0)[:, :, None])[:, :, 0]
    return logps * (answers != PAD)  # the mask: <end> was chosen and counts, padding does not


def answer_logps(policy: nn.Module, prompts: Tensor, answers: Tensor) -> Tensor:
    """log pi(answer | prompt), `[B]`: the sum over tokens, because probabilities multiply."""
    return token_logps(policy, prompts, answers).sum(1)


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """-log p(choice), `[B]`, as if guests chose by the reward beta log(pi / pi_ref)."""
    return -logsigmoid(BETA * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def train(
    policy: nn.Module, ref: nn.Module, pairs: list[Tensor], adam: Adam, generator: Generator
) -> None:
    """Minimise the mean DPO loss of pairs: prompts `[n, P]`, chosen and rejected `[n, T]`."""
    prompts, chosen, rejected = pairs
    with torch.no_grad():  # the reference is frozen, so it reads every answer once
        ref_chosen, ref_rejected = (answer_logps(ref, prompts, y) for y in (chosen, rejected))
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(prompts), generator=generator).split(BATCH_SIZE):
            new_chosen = answer_logps(policy, prompts[rows], chosen[rows])
            new_rejected = answer_logps(policy, prompts[rows], rejected[rows])
            losses = dpo_loss(new_chosen, new_rejected, ref_chosen[rows], ref_rejected[rows])
            adam.zero_grad()
            losses.mean().backward()
            adam.step()


def reward(prompts: Tensor, answers: Tensor) -> Tensor:
    """How much a guest likes an answer, `[B]`: the TASTE for each flavour in it, counted once."""
    served = (answers[:, :, None] == torch.arange(V)).any(1)  # [B, V]
    return (served * TASTE[prompts[:, 1] - 6]).sum(1)  # the prompt's second word names the guest


def draw_pairs(ref: nn.Module, generator: Generator) -> list[Tensor]:
    """Each guest sees two different answers of the reference, and chooses by Bradley-Terry."""
    guests = torch.randint(len(PROMPTS), (N_PAIRS,), generator=generator)
    columns = torch.multinomial(table(ref)[guests].exp(), 2, generator=generator)  # [n, 2]
    prompts, (first, second) = PROMPTS[guests], ANSWERS[columns].unbind(1)
    p_first = (reward(prompts, first) - reward(prompts, second)).sigmoid()  # [n]
    wins = torch.rand(N_PAIRS, 1, dtype=torch.float64, generator=generator) < p_first[:, None]
    return [prompts, torch.where(wins, first, second), torch.where(wins, second, first)]


def table(policy: nn.Module) -> Tensor:
    """log pi of every answer to every prompt, `[X, Y]`."""
    with torch.no_grad():
        return answer_logps(policy, *EVERY).view(len(PROMPTS), -1)


def referee(when: str, policy: nn.Module, ref: nn.Module) -> float:
    """Exact KL(pi || pi*), printed and returned, and J(pi) = E[reward] - beta KL(pi || pi_ref)."""
    logps, ref_logps, rewards = table(policy), table(ref), reward(*EVERY).view(len(PROMPTS), -1)
    best = (ref_logps + rewards / BETA).log_softmax(1)  # log pi*: pi* = pi_ref e^(r / beta) / Z
    kl = (logps.exp() * (logps - best)).sum(1).mean()  # of each prompt, then their mean
    j = (logps.exp() * (rewards - BETA * (logps - ref_logps))).sum(1).mean()
    print(f"{when}: KL(pi || pi*) = {kl:.4f}, J(pi) = {j:.4f}, J(pi*) = {j + BETA * kl:.4f}")
    return kl.item()


def main(seed: int = 1) -> tuple[float, float]:
    """Train, and return KL(pi || pi*) before and after."""
    generator = Generator().manual_seed(seed)
    ref = Policy(generator)  # stands for the fine-tuned model that DPO usually starts from
    policy = copy.deepcopy(ref)
    before, adam = referee("before", policy, ref), Adam(policy.parameters(), lr=0.003)
    train(policy, ref, draw_pairs(ref, generator), adam, generator)
    for prompt, logps in zip(PROMPTS, table(policy), strict=True):
        tokens = [*prompt.tolist(), *ANSWERS[logps.argmax()].tolist()]
        print("most often:", " ".join(WORDS[token] for token in tokens if token != PAD))
    return before, referee("after ", policy, ref)


if __name__ == "__main__":
    main()
