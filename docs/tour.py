# %% [markdown]
# # A tour: four methods in one sitting
#
# SigLIP and CLIP learn emoji together with their names; MoCo and DINO learn handwritten digits from images alone. The
# data comes with the `train` extra, nothing is downloaded, and a laptop needs less than ten minutes.
#
# This page is what [tour.py](tour.py) printed and drew. To run it yourself, open that file as a notebook in VS Code,
# PyCharm or, with jupytext, JupyterLab; or type `cd docs && python tour.py`. Its pictures go to the folder `docs/tour`.

# %%
import itertools
import json
import os
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import ssl_kernels.functional as K
from ssl_kernels import ClipLoss, SigLipLoss, use_backend
from ssl_kernels.collapse import CollapseWarning
from ssl_kernels.trainers import data, dino, moco, optim
from ssl_kernels.trainers.clip import Clip
from ssl_kernels.trainers.data import image_data, openmoji
from ssl_kernels.trainers.evaluation import image_text
from ssl_kernels.trainers.evaluation.classifiers import nearest_classes
from ssl_kernels.trainers.evaluation.retrieval import plot_retrieval
from ssl_kernels.trainers.models import image_tower, text_tower, tokenizer
from ssl_kernels.trainers.self_supervised import Method
from ssl_kernels.trainers.siglip import SigLip, SigLipConfig

# TOUR_TINY=1 takes seconds and learns next to nothing.
STEPS, BATCH, EMOJI_SIZE, DIGIT_SIZE = (12, 16, 16, 16) if os.environ.get("TOUR_TINY") else (200, 128, 40, 32)
folder = Path("tour")
folder.mkdir(exist_ok=True)


def save(figure, name):
    figure.savefig(folder / name, dpi=80)
    plt.close(figure)


# %% [markdown]
# ## The data
#
# An emoji comes with its Unicode name: a pair of an image and a text. A digit comes in two random views, each turned,
# scaled and shifted; its label is for evaluation only.

# %%
pairs_config = SigLipConfig(image_size=EMOJI_SIZE, label_captions=0.0)  # names, without words of their categories
tokenize = tokenizer(pairs_config)
pairs = data.load(pairs_config, tokenize, batch_size=BATCH, seed=0, workers=0)
digits = image_data.load(moco.MoCoConfig(image_size=DIGIT_SIZE), batch_size=BATCH, seed=0, workers=0)
print(f"emoji:  {len(pairs.train)} to train on, {len(pairs.held_out)} held out")
print(f"digits: {len(digits.train)} to train on, {len(digits.held_out)} held out")

chosen = [len(pairs.train) * i // 8 for i in range(8)]
first, second = (view[:8] for view in next(digits.batches.batches(epoch=0))["views"])
figure, axes = plt.subplots(3, 8, figsize=(10, 4), layout="constrained")
for row, images in zip(axes, (pairs.train.load(chosen, EMOJI_SIZE), first, second), strict=True):
    for axis, image in zip(row, images, strict=True):
        axis.imshow(image.permute(1, 2, 0))
        axis.axis("off")
for axis, i in zip(axes[0], chosen, strict=True):
    axis.set_title(textwrap.fill(pairs.train.captions[i], 16), fontsize=7)
figure.supxlabel(openmoji.CREDIT, fontsize=7)
save(figure, "data.png")

# %% [markdown]
# ![Eight emoji with their names, and eight digits in two views each](tour/data.png)
#
# ## One loop for all
#
# A method is a module that takes a batch and returns its loss, and what is worth logging. The loop is the usual one.
# `ssl-kernels train` runs the same methods with what this loop leaves out: checkpoints, several devices, a log.
#
# `use_backend` chooses who computes the loss: `auto` takes the fused kernels, `reference` the plain formula in PyTorch,
# which stores every similarity.


# %%
def train(make_method, batches, backend="auto", steps=STEPS, lr=2e-3):
    torch.manual_seed(0)
    method = make_method()
    epochs = itertools.chain.from_iterable(batches.batches(epoch) for epoch in itertools.count())
    optimizer = torch.optim.AdamW(optim.parameter_groups(method, lr, weight_decay=0.05), betas=(0.9, 0.98))
    records = []
    with warnings.catch_warnings(record=True) as caught, use_backend(backend):
        warnings.simplefilter("always")
        if isinstance(method, Method):
            method.before_training(epochs)  # MoCo fills its queue
        for number, batch in enumerate(itertools.islice(epochs, steps), start=1):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * optim.cosine(number - 1, STEPS, warmup=STEPS // 10)
            if isinstance(method, Method):
                method.before_step(number, optimizer.param_groups)  # DINO sets its teacher's temperature
            loss, logged = method(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(number)  # a teacher follows its student, and keys enter the queue
            records.append({"loss": loss.item(), **{name: float(value) for name, value in logged.items()}})
    said = [str(warning.message) for warning in caught if warning.category is CollapseWarning]
    return SimpleNamespace(method=method.eval(), records=records, said=said)


# %% [markdown]
# ## The four methods
#
# - **SigLIP**: a sigmoid for every pair of an image and a text says whether they belong together.
# - **CLIP**: an image finds its text among those of the batch, and a text its image.
# - **MoCo**: a view finds the other view of its image among a queue of keys, which a slowly moving teacher made.
# - **DINO**: a student predicts, from one view, what its teacher says of the other one.

# %%
moco_config = moco.MoCoConfig(image_size=DIGIT_SIZE, batch_size=BATCH, queue_size=8 * BATCH)
# BatchNorm in the head would hinder the collapse below.
dino_config = dino.DINOConfig(image_size=DIGIT_SIZE, batch_size=BATCH, norm=False, freeze_last_layer=0)


def towers():
    return image_tower(pairs_config, EMOJI_SIZE, inverted=True), text_tower(pairs_config)


methods = {
    "SigLIP": (lambda: SigLip(*towers(), SigLipLoss()), pairs.batches),
    "CLIP": (lambda: Clip(*towers(), ClipLoss()), pairs.batches),
    "MoCo": (lambda: moco.make_method(moco_config, digits, STEPS), digits.batches),
    "DINO": (lambda: dino.make_method(dino_config, digits, STEPS), digits.batches),
}
fused = {name: train(*method) for name, method in methods.items()}
reference = {name: train(*method, backend="reference", steps=STEPS // 4) for name, method in methods.items()}

# %% [markdown]
# Each method was trained with the fused losses and, from the same start, for a quarter of the steps with the plain
# formulas. Here is the loss of both, and by what share they differ. The kernels are exact up to rounding; what remains
# is rounding that training itself lets grow, as it would after any other change in the order of a sum.

# %%
figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), layout="constrained")
for axis, name in zip(axes, methods, strict=True):
    ours, plain = ([record["loss"] for record in run[name].records] for run in (fused, reference))
    axis.plot(plain, color="tab:orange", linewidth=4, alpha=0.6, label="reference")
    axis.plot(ours, color="tab:blue", linewidth=1, label="fused")
    axis.set(title=name, xlabel="step")
    axis.legend()
    apart = [abs(a - b) / b for a, b in zip(ours, plain, strict=False)]
    print(f"{name:6} loss {ours[0]:5.2f} -> {ours[-1]:.2f}; apart by {apart[0]:.0e} at first, {max(apart):.0e} at most")
save(figure, "losses.png")

# %% [markdown]
# ![The losses of the four methods, fused and reference, one on the other](tour/losses.png)
#
# ## A retrieval sheet
#
# Names of emoji that CLIP has never seen look for their images, among all that were held out. The names are spread
# evenly over the held-out ones, not picked. In brackets: whether CLIP has met the parts of a name, in other
# combinations, or not even the concept. A green frame marks the right image.

# %%
for name in ("SigLIP", "CLIP"):
    with torch.no_grad():
        x = fused[name].method.encode_image(pairs.held_out.load(range(len(pairs.held_out)), EMOJI_SIZE))
        y = fused[name].method.encode_text(tokenize(pairs.held_out.captions))
    first, five = (image_text.recall(y @ x.T, k) for k in (1, 5))
    print(f"{name:6} right image first: {first:.2f}, among the first five: {five:.2f}, by chance {1 / len(x):.3f}")
    if name == "CLIP":
        plot_retrieval(folder / "retrieval.png", pairs.held_out, y @ x.T, EMOJI_SIZE, openmoji.CREDIT, 7, 5)

# %% [markdown]
# ![Seven names with the five images that lie nearest to each](tour/retrieval.png)
#
# SigLIP starts more slowly than CLIP. After the forty epochs of `ssl-kernels train` both do equally well.
#
# ## Maps of features
#
# MoCo and DINO never saw a label. Do their features know digits? The maps show held-out digits by the two principal
# components of pixels, of a net before training, and of both methods. Below are the shares of held-out digits whose
# nearest neighbour, among ten labelled images of each digit, is of the same kind.

# %%
few = torch.cat([(digits.train.labels == label).nonzero()[:10, 0] for label in range(10)])
some = range(0, len(digits.held_out), 2)
labels, truth = digits.train.labels[few], digits.held_out.labels[some]
torch.manual_seed(0)
untrained = methods["DINO"][0]().evaluated.eval()
maps = {
    "pixels": lambda images: images[:, 0].flatten(1).float() / 255,
    "before training": untrained.features,
    "MoCo": fused["MoCo"].method.evaluated.features,
    "DINO": fused["DINO"].method.evaluated.features,
}
figure, axes = plt.subplots(1, 4, figsize=(12, 3.2), layout="constrained")
for axis, (name, features) in zip(axes, maps.items(), strict=True):
    with torch.no_grad():
        gallery = features(digits.train.load(few.tolist(), DIGIT_SIZE))
        queries = features(digits.held_out.load(some, DIGIT_SIZE))
    right = nearest_classes(queries, gallery, labels, k=1) == truth
    print(f"{name:16} {right.float().mean():.2f}")
    x = F.normalize(queries - queries.mean(0), dim=1)
    points = axis.scatter(*(x @ torch.pca_lowrank(x, 2)[2]).T, c=truth, cmap="tab10", s=6)
    axis.set(title=name, xticks=[], yticks=[])
figure.colorbar(points, ax=axes, ticks=range(10), label="digit")
save(figure, "maps.png")

# %% [markdown]
# ![Held-out digits by the principal components of their features](tour/maps.png)
#
# After six epochs MoCo's features are better than pixels. DINO's are better than before training, but need the twelve
# epochs of `ssl-kernels train dino` to beat pixels.
#
# ## Collapse, on purpose
#
# Nothing in DINO's loss keeps the teacher from saying the same of every image: the student would soon agree. Two things
# prevent it. A **centre** is subtracted from the teacher's logits, so that no prototype wins everywhere; this trainer
# finds it by Sinkhorn-Knopp, the first DINO took a moving mean. And a low **temperature** sharpens the logits, so that
# they do not become uniform. Where either is missing DINO collapses, each time in another way.
#
# `CollapseMonitor` watches the teacher and warns. The trainer has one; in a loop of your own, call
# `monitor = CollapseMonitor(out_dim=K)` once and `monitor(teacher_logits, loss, teacher_temp, center)` where you log.

# %%
broken = {
    "without a centre": {"centering": "mean", "center_momentum": 1.0},  # a mean that stays at zero
    "without sharpening": {"teacher_temp": 1.0, "warmup_teacher_temp": 1.0},
}
runs = {"DINO": fused["DINO"]}
for name, changes in broken.items():
    config = dino.DINOConfig(**{**vars(dino_config), **changes})
    runs[name] = train(lambda config=config: dino.make_method(config, digits, STEPS), digits.batches)

figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), layout="constrained")
for axis, key in zip(axes, ("loss", "teacher_entropy_share", "marginal_entropy_share", "kl"), strict=True):
    for name, run in runs.items():
        axis.plot([record[key] for record in run.records], label=name)
    axis.set(title=key.replace("_", " "), xlabel="step")
axes[0].legend()
save(figure, "collapse.png")
for name, run in runs.items():
    print(textwrap.fill(f"{name}: {' '.join(run.said) or 'no warning'}", 110, subsequent_indent="    "))

# %% [markdown]
# ![Loss, entropies and divergence of the sound run and of both broken ones](tour/collapse.png)
#
# The loss misleads: it is lowest where there is no centre. The entropies tell what happened, here as shares of their
# maximum ln K. Without a centre, both fall to zero: every image gets the same prototype. Without sharpening, both rise
# to one: every image gets all prototypes alike. The gap between the two is what the teacher's output tells of an image,
# and `kl`, from teacher to student, is what the student can still learn. Only the sound run keeps a gap.
#
# ## Memory
#
# The fused losses give the same result, so what do they gain? The plain formula stores matrices of batch x batch
# similarities, of which the fused loss sees one tile at a time. Here is the peak of what torch allocates for SigLIP's
# loss, forward and backward, beside the embeddings, as torch's own profiler counts it.


# %%
def peak_mb(rows, backend):
    x, y = (F.normalize(torch.randn(rows, 128), dim=1).requires_grad_() for _ in range(2))
    with use_backend(backend), torch.profiler.profile(profile_memory=True) as profiler:
        K.sigmoid_contrastive_loss(x, y, 10.0, -10.0).backward()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    (folder / "trace.json").unlink()
    changes = [event["args"]["Bytes"] for event in events if event["name"] == "[memory]"]
    return max(itertools.accumulate(changes)) / 2**20


sizes = [BATCH * factor for factor in (4, 8, 16, 32)]
figure, axis = plt.subplots(figsize=(5, 3), layout="constrained")
for label, backend in (("reference", "reference"), ("fused", "auto")):
    peaks = [peak_mb(rows, backend) for rows in sizes]
    axis.plot(sizes, peaks, marker="o", label=label)
    print(f"{label:10}", ", ".join(f"{rows} rows: {peak:.0f} MB" for rows, peak in zip(sizes, peaks, strict=True)))
axis.set(xlabel="batch", ylabel="MB", xscale="log", yscale="log")
axis.set_xticks(sizes, map(str, sizes), minor=False)
axis.minorticks_off()
axis.legend()
save(figure, "memory.png")

# %% [markdown]
# ![Peak memory of the reference and of the fused loss by batch](tour/memory.png)
#
# ## And now
#
# `ssl-kernels train siglip` (or `clip`, `moco`, `simclr`, `dino`) trains for longer and says how good the result is,
# beside baselines that take no learning. `--data` trains on your own images. To keep your own trainer and change its
# loss, see the scripts in `examples`.
