"""Features of a frozen backbone, computed once, and training of the head on them.

A feature is the input of the head, one linear layer, for one image. With more than one view, the first is
the image as in evaluation and the others are augmented; training draws one view per image and step.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from hf_cifar.data.cache import load_array, one_process_at_a_time, save_array
from hf_cifar.data.split import Split
from hf_cifar.data.store import PreparedStore, ResidentStore, images_of, take_batch
from hf_cifar.errors import UserError
from hf_cifar.models.fingerprint import add_weights
from hf_cifar.models.heads import head_parameter_names, linear_head, set_head
from hf_cifar.progress import progress
from hf_cifar.training.losses import Loss, evaluation_loss
from hf_cifar.transforms.augmentation import Augmentation
from hf_cifar.transforms.preprocessing import Preprocessing

logger = logging.getLogger(__name__)
LOADED = 64  # images that are augmented together: an option must not change the random views
# L2 penalties of a linear head, the strongest first.
PENALTIES = tuple(10.0**exponent for exponent in (0, -1, -2, -3, -4, -5, -6))


class FeatureStore(Dataset):
    """Features of a split. A batch is {"pixel_values": float32 [B, V, D], "labels": int64 [B]}.

    features: [V, N, D], one row for each view of each image; labels: [N]; name: of the split.
    """

    decodes = False

    def __init__(self, features: Tensor, labels: Tensor, name: str = "") -> None:
        self.name = name
        self.features = features
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(positions).to(self.features.device)
        return {
            "pixel_values": self.features[:, rows].transpose(0, 1),
            "labels": self.labels[rows],
        }


def draw_view(features: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return a random view of each image, or the first without a generator: [B, V, D] -> [B, D]."""
    if generator is None:
        return features[:, 0]
    batch, views, _ = features.shape
    chosen = torch.randint(views, (batch,), generator=generator)
    return features[torch.arange(batch, device=features.device), chosen.to(features.device)]


@contextmanager
def accepting_features(model: PreTrainedModel, store: Dataset) -> Iterator[None]:
    """Let a model's forward also take the features [B, D] of a store, for its head, until the block ends.

    Does nothing for a store of pixels.

    Afterwards the model has its own forward again, without the autocast that accelerate wraps around it.
    """
    head, whole = linear_head(model), model.forward

    def forward(pixel_values: Tensor, **kwargs) -> ImageClassifierOutput:
        if pixel_values.ndim == 2:
            assert head is not None  # the head whose inputs the store has
            return ImageClassifierOutput(logits=head(pixel_values))
        return whole(pixel_values=pixel_values, **kwargs)

    if isinstance(store, FeatureStore):
        model.forward = forward
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)


@contextmanager
def head_inputs(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the inputs of a module until the block ends."""
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()


def features_suffice(model: PreTrainedModel, preprocessing: Preprocessing) -> bool:
    """Return True if the model is a frozen backbone with a linear head on one feature vector per image."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    return trainable == head_parameter_names(model) and has_feature_vectors(model, preprocessing)


def has_feature_vectors(model: PreTrainedModel, preprocessing: Preprocessing) -> bool:
    """Return True if the head is linear, on one feature vector per image."""
    head = linear_head(model)
    if head is None:
        return False
    device = next(model.parameters()).device
    pixel_values = torch.rand(2, 3, *preprocessing.size, device=device)
    was_training = model.training
    model.eval()
    with torch.inference_mode(), head_inputs(head) as seen:
        logits = model(pixel_values=pixel_values).logits
        same = len(seen) == 1 and seen[0].ndim == 2
        same = same and torch.allclose(head(seen[0]), logits, atol=1e-4)
    model.train(was_training)
    return same


def feature_store(
    model: PreTrainedModel,
    split: Split,
    store: ResidentStore | PreparedStore,
    preprocessing: Preprocessing,
    augmentation: Augmentation,
    *,
    views: int = 1,
    seed: int = 0,
    batch_size: int = LOADED,
    num_workers: int = 0,
    dtype: torch.dtype = torch.float32,
) -> FeatureStore:
    """Return the features of every image of a split, from the disk cache if they were computed before.

    batch_size: images per forward pass. dtype: of the backbone's autocast; the features are float32. The
    cache key is a hash of images, weights, preprocessing and augmentation.
    """
    device = next(model.parameters()).device
    details = [preprocessing, views, dtype, (augmentation, seed) if views > 1 else None]
    pixels = images_of(split).pixel_hash or split.pixels.key_of(split.rows)
    digest = hashlib.sha256(f"{pixels} {details}".encode())
    head = head_parameter_names(model)
    add_weights(digest, {k: each for k, each in model.state_dict().items() if k not in head})
    key = digest.hexdigest()
    with one_process_at_a_time(key):
        features = load_array(key)
        if features is None:
            loader = DataLoader(
                store, batch_size=LOADED, num_workers=num_workers, collate_fn=take_batch
            )
            passes = [
                _one_view(
                    model,
                    loader,
                    split.name,
                    preprocessing,
                    augmentation if view else None,
                    (seed, view),
                    dtype,
                    batch_size,
                )
                for view in range(views)
            ]
            features = torch.stack(passes).cpu().numpy()
            save_array(key, features)
    logger.info(
        "%s: %s features of %d images%s", split.name, features.shape[2], len(split),
        f", {views} views of each" if views > 1 else "",
    )  # fmt: skip
    labels = torch.from_numpy(split.labels)
    return FeatureStore(torch.from_numpy(features).to(device), labels.to(device), split.name)


def _one_view(
    model: PreTrainedModel,
    loader: DataLoader,
    name: str,
    preprocessing: Preprocessing,
    augmentation: Augmentation | None,
    seed: tuple[int, int],
    dtype: torch.dtype,
    batch_size: int,
) -> Tensor:
    """Compute the features [N, D] of every image in order, as in evaluation, or augmented."""
    head, device = linear_head(model), next(model.parameters()).device
    was_training = model.training
    model.eval()
    with torch.inference_mode(), head_inputs(head) as seen:
        batches = progress(loader, f"computing features of {name}", unit="batches")
        for number, batch in enumerate(batches):
            images, labels = batch["pixel_values"].to(device), batch["labels"].to(device)
            if augmentation is None:
                pixel_values = preprocessing(images)
            else:
                state = np.random.SeedSequence((*seed, number)).generate_state(1, np.uint64)[0]
                generator = torch.Generator().manual_seed(int(state) % 2**63)
                pixel_values, _ = augmentation(
                    images, labels, preprocessing, model.config.num_labels, generator
                )
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                for part in pixel_values.split(batch_size):
                    model(pixel_values=part.contiguous(memory_format=torch.channels_last))
    model.train(was_training)
    return torch.cat([feature.float() for feature in seen])


class HeadSolver:
    """Solves for linear heads on the same features, by L-BFGS.

    They minimise loss + penalty / 2 * |weights|^2, for features scaled to a mean square of 1; the bias is not
    penalised. The problem is convex and has one solution. Each solution is the starting point of the next.

    L-BFGS needs few steps if the loss curves equally in all directions. So it works on the principal
    components of the centred features, each divided by the square root of its approximate curvature.
    """

    def __init__(self, features: Tensor, labels: Tensor, num_classes: int, loss: Loss) -> None:
        """features [N, D]; labels [N], or [N, num_classes] of 0 and 1 for multi-label data; loss: a kind of
        cross-entropy.

        Raises: UserError for features that are not finite.
        """
        bad = int((~features.isfinite().all(dim=1)).sum())
        if bad:
            raise UserError(
                f"the model's features of {bad:,} of {len(features):,} images are not finite; pass "
                "--precision fp32, or another checkpoint"
            )
        self.labels, self.loss = labels, loss
        self.rows: slice | Tensor = slice(None)
        self.scale = features.square().mean().sqrt().clamp(min=1e-12)
        self.mean = features.mean(dim=0) / self.scale
        centred = features / self.scale - self.mean
        covariance = (centred.T @ centred / len(centred)).cpu()  # not every device has float64
        variances, axes = torch.linalg.eigh(covariance.double())
        self.axes = axes.to(features)
        self.components = centred @ self.axes
        # If all classes are equally probable, the cross-entropy curves about variance / num_classes.
        self.curvatures = (variances / num_classes).clamp(min=0).to(features)
        self.weights = features.new_zeros(num_classes, features.shape[1])  # of the components
        self.bias = features.new_zeros(num_classes)

    def of(self, rows: Tensor) -> HeadSolver:
        """Return a solver for these rows only, a mask [N], that shares the components."""
        solver = copy(self)
        solver.rows = rows
        return solver

    def solve(self, penalty: float) -> Tensor:
        """Return the head [num_classes, D + 1] at this penalty, above 0; the last column is the bias."""
        preconditioner = (self.curvatures + penalty).rsqrt()
        scaled = (self.weights / preconditioner).requires_grad_(True)
        bias = self.bias.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS(
            [scaled, bias], max_iter=300, tolerance_grad=1e-6, tolerance_change=1e-9,
            history_size=20, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def penalised() -> Tensor:
            optimizer.zero_grad()
            weights = scaled * preconditioner
            logits = F.linear(self.components, weights, bias)
            value = self.loss(logits[self.rows], self.labels[self.rows])
            value = value + penalty / 2 * weights.square().sum()
            value.backward()
            return value

        optimizer.step(penalised)
        self.weights, self.bias = (scaled * preconditioner).detach(), bias.detach()
        weights = self.weights @ self.axes.T
        return torch.cat([weights / self.scale, (self.bias - weights @ self.mean)[:, None]], dim=1)


def logits_of(features: Tensor, head: Tensor) -> Tensor:
    """Return the logits [N, num_classes] of a head [num_classes, D + 1] on features [N, D]."""
    return F.linear(features, head[:, :-1], head[:, -1])


def search_penalties(
    solve: Callable[[float], tuple[Tensor, float]],
) -> tuple[Tensor, float, float]:
    """Try the penalties, the strongest first, until the loss on held-out images rises.

    solve: returns a solution at a penalty, and its loss. Returns the solution with the lowest loss, its
    penalty, and this loss.
    """
    best, lowest, strength = None, math.inf, PENALTIES[0]
    for penalty in progress(PENALTIES, "solving for the head", unit="penalties"):
        solution, loss = solve(penalty)
        if loss >= lowest:
            break
        best, lowest, strength = solution, loss, penalty
    assert best is not None
    return best, strength, lowest


def solve_best(solver: HeadSolver, features: Tensor, labels: Tensor) -> tuple[Tensor, float, float]:
    """Solve for the head [num_classes, D + 1] with the lowest loss on other features, see `search_penalties`.

    features [N, D]; labels [N] or [N, num_classes].
    """

    def solve(penalty: float) -> tuple[Tensor, float]:
        head = solver.solve(penalty)
        return head, solver.loss(logits_of(features, head), labels).item()

    return search_penalties(solve)


def fit_head(model: PreTrainedModel, train: FeatureStore, validation: FeatureStore) -> float:
    """Give the model the solved head with the lowest validation loss; return its penalty."""
    views, _, width = train.features.shape
    labels = torch.cat([train.labels] * views)
    loss = evaluation_loss(multi_label=labels.ndim == 2)
    solver = HeadSolver(train.features.reshape(-1, width), labels, model.config.num_labels, loss)
    head, penalty, found = solve_best(solver, validation.features[0], validation.labels)
    set_head(model, head)
    logger.info("head solved: penalty %g, validation cross-entropy %.4f", penalty, found)
    return penalty
