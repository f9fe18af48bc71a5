"""A two-tower recommender on one screen: in-batch negatives, with and without the correction for popularity.

    python examples/two_tower.py

The data is drawn: a user with features x chooses 20 of 1,000 items, no item twice, item i with a probability in
proportion to q_i exp(2 x . y_i / sqrt(8)); y_i are hidden features, and the popularity q falls as 1 / rank. One tower
learns vectors of users from their features, and a table holds those of items. A batch brings a popular item as a
negative as often as it is chosen (Yi et al. 2019), so that without the correction the loss holds its popularity against
it. Then 500 users that nobody trained on ask for 20 items each: how many of their own choices are among them? A quarter
if all get the most popular ones; fewer without the correction, and more with it.
"""

import torch
from torch import Tensor, nn

from ssl_kernels.integrations.retrieval import TwoTowerLoss

USERS, TEST, ITEMS, CHOICES, FEATURES, TOP = 3000, 500, 1000, 20, 8, 20


def draw(seed: int) -> tuple[Tensor, Tensor]:
    """Features [users, FEATURES], and the items that each user chose, [users, CHOICES]."""
    generator = torch.Generator().manual_seed(seed)
    users, hidden = (torch.randn(n, FEATURES, generator=generator) for n in (USERS + TEST, ITEMS))
    appeal = 2 * users @ hidden.T / FEATURES**0.5
    popularity = 1 / torch.arange(1, ITEMS + 1)
    return users, torch.multinomial(popularity * appeal.exp(), CHOICES, generator=generator)


def recall(scores: Tensor, chosen: Tensor) -> float:
    """The share of the users' choices among the TOP items of the highest scores."""
    found = scores.topk(TOP, dim=1).indices
    return (chosen[:, :, None] == found[:, None]).any(2).float().mean().item()


class Towers(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.user = nn.Sequential(nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, width))
        self.item = nn.Embedding(ITEMS, width)


def trained(users: Tensor, chosen: Tensor, log_q: Tensor, kind: str, steps: int) -> Towers:
    towers, criterion = Towers(), TwoTowerLoss(temperature=0.1)
    optimizer = torch.optim.Adam(towers.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        who = torch.randint(USERS, (512,))
        ids = chosen[who, torch.randint(CHOICES, who.shape)]
        queries, items = towers.user(users[who]), towers.item(ids)
        if kind == "full catalogue":
            loss = criterion.over_catalogue(queries, towers.item.weight, ids)
        else:
            loss = criterion(queries, items, ids, log_q=log_q[ids] if kind == "corrected" else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"{kind}, step {step:3}: loss {loss.item():.3f}")
    return towers


@torch.no_grad()
def main(steps: int = 300, seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    users, chosen = draw(seed)
    counts = chosen[:USERS].flatten().bincount(minlength=ITEMS) + 1.0
    log_q = (counts / counts.sum()).log()  # the share of an item among all choices is how often it comes into a batch
    figures = {"most popular": recall(log_q.expand(TEST, -1), chosen[USERS:])}
    for kind in ("uncorrected", "corrected", "full catalogue"):
        with torch.enable_grad():
            towers = trained(users, chosen, log_q, kind, steps)
        vectors = nn.functional.normalize(towers.item.weight, dim=1)
        figures[kind] = recall(towers.user(users[USERS:]) @ vectors.T, chosen[USERS:])
    print(f"recall@{TOP} of {TEST} new users among {ITEMS} items:")
    for name, share in figures.items():
        print(f"  {name:15}{share:.3f}")
    return figures


if __name__ == "__main__":
    main()
