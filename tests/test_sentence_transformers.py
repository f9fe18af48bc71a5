"""The ranking losses of sentence-transformers beside the package's own: values, gradients, memory, and its trainer."""

from __future__ import annotations

import doctest
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import covering, covering_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import linux_only, peak_mb, saved_bytes
from peers import assert_same, assert_same_signature, value_and_gradients
from text_models import module_of, small_model, tokens, trained
from torch import Tensor

EXTRA = ("query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [("query_to_doc", *some) for n in range(4) for some in itertools.combinations(EXTRA, n)]
GTE = DIRECTIONS[-1]
HARDNESS = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
CLASSES = (
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "GISTEmbedLoss",
    "CachedGISTEmbedLoss",
    "MatryoshkaLoss",
)


@dataclass(frozen=True)
class Ranking:
    directions: tuple[str, ...]
    mode: str
    similarity: str
    hardness: str | None
    columns: int

    @property
    def options(self) -> dict[str, Any]:
        from sentence_transformers import util

        return {
            "scale": 20.0 if self.similarity == "cos_sim" else 2.0,
            "similarity_fct": getattr(util, self.similarity), "directions": self.directions,
            "partition_mode": self.mode, "hardness_mode": self.hardness,
            "hardness_strength": 5.0 if self.hardness else 0.0,
        }  # fmt: skip


RANKINGS = [
    Ranking(*case)
    for case in itertools.product(DIRECTIONS, ("joint", "per_direction"), ("cos_sim", "dot_score"), HARDNESS, (2, 3, 4))
    if case[1] == "joint" or not {"query_to_query", "doc_to_doc"} & set(case[0])
]


def embeddings(columns: int, rows: int = 37, width: int = 24) -> list[Tensor]:
    """Of queries, their positives, and hard negatives; of any length."""
    query, positive, *negatives = (torch.randn(rows, width) for _ in range(columns))
    return [query, positive + query, *(t + query / 2 for t in negatives)]


def results(loss: Any, values: Sequence[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in values]
    return value_and_gradients(loss.compute_loss_from_embeddings(leaves, None), leaves)


def cached_results(loss: Any, values: Sequence[Tensor], *guides: Any) -> list[Tensor]:
    """The value, and the gradients of the chunks."""
    chunks = [[part.clone().requires_grad_() for part in t.split(8)] for t in values]
    value = loss.calculate_loss(chunks, *guides, with_backward=True)
    assert not value.requires_grad
    return [value, *(torch.cat([part.grad for part in column]) for column in chunks)]  # type: ignore[misc]


@covering_cases(2, RANKINGS)
def test_every_option_of_the_ranking_loss(case: Ranking) -> None:
    values = embeddings(case.columns)
    ours, theirs = (module_of(whose).MultipleNegativesRankingLoss(None, **case.options) for whose in ("ours", "theirs"))
    assert_same(results(ours, values), results(theirs, values))


@covering_cases(2, [case for case in RANKINGS if case.columns != 3])
def test_every_option_of_the_cached_one(case: Ranking, model: Any) -> None:
    """Of embeddings in chunks."""
    values = embeddings(case.columns)
    ours, theirs = (
        module_of(whose).CachedMultipleNegativesRankingLoss(model, mini_batch_size=8, **case.options)
        for whose in ("ours", "theirs")
    )
    assert_same(cached_results(ours, values), cached_results(theirs, values))


@settings(parent=settings.get_profile("brief"))
@given(
    case=st.sampled_from(RANKINGS),
    rows=st.integers(1, 70),
    width=st.integers(2, 40),
    scale=st.floats(0.1, 50),
    strength=st.floats(0.1, 12),
)
def test_any_sizes_scales_and_strengths(case: Ranking, rows: int, width: int, scale: float, strength: float) -> None:
    module_of("theirs")
    if case.similarity == "dot_score":
        scale = scale / 10 / width
    options = case.options | {"scale": scale, "hardness_strength": strength if case.hardness else 0.0}
    values = [t / t.norm(dim=1, keepdim=True).clamp(min=0.5) for t in embeddings(case.columns, rows, width)]
    ours, theirs = (
        results(module_of(whose).MultipleNegativesRankingLoss(None, **options), values) for whose in ("ours", "theirs")
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-5, atol=1e-5)
    for a, b in zip(ours[1:], theirs[1:], strict=True):  # against the scale, by which rounding of a similarity counts
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6 * max(1.0, scale))


@pytest.fixture(scope="module")
def model() -> Any:
    module_of("theirs")
    return small_model()


@pytest.fixture(scope="module")
def guide() -> Any:
    """Another model, which knows the same tokens."""
    model = small_model()
    torch.manual_seed(0)  # whichever test comes first
    with torch.no_grad():
        for parameter in model[0].auto_model.embeddings.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def through_a_model(model: Any, columns: int, make: Callable[[Any], Any]) -> None:
    """Values and gradients of the model, from texts; without dropout, which the merging of columns would move."""
    model.eval()
    found = []
    for whose in ("ours", "theirs"):
        random.seed(1)  # which draws prefixes
        loss = make(module_of(whose))
        model.zero_grad()
        value = loss(tokens(model, 19, columns), None)
        value.backward()
        found.append([value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 14
    assert sum(g.abs().max() > 1e-5 for g in found[1]) > 10
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize(
    "name", [name for name in CLASSES if name.startswith(("Multiple", "Cached")) and "GIST" not in name]
)
@pytest.mark.parametrize("columns", [2, 3])
def test_texts_through_a_model(name: str, columns: int, model: Any) -> None:
    options = {"mini_batch_size": 8} if name.startswith("Cached") else {}
    through_a_model(model, columns, lambda module: getattr(module, name)(model, **options))


# ---- guides


@covering(
    2,
    cached=(False, True),
    strategy=("absolute", "relative"),
    margin=(0.0, 0.02, -0.1),
    anchors=(True, False),
    positives=(True, False),
    columns=(2, 3),
)
def test_a_guide(
    cached: bool, strategy: str, margin: float, anchors: bool, positives: bool, columns: int, model: Any, guide: Any
) -> None:
    options: dict[str, Any] = {
        "temperature": 0.05, "margin_strategy": strategy, "margin": margin, "contrast_anchors": anchors,
        "contrast_positives": positives,
    }  # fmt: skip
    name = "CachedGISTEmbedLoss" if cached else "GISTEmbedLoss"
    options |= {"mini_batch_size": 8} if cached else {}
    through_a_model(model, columns, lambda module: getattr(module, name)(model, guide, **options))


def test_what_a_guide_leaves_out_and_what_it_keeps(model: Any, guide: Any) -> None:
    """The guide moves the loss; and a copy of a positive, whose score is the same, is no false negative."""
    values, guides = embeddings(4), [torch.randn(37, 24) for _ in range(4)]  # some pairs have scores below 0
    for columns in (*values, *guides), (*guides, *values):
        columns[1][5] = columns[1][7]
    chunks = [list(t.split(8)) for t in guides]
    for margin, strategy in itertools.product((0.0, 0.3), ("absolute", "relative")):
        found = []
        options = {"mini_batch_size": 8, "temperature": 0.1, "margin": margin, "margin_strategy": strategy}
        for whose in ("ours", "theirs"):
            loss = module_of(whose).CachedGISTEmbedLoss(model, guide, **options)
            found.append(cached_results(loss, values, chunks))
        assert_same(*found)
    loss = module_of("ours").CachedGISTEmbedLoss(model, guide)
    with pytest.raises(ValueError, match=r"embeddings: expected those of anchors .*, got 4 and 3 columns"):
        loss.calculate_loss([[t] for t in values], chunks[:3])


@pytest.mark.parametrize("cached", [True, False])
def test_a_guide_with_tokens_of_its_own(cached: bool, model: Any) -> None:
    """It gets the texts again, not the tokens of the model."""
    guide = small_model()
    guide.max_seq_length = 5
    name = "CachedGISTEmbedLoss" if cached else "GISTEmbedLoss"
    through_a_model(model, 3, lambda module: getattr(module, name)(model, guide, temperature=0.1))


# ---- prefixes


def dot_score() -> Any:
    from sentence_transformers import util

    return util.dot_score


INNER: dict[str, Callable[[Any, Any], Any]] = {
    "ranking": lambda module, model: module.MultipleNegativesRankingLoss(model),
    "hard": lambda module, model: module.MultipleNegativesRankingLoss(
        model, hardness_mode="in_batch_negatives", hardness_strength=3.0
    ),
    "dot": lambda module, model: module.MultipleNegativesRankingLoss(model, similarity_fct=dot_score()),
    "symmetric": lambda module, model: module.MultipleNegativesSymmetricRankingLoss(model),
    "joint": lambda module, model: module.MultipleNegativesRankingLoss(model, directions=GTE),
    "cached": lambda module, model: module.CachedMultipleNegativesRankingLoss(model, mini_batch_size=8),
    "cached joint": lambda module, model: module.CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=8, directions=GTE
    ),
    "guided": lambda module, model: module.CachedGISTEmbedLoss(model, small_model(2), mini_batch_size=8),
}


@covering(
    1,
    inner=INNER,
    dims=([384, 128, 32], [32, 384, 128], [64], [384, 384, 16]),
    weights=(None, "some"),
    drawn=(-1, 2),
    columns=(2, 3),
)
def test_prefixes(inner: str, dims: list[int], weights: Any, drawn: int, columns: int, model: Any) -> None:
    shares = None if weights is None else [1.0, 0.25, 2.0][: len(dims)]
    through_a_model(
        model, columns, lambda module: module.MatryoshkaLoss(model, INNER[inner](module, model), dims, shares, drawn)
    )


@pytest.mark.parametrize("inner", ["ranking", "cached"])
def test_prefixes_take_one_product(inner: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = module_of("ours")
    calls: list[Any] = []
    op = ours.K.row_softmax_loss
    monkeypatch.setattr(ours.K, "row_softmax_loss", lambda *a, **named: calls.append(named["dims"]) or op(*a, **named))
    ours.MatryoshkaLoss(model, INNER[inner](ours, model), [384, 64])(tokens(model, 5, 2), None).backward()
    assert calls == [[384, 64]]


# ---- what is refused, and what it looks like from outside


@pytest.mark.parametrize("name", CLASSES)
def test_has_the_same_signature(name: str) -> None:
    methods = ["calculate_loss"] if name.startswith("Cached") else []
    assert_same_signature(getattr(module_of("ours"), name), getattr(module_of("theirs"), name), *methods)


def test_its_examples_run() -> None:
    """Its file is not among those whose examples pytest runs, for collecting it would import the package each time."""
    found = doctest.testmod(module_of("ours"))
    assert (found.failed, found.attempted) == (0, 4)


@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"])
def test_other_similarities_are_refused(name: str, model: Any) -> None:
    from sentence_transformers import util

    kind = getattr(module_of("ours"), name)
    for function, said in ((util.euclidean_sim, "euclidean_sim"), (lambda x, y: x @ y.t(), "<lambda>")):
        with pytest.raises(NotImplementedError, match=f"similarity_fct: expected cos_sim or dot_score of .*got {said}"):
            kind(model, similarity_fct=function)
    loss = kind(model)
    loss.similarity_fct = util.manhattan_sim
    with pytest.raises(NotImplementedError, match=r"similarity_fct: .*got manhattan_sim"):
        loss.calculate_loss([[torch.eye(3)]] * 2) if "Cached" in name else results(loss, [torch.eye(3)] * 2)


def test_the_similarity_of_a_model(model: Any) -> None:
    values = embeddings(2)
    for name in ("cosine", "dot"):
        model.similarity_fn_name = name
        ours, theirs = (
            module_of(whose).MultipleNegativesRankingLoss(None, 2.0, model.similarity) for whose in ("ours", "theirs")
        )
        assert_same(results(ours, values), results(theirs, values))
    model.similarity_fn_name = "euclidean"
    with pytest.raises(NotImplementedError, match="got euclidean_sim"):
        module_of("ours").MultipleNegativesRankingLoss(None, 2.0, model.similarity)
    model.similarity_fn_name = "cosine"


def test_too_few_columns_are_refused(model: Any, guide: Any) -> None:
    ours = module_of("ours")
    with pytest.raises(ValueError, match=r"embeddings: expected those of queries and of positives, got 1 columns"):
        results(ours.MultipleNegativesRankingLoss(None), embeddings(2)[:1])
    with pytest.raises(ValueError, match="sentence_features: expected 2 or 3 columns of texts, got 1"):
        ours.GISTEmbedLoss(model, guide)(tokens(model, 4, 1), None)
    with pytest.raises(ValueError, match="partition_mode"):
        ours.MultipleNegativesRankingLoss(None, directions=GTE, partition_mode="per_direction")


def test_model_cards_tell_the_same(model: Any) -> None:
    for make in INNER.values():
        ours, theirs = (make(module_of(whose), model) for whose in ("ours", "theirs"))
        whole = [module_of(w).MatryoshkaLoss(model, x, [384]) for w, x in (("ours", ours), ("theirs", theirs))]
        for a, b in ((ours, theirs), whole):
            assert type(a).__name__ == type(b).__name__
            assert a.get_config_dict() | {"guide": None} == b.get_config_dict() | {"guide": None}
            assert getattr(a, "citation", None) == getattr(b, "citation", None)


# ---- memory

LARGE = 1536


@pytest.mark.parametrize("directions", [DIRECTIONS[0], GTE])
def test_nothing_grows_with_the_square_of_the_batch(directions: tuple[str, ...]) -> None:
    leaves = [t.requires_grad_() for t in embeddings(3, LARGE, 16)]
    square = 4 * LARGE * 2 * LARGE
    kept = {}
    for whose in ("ours", "theirs"):
        loss = module_of(whose).MultipleNegativesRankingLoss(None, directions=directions)
        with saved_bytes() as sizes:
            loss.compute_loss_from_embeddings(leaves, None)
        kept[whose] = sum(sizes)
    assert kept["theirs"] > square
    assert kept["ours"] < square / 10


# ---- its own trainer

TRAINED: dict[str, Callable[[Any, Any], Any]] = {
    **INNER,
    "prefixes": lambda module, model: module.MatryoshkaLoss(
        model, module.MultipleNegativesRankingLoss(model), [384, 128, 32]
    ),
}


@pytest.mark.parametrize(
    ("name", "steps"), [("ranking", 12), *(pytest.param(name, 50, marks=pytest.mark.slow) for name in TRAINED)]
)
def test_its_trainer(name: str, steps: int, tmp_path: Path) -> None:
    """With one import changed the curve is the same, dropout and all; a slow test has three columns, too."""
    for columns in (2,) if steps < 50 else (2, 3):
        ours, theirs = (
            trained(
                lambda model, whose=whose: TRAINED[name](module_of(whose), model),
                tmp_path, steps=steps, batch=8, columns=columns,
            )
            for whose in ("ours", "theirs")
        )  # fmt: skip
        assert len(ours) == steps
        rounding = 1e-5 if name == "guided" else 0.0  # of logits of up to 100, where the loss is small
        assert ours == pytest.approx(theirs, rel=1e-5, abs=rounding)
        assert sum(ours[-5:]) < sum(ours[:5])


@pytest.mark.slow
def test_fifty_steps_of_all_six_layers(tmp_path: Path) -> None:
    ours, theirs = (
        trained(lambda model, whose=whose: INNER["ranking"](module_of(whose), model),
                tmp_path, steps=50, batch=16, layers=6)
        for whose in ("ours", "theirs")
    )  # fmt: skip
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow  # times
@linux_only
def test_a_cached_batch_of_4096_takes_less_time_and_memory(model: Any) -> None:
    """Of the loss; the embedding of the texts is the same code. Run it with ``-s`` to read the figures."""
    values = embeddings(2, 4096, 384)
    taken = {}
    for whose in ("ours", "theirs"):
        loss = module_of(whose).CachedMultipleNegativesRankingLoss(model, mini_batch_size=64)

        def step(loss: Any = loss) -> None:
            loss.calculate_loss([[c.requires_grad_() for c in t.split(64)] for t in values], with_backward=True)

        step()
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        taken[whose] = min(seconds), peak_mb(step, calls=3)
        print(f"{whose}: {taken[whose][0]:.2f} s, {taken[whose][1]:.0f} MB")
    assert taken["ours"][0] < taken["theirs"][0]
    assert taken["ours"][1] < taken["theirs"][1]
