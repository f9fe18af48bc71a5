"""What only a device can do wrong: waiting for the host, graphs, streams, other devices, memory, offsets past 2^31."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from device_cases import (
    CASES,
    DEVICE,
    ON_GPU,
    SMALL,
    Case,
    Inputs,
    Result,
    Sizes,
    assert_close,
    evaluate,
    every,
    first_of_each,
    gpu_only,
    lay_out,
    reference,
)
from torch import Tensor

import ssl_kernels
from ssl_kernels import (
    ALBEFContrastiveLoss,
    BarlowTwinsLoss,
    ClipLoss,
    DINOHead,
    DINOLoss,
    IBOTPatchLoss,
    InfoNCELoss,
    KeyQueue,
    KoLeoLoss,
    MoCoLoss,
    MoCoV3Loss,
    ModelEma,
    NTXentLoss,
    SigLipLoss,
    SinkhornKnopp,
    SupConLoss,
    VICRegLoss,
)
from ssl_kernels.ops import matmul
from ssl_kernels.ops.hand_over import scale_

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def assert_equal(a: Result, b: Result) -> None:
    for x, y in zip(a.tensors, b.tensors, strict=True):
        assert torch.equal(x, y)


def of(name: str, variant: str | None = None) -> Case:
    return next(case for case in CASES if case.op == name and variant in (None, case.variant))


# ---- the host


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises. On a CPU there is nothing to wait for."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu_only
@every
@dtypes
def test_the_host_never_waits(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(SMALL, dtype)
    evaluate(case, inputs)  # kernels are compiled and loaded
    with no_waiting():
        evaluate(case, inputs)


@gpu_only
@every
@dtypes
def test_cuda_graph(case: Case, dtype: torch.dtype) -> None:
    """Both passes are captured once, and replayed on other inputs."""
    inputs, others = case.inputs(SMALL, dtype), case.inputs(SMALL, dtype, seed=1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            evaluate(case, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(case, inputs)
    for name, t in inputs.items():
        t.copy_(others[name])
    graph.replay()
    assert_equal(captured, evaluate(case, others))


@first_of_each
def test_compiles_into_one_graph(case: Case) -> None:
    inputs = case.inputs(SMALL)
    torch.compiler.reset()
    # Inductor on the ops with the most around them; for the rest it would only take its time.
    deep = ON_GPU and case.op in ("sigmoid_contrastive_loss", "info_nce_loss", "albef_contrastive_loss", "dino_loss")
    compiled = torch.compile(case.call, fullgraph=True, backend="inductor" if deep else "aot_eager")
    ours, expected = evaluate(case, inputs, compiled), evaluate(case, inputs)
    for a, b in zip(ours.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@gpu_only
@pytest.mark.parametrize("widens", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_products_of_16_bits_add_into_float32(
    dtype: torch.dtype, widens: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call where this torch has it, and as a torch without it adds them."""
    if not widens:
        monkeypatch.setattr(matmul, "_addmm_widens", lambda *_: False)
    a, b = torch.randn(300, 200, device=DEVICE, dtype=dtype), torch.randn(200, 72, device=DEVICE, dtype=dtype)
    whole = torch.full((300, 216), torch.nan, device=DEVICE)
    out = whole[:, 72:144]
    matmul.add_matmul(out, a, b, first=True)
    matmul.add_matmul(out, 2 * a, b, first=False)
    # To the precision of fp32; rounded to 16 bits, numbers of this size were off by 0.02 and more.
    torch.testing.assert_close(out.double(), 3 * a.double() @ b.double(), rtol=1e-4, atol=1e-3)
    assert whole[:, :72].isnan().all()
    assert whole[:, 144:].isnan().all()


# ---- streams and devices


@gpu_only
@first_of_each
def test_another_stream(case: Case) -> None:
    """Inputs arrive late on that stream: work on any other would read NaN."""
    inputs = case.inputs(SMALL)
    expected = evaluate(case, inputs)
    late = {n: torch.full_like(t, torch.nan) if t.is_floating_point() else t.clone() for n, t in inputs.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        for name, t in late.items():
            t.copy_(inputs[name])
        ours = evaluate(case, late)
    torch.cuda.current_stream().wait_stream(side)
    assert_equal(ours, expected)


@pytest.mark.skipif(not ON_GPU or torch.cuda.device_count() < 2, reason="needs two GPUs")
@first_of_each
def test_a_device_that_is_not_the_current_one(case: Case) -> None:
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    ours = evaluate(case, case.inputs(SMALL, device=other))
    assert all(t.device == other for t in ours.tensors)
    expected = evaluate(case, case.inputs(SMALL, device=torch.device("cuda", 0)))
    for a, b in zip(ours.tensors, expected.tensors, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-6)


def test_a_factor_is_looked_at_on_a_cpu_only() -> None:
    """Of a gradient without a kernel to scale it; on a meta device there is nothing to look at."""
    gradient = torch.empty(2, 3, 4, dtype=torch.float64, device="meta")
    assert scale_(gradient, torch.empty(3, dtype=torch.float64, device="meta"), "eager") is gradient


@gpu_only
@pytest.mark.parametrize("case", [of("sigmoid_contrastive_loss"), of("clip_loss"), of("info_nce_loss")], ids=str)
def test_a_scale_on_the_cpu(case: Case) -> None:
    inputs = case.inputs(SMALL)
    ours = evaluate(case, {**inputs, "scale": inputs["scale"].cpu()})
    assert ours.gradients["scale"].device.type == "cpu"
    torch.testing.assert_close(ours.gradients["scale"], evaluate(case, inputs).gradients["scale"].cpu())


# ---- memory


QUADRATIC = ("sigmoid_contrastive_loss", "clip_loss", "nt_xent_loss", "sup_con_loss", "info_nce_loss", "koleo_loss")


@gpu_only
@pytest.mark.parametrize("name", QUADRATIC)
def test_peak_memory_is_linear(name: str) -> None:
    """Far below one matrix of similarities: tiles within the workspace, and a few times the features in float32."""
    case, sizes = of(name), Sizes(24_576, 128, 24_576)
    inputs = case.inputs(sizes, torch.bfloat16)
    evaluate(case, case.inputs(SMALL, torch.bfloat16))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with ssl_kernels.use_workspace(64):
        evaluate(case, inputs)
    peak_mb = (torch.cuda.max_memory_allocated() - before) / 2**20
    features_mb = 4 * sizes.rows * sizes.width / 2**20
    assert peak_mb <= 3 * 64 + 16 * features_mb
    assert peak_mb < 4 * sizes.rows**2 / 2**20 / 4


def free_gb() -> float:
    return torch.cuda.mem_get_info()[0] / 2**30 if ON_GPU else 0.0


@pytest.mark.skipif(free_gb() < 36, reason=f"needs a GPU with 36 GB free, found {free_gb():.0f}")
@first_of_each
def test_offsets_past_32_bits(case: Case) -> None:
    """Rows of bfloat16 that lie 2^31 elements apart from first to last, 4 GB to an argument."""
    near = case.inputs(SMALL, torch.bfloat16)
    if case.op == "ema_update_":
        near = {name: t for name, t in near.items() if t.numel() > 1} | {"momentum": near["momentum"]}
    wanted = [name for name, t in near.items() if t.dim() > 1][:4]
    far = {**near, **lay_out(case, {name: near[name] for name in wanted}, "far")}
    ours = evaluate(case, far)
    assert_close(case, ours, reference(case, near), reference(case, near, torch.float64), torch.bfloat16)


# ---- modules


def _features(i: Inputs) -> tuple[Tensor, Tensor]:
    return i["x"].detach().requires_grad_(), i["y"]


MODULES: dict[str, tuple[Callable[[int, int], torch.nn.Module], Callable[[Any, Inputs], Tensor]]] = {
    "SigLipLoss": (lambda d, k: SigLipLoss(), lambda m, i: m(*_features(i), i["scale"], i["bias"])),
    "ClipLoss": (lambda d, k: ClipLoss(), lambda m, i: m(*_features(i), i["scale"])),
    "InfoNCELoss": (lambda d, k: InfoNCELoss(), lambda m, i: m(*_features(i), i["keys"])),
    "NTXentLoss": (lambda d, k: NTXentLoss(), lambda m, i: m(*_features(i))),
    "NTXentLoss with a bank": (lambda d, k: NTXentLoss(0.5, (k, d)), lambda m, i: m(*_features(i))),
    "SupConLoss": (lambda d, k: SupConLoss(), lambda m, i: m(_features(i)[0], i["ids"])),
    "ALBEFContrastiveLoss": (
        lambda d, k: ALBEFContrastiveLoss(),
        lambda m, i: m(*_features(i), i["x_momentum"], i["y_momentum"], i["keys"], i["other_keys"], 10.0),
    ),
    "KoLeoLoss": (lambda d, k: KoLeoLoss(), lambda m, i: m(_features(i)[0])),
    "VICRegLoss": (lambda d, k: VICRegLoss(), lambda m, i: m(*_features(i))),
    "BarlowTwinsLoss": (lambda d, k: BarlowTwinsLoss(), lambda m, i: m(*_features(i))),
    "MoCoV3Loss": (lambda d, k: MoCoV3Loss(), lambda m, i: m(*_features(i), i["x_momentum"], i["y_momentum"])),
    "DINOHead": (lambda d, k: DINOHead(d, k, hidden_dim=16, bottleneck_dim=8), lambda m, i: m(_features(i)[0]).sum()),
    "DINOLoss": (
        lambda d, k: DINOLoss(k),
        lambda m, i: m(list(i["teacher"]), list(i["student"].detach().requires_grad_())),
    ),
    "SinkhornKnopp": (lambda d, k: SinkhornKnopp(), lambda m, i: m(i["teacher"], 0.07)),
}  # fmt: skip


def all_inputs(dtype: torch.dtype) -> Inputs:
    return of("albef_contrastive_loss").inputs(SMALL, dtype) | of("dino_loss").inputs(SMALL, dtype)


@pytest.mark.parametrize("name", MODULES)
def test_modules_move_to_the_device(name: str) -> None:
    """Their buffers come along, and a step of training does not wait for the device."""
    make, call = MODULES[name]
    inputs = all_inputs(torch.float32)
    module = make(SMALL.width, SMALL.many).to(DEVICE)
    assert all(t.device.type == DEVICE.type for t in (*module.parameters(), *module.buffers()))
    for waits in (True, False):  # the first call compiles
        with nullcontext() if waits else no_waiting():
            loss = call(module, inputs)
            if loss.requires_grad:
                loss.backward()
    assert loss.device.type == DEVICE.type
    assert loss.isfinite().all()


def test_a_queue_a_teacher_and_patches_on_the_device() -> None:
    inputs = all_inputs(torch.float32)
    queue, moco = KeyQueue(SMALL.many, SMALL.width, normalize=True).to(DEVICE), MoCoLoss().to(DEVICE)
    student = torch.nn.Sequential(torch.nn.Linear(SMALL.width, 8), torch.nn.BatchNorm1d(8)).to(DEVICE)
    teacher, patches = ModelEma(student), IBOTPatchLoss(SMALL.many).to(DEVICE)
    logits = inputs["student"][0]
    mask = torch.zeros(1, 3, SMALL.rows, dtype=torch.bool, device=DEVICE)
    mask[0, 1, : len(logits)] = True
    for waits in (True, False):
        with nullcontext() if waits else no_waiting():
            moco(inputs["x"].detach().requires_grad_(), inputs["y"], queue).backward()
            patches(inputs["teacher"][0], logits.detach().requires_grad_(), mask).backward()
            teacher.update(student)
    assert queue.pointer.item() == 2 * SMALL.rows % SMALL.many
    assert patches.center.center.norm() > 0
    assert all(t.device.type == DEVICE.type for m in (queue, teacher, patches) for t in m.state_dict().values())


# ---- a training run


class Towers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = torch.nn.Linear(24, 16), torch.nn.Linear(12, 16)
        self.log_scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = (torch.nn.functional.normalize(t, dim=-1) for t in (self.image(image), self.text(text)))
        return x, y, self.log_scale.exp()


@pytest.mark.parametrize("loss", ["sigmoid", "clip"])
def test_every_step_of_a_run_is_the_reference_s(loss: str) -> None:
    """Thirty steps of AdamW on the device, by our kernels and by the definition."""

    def run(backend: str) -> list[float]:
        torch.manual_seed(0)
        model, truth = Towers().to(DEVICE), torch.randn(24, 12, device=DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step in range(30):
            generator = torch.Generator().manual_seed(step)
            image = torch.randn(64, 24, generator=generator).to(DEVICE)
            with ssl_kernels.use_backend(backend):
                x, y, scale = model(image, image @ truth)
                value = ClipLoss()(x, y, scale) if loss == "clip" else SigLipLoss()(x, y, scale, -5.0)
                optimizer.zero_grad()
                value.backward()
            optimizer.step()
            losses.append(value.item())
        return losses

    ours = run("auto")
    assert ours == pytest.approx(run("reference"), rel=2e-4)
    assert ours[-1] < ours[0]
