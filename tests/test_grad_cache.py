"""Steps in chunks against plain steps: gradients, random numbers, statistics, calls, memory, and several processes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory import linux_only, peak_mb
from torch import Tensor, nn

from ssl_kernels import ClipLoss, NTXentLoss, SigLipLoss, SupConLoss, grad_cache

ROWS = 23
Tower = Callable[..., Any]
Embed = Callable[..., tuple[Any, ...]]  # what grad_cache is


def plain(
    towers: Sequence[Callable[..., Any]], inputs: Sequence[Any], chunk_size: object, **_: object
) -> tuple[Any, ...]:
    """One forward pass over all rows."""
    calls = zip(towers, inputs, strict=True)
    return tuple(t(*i) if isinstance(i, tuple) else t(**i) if isinstance(i, dict) else t(i) for t, i in calls)


def in_chunks(towers: Sequence[Tower], inputs: Sequence[Tensor], chunk_size: int) -> tuple[Tensor, ...]:
    """As grad_cache calls the towers, but with all activations kept: what sees a chunk or draws random numbers."""
    chunks = [given.split(chunk_size) for given in inputs]
    embeddings = [[tower(chunk) for chunk in given[:-1]] for tower, given in zip(towers, chunks, strict=True)]
    for found, tower, given in zip(embeddings, towers, chunks, strict=True):
        found.append(tower(given[-1]))
    return tuple(torch.cat(found) for found in embeddings)


class Model(nn.Module):
    """Towers of images, texts and sounds, the scalars of a loss, and how many rows each tower was called with."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__()
        layers = (nn.Linear(6, 16), *between, nn.GELU(), nn.Linear(16, 5))
        self.image, self.sound = copy.deepcopy(nn.Sequential(*layers)), copy.deepcopy(nn.Sequential(*layers))
        self.words = nn.Embedding(11, 5)
        self.log_scale, self.bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.tensor(-2.0))
        self.rows = {"image": list[int](), "sound": list[int](), "text": list[int]()}

    def encode_image(self, images: Tensor) -> Tensor:
        self.rows["image"].append(len(images))
        return F.normalize(self.image(images), dim=-1)

    def encode_sound(self, sounds: Tensor) -> Tensor:
        self.rows["sound"].append(len(sounds))
        return F.normalize(self.sound(sounds), dim=-1)

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None, pool: str = "mean") -> Tensor:
        self.rows["text"].append(len(tokens))
        words = self.words(tokens)
        words = words if mask is None else words * mask[..., None]
        return F.normalize(words.mean(1) if pool == "mean" else words.amax(1), dim=-1)

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """As open_clip's models, whose logit scale may have one dimension."""
        features = {"image_features": self.encode_image(images), "text_features": self.encode_text(tokens)}
        return {**features, "logit_scale": self.log_scale.exp()[None], "logit_bias": self.bias}


def data(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randn, ROWS, 6, generator=generator, dtype=dtype)
    tokens = torch.randint(0, 11, (ROWS, 7), generator=generator)
    return {"images": draw(), "sounds": draw(), "tokens": tokens, "mask": (tokens > 2).to(dtype)}


def clip(m: Model, embed: Embed, images: Tensor, tokens: Tensor, **_: Tensor) -> Tensor:
    x, y = embed([m.encode_image, m.encode_text], [images, tokens], 5)
    return ClipLoss()(x, y, m.log_scale.exp())


def siglip_with_dicts(m: Model, embed: Embed, images: Tensor, tokens: Tensor, mask: Tensor, **_: Tensor) -> Tensor:
    text = {"tokens": tokens, "mask": mask, "pool": "max"}
    x, y = embed([m.encode_image, m.encode_text], [(images,), text], (5, 7))
    return SigLipLoss()(x, y, m.log_scale.exp(), m.bias)


def open_clip(m: Model, embed: Embed, images: Tensor, tokens: Tensor, **_: Tensor) -> Tensor:
    (out,) = embed([m], [(images, tokens)], 4)
    return SigLipLoss()(**{**out, "logit_scale": out["logit_scale"].squeeze()})


def nt_xent(m: Model, embed: Embed, images: Tensor, sounds: Tensor, **_: Tensor) -> Tensor:
    return NTXentLoss(0.2)(*embed([m.encode_image, m.encode_image], [images, sounds], 8))


def three_towers(m: Model, embed: Embed, images: Tensor, sounds: Tensor, tokens: Tensor, **_: Tensor) -> Tensor:
    x, y, z = embed([m.encode_image, m.encode_sound, m.encode_text], [images, sounds, tokens], [5, 100, 1])
    return sum(ClipLoss()(a, b, m.log_scale.exp()) for a, b in ((x, y), (y, z), (z, x)))


def two_losses_of_a_nest(m: Model, embed: Embed, images: Tensor, tokens: Tensor, **_: Tensor) -> Tensor:
    """Nested arguments and results; one result has no dimension beyond its rows, and one is no tensor."""

    def tower(batch: dict[str, Any], power: float) -> list[Any]:
        x = m.encode_image(batch["views"][0])
        return ["of the image", {"unit": x, "spread": x.var(1), "tokens": batch["tokens"]}, power]

    (out,) = embed([tower], [({"views": [images], "tokens": tokens}, 2.0)], 11, modules=[m])
    name, embeddings, power = out
    assert name == "of the image"
    return SupConLoss(0.2)(embeddings["unit"], embeddings["tokens"][:, 0]) + embeddings["spread"].pow(power).mean()


STEPS = [clip, siglip_with_dicts, open_clip, nt_xent, three_towers, two_losses_of_a_nest]


def gradients(model: Model, loss: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_close(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float) -> None:
    """Relative to the largest gradient of a parameter."""
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        gradient = found[name]
        assert (gradient is None) == (exact is None), name
        if exact is not None and gradient is not None:
            assert gradient.dtype == exact.dtype
            assert (gradient - exact).abs().max() <= tolerance * exact.abs().max(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_the_plain_one(step: Callable[..., Tensor], dtype: torch.dtype, tolerance: float) -> None:
    model, batch = Model().to(dtype), data(dtype)
    expected = step(model, plain, **batch)
    loss = step(model, grad_cache, **batch)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    exact = gradients(model, expected)
    assert_close(gradients(model, loss), exact, tolerance)
    with torch.no_grad():
        loss = step(model, grad_cache, **batch)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=0)


def test_gradients_are_added_to_those_that_are_there() -> None:
    model, batch = Model().double(), data(torch.float64)
    loss = clip(model, grad_cache, **batch)
    once = {n: None if g is None else g.clone() for n, g in gradients(model, loss).items()}
    clip(model, grad_cache, **batch).div(2).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, 1.5 * once[name])


def test_what_is_called_and_with_how_many_rows() -> None:
    model, batch = Model(), data()
    x, y = grad_cache([model.encode_image, model.encode_text], [batch["images"], batch["tokens"]], (10, ROWS))
    assert model.rows == {"image": [10, 10, 3], "text": [ROWS], "sound": []}
    (x @ y.T).sum().backward()
    assert model.rows == {"image": 2 * [10, 10, 3], "text": 2 * [ROWS], "sound": []}


def test_a_batch_that_fits_is_a_plain_step() -> None:
    model, batch = Model(nn.Dropout()), data()
    inputs = [batch["images"], batch["tokens"]]
    x, y = grad_cache([model.encode_image, model.encode_text], inputs, ROWS)
    torch.manual_seed(0)
    (x @ y.T).sum().backward()
    assert model.rows == {"image": [ROWS], "text": [ROWS], "sound": []}


@pytest.mark.parametrize("how", ["frozen", "unused"])
def test_a_tower_without_gradient_has_no_second_pass(how: str) -> None:
    model, batch = Model(), data()
    model.image.requires_grad_(how != "frozen")
    x, y = grad_cache([model.encode_image, model.encode_text], [batch["images"], batch["tokens"]], 10)
    assert x.requires_grad == (how != "frozen")
    ClipLoss()(x.detach(), y, 10.0).backward()
    assert model.rows["image"] == [10, 10, 3]
    assert model.rows["text"] == 2 * [10, 10, 3]
    assert model.words.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.image.parameters())


def test_of_a_frozen_tower_a_scalar_is_trained_with_the_last_chunk() -> None:
    model, batch = Model(), data()
    model.requires_grad_(False)
    model.log_scale.requires_grad_()
    loss = open_clip(model, grad_cache, **batch)
    model.rows["image"].clear()
    found = gradients(model, loss)
    assert model.rows["image"] == [3]
    assert_close(found, gradients(model, open_clip(model, plain, **batch)), 1e-5)


class Noisy(nn.Module):
    """What a training step should repeat: drops, draws by the size of the batch, and moves statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(x + 0.1 * torch.randn_like(x)))


def test_the_second_pass_repeats_the_first() -> None:
    """Random numbers, the statistics of a shared BatchNorm, and where both stand afterwards."""
    model, batch = Model(Noisy(), nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))), data()
    alike = copy.deepcopy(model)
    inputs = [batch["images"], batch["sounds"]]
    embedded = list[Tensor]()
    model.image.register_forward_hook(lambda _, __, output: embedded.append(output.detach()))

    torch.manual_seed(3)
    z = in_chunks([alike.encode_image, alike.encode_image], inputs, 5)
    draw = torch.rand(())
    torch.manual_seed(3)
    cached = grad_cache([model.encode_image, model.encode_image], inputs, 5)
    between = model.state_dict()["image.1.norm.running_mean"].clone()
    found = gradients(model, NTXentLoss(0.2)(*cached))

    assert torch.rand(()) == draw
    first, second = embedded[: len(embedded) // 2], embedded[len(embedded) // 2 :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(cached, z, strict=True))
    assert_close(found, gradients(alike, NTXentLoss(0.2)(*z)), 1e-5)
    assert torch.equal(between, model.image[1].norm.running_mean)
    assert model.image[1].norm.num_batches_tracked == 10
    for (name, buffer), expected in zip(model.named_buffers(), alike.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, msg=name)


def test_a_module_may_be_in_another_graph_too() -> None:
    model, batch = Model(nn.BatchNorm1d(16)), data()
    other = model.image(batch["sounds"]).square().mean()
    loss = nt_xent(model, grad_cache, **batch) + other
    found = gradients(model, loss)
    expected = (
        nt_xent(model, lambda t, i, c: in_chunks(t, i, c), **batch) + model.image(batch["sounds"]).square().mean()
    )
    assert_close(found, gradients(model, expected), 1e-5)


def test_an_error_leaves_everything_as_it_was() -> None:
    model, batch = Model(Noisy()), data()
    loss = nt_xent(model, grad_cache, **batch)
    model.image[1].register_forward_pre_hook(lambda *_: (torch.rand(1), 1 / 0))
    rng, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("within", [False, True], ids=["backward outside", "backward within"])
def test_autocast(within: bool) -> None:
    """Weights are rounded to bfloat16, and so are their gradients, of each chunk."""
    model, batch = Model(), data()
    dtypes = list[torch.dtype]()
    model.image.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))

    def step(embed: Embed) -> dict[str, Tensor | None]:
        with torch.autocast("cpu", torch.bfloat16):
            loss = clip(model, embed, **batch)
            if within:
                return gradients(model, loss)
        return gradients(model, loss)

    expected = step(plain)
    found = step(grad_cache)
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) == 1 + 2 * 5
    assert_close(found, expected, 2e-2)


def test_embeddings_of_autocast_have_its_dtype() -> None:
    layer = nn.Linear(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        (x,) = grad_cache([layer], [torch.randn(9, 6)], 4)
    assert x.dtype == torch.bfloat16


@pytest.mark.parametrize("overflows", [False, True])
def test_a_scaler_scales_gradients_and_finds_what_overflows(overflows: bool) -> None:
    model, batch = Model(), data()
    expected = gradients(model, clip(model, plain, **batch))
    weights = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127 if overflows else 1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    loss = clip(model, grad_cache, **batch) * (100 if overflows else 1)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    if not overflows:
        assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, expected, 1e-5)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == (2.0**126 if overflows else 1024.0)
    same = [torch.equal(value, weights[name]) for name, value in model.state_dict().items() if "image" in name]
    assert all(same) if overflows else not any(same)


def test_tensors_without_rows_go_to_every_chunk() -> None:
    def tower(x: Tensor, factor: Tensor, table: Tensor) -> Tensor:
        return layer(x * factor + table.sum())

    layer, table, x = nn.Linear(3, 2), torch.randn(9), torch.randn(8, 3)
    towers = [functools.partial(tower, table=table)]
    (cached,) = grad_cache(towers, [(x, torch.tensor(2.0))], 3, modules=[layer])
    torch.testing.assert_close(cached, tower(x, torch.tensor(2.0), table))


def test_errors_name_the_argument() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(8, 3)
    drifting = iter(range(9))
    for towers, inputs, size, message in (
        ([layer], [], 4, "inputs: expected one for each of at least one tower, got 0 for 1"),
        ([], [], 4, "inputs: expected one for each of at least one tower, got 0 for 0"),
        ([layer], [x], 0, "chunk_size: expected at least 1, for all or each of 1 towers, got 0"),
        ([layer], [x], (2, 3), r"chunk_size: expected at least 1, for all or each of 1 towers, got \(2, 3\)"),
        ([layer, layer], [x, (x, x[1:])], 4, r"inputs\[1\]: expected tensors of one number of rows, got 7 and 8"),
        ([layer], [["a word"]], 4, r"inputs\[0\]: expected tensors of one number of rows, got no tensors"),
        ([layer], [x.clone().requires_grad_()], 4, r"inputs\[0\]: expected tensors that require no gradient"),
        (
            [layer, lambda x: layer(x)],
            [x, x],
            4,
            r"towers\[1\]: expected a module, a method of one, or modules=.*lambda",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            grad_cache(towers, inputs, size)
    for tower, message in (
        (lambda x: layer(x)[1:], r"towers\[0\]: expected tensors of 4 rows, as its input has, got one of \[3, 2\]"),
        (lambda x: layer(x).sum(), r"towers\[0\]: expected a scalar to be the same in each chunk"),
        (lambda _: torch.tensor([next(drifting)]), r"towers\[0\]: expected a scalar to be the same in each chunk"),
    ):
        with pytest.raises(ValueError, match=message):
            grad_cache([tower], [x], 4, modules=[layer])


def test_parameters_are_no_inputs_of_the_graph() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(8, 3)
    (z,) = grad_cache([layer], [x], 3)
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(z.sum(), layer.weight, retain_graph=True)
    z.square().sum().backward(retain_graph=True)
    once = layer.weight.grad.clone()
    z.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * once)


class Wide(nn.Module):
    """Keeps ``layers`` times ``width`` floats of each row."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.copies, self.layers = width // 32, nn.Sequential(*(nn.Hardtanh() for _ in range(layers)))
        self.start = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """A view of the last activations, as of the first token of a transformer."""
        return self.layers(self.start(x).repeat(1, self.copies))[:, :32]


@linux_only
@pytest.mark.parametrize(
    ("rows", "chunk", "layers"), [(256, 16, 3), pytest.param(8192, 128, 20, marks=pytest.mark.slow)]
)
def test_the_memory_is_that_of_a_chunk_and_the_embeddings(rows: int, chunk: int, layers: int) -> None:
    towers = [Wide(2**18 // chunk, layers) for _ in range(2)]
    inputs = [torch.randn(rows, 32) for _ in range(2)]

    def step(rows: int) -> None:
        x, y = grad_cache(towers, [given[:rows] for given in inputs], chunk)
        ClipLoss()(x, y, 10.0).backward()

    small, large = peak_mb(lambda: step(chunk), calls=2), peak_mb(lambda: step(rows), calls=2)
    assert small > 2 * layers  # or else it says nothing
    assert large <= 1.3 * small + 2 * rows * 32 * 4 / 2**20
