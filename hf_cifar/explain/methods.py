"""Attribution methods: maps [H, W] of how much each pixel of the model's input supports a class.

Positive values support it and negative ones oppose it; Grad-CAM and attention roll-out have only the
former. Differences of logits are explained, not of probabilities, which saturate. Pixels are taken away by
replacing them with the mean colour of the checkpoint, which is zero after normalisation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_cifar.errors import UserError
from hf_cifar.explain.target_layer import TargetLayer, find_target_layer
from hf_cifar.extras import require
from hf_cifar.models.classifier import describe

EXTRA = "explain"
INTEGRATION_STEPS = 64
OCCLUSION_WINDOWS = 8  # windows per side; they move by half a window
SUPERPIXELS = 50
SAMPLES = 500  # images with superpixels taken away
KERNEL_WIDTH = 0.25  # of LIME's weights, as in its own library
BATCH_SIZE = 16


@dataclass(frozen=True, eq=False)
class Example:
    """What a method explains: why the model gives `class_id` its logit.

    pixel_values: [1, 3, H, W], normalised. view: the same pixels as [H, W, 3] uint8. layer: the target layer
    of Grad-CAM; None if the model has none.
    """

    pixel_values: Tensor
    view: Tensor
    class_id: int
    layer: TargetLayer | None = None


def logits_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Return the model as a function from pixel_values [N, 3, H, W] to logits [N, K]."""
    return lambda pixel_values: model(pixel_values=pixel_values).logits


def grad_cam(model: PreTrainedModel, example: Example) -> Tensor:
    """Weigh the maps of the target layer by their mean gradients, and keep what is positive.

    captum's LayerGradCam takes dimension 1 for the channels, and averages over all others; the channels of
    tokens [N, T, D] are the last one.
    Source: Selvaraju et al., Grad-CAM, ICCV 2017.
    """
    layer = example.layer or find_target_layer(model, example.pixel_values)
    found: list[Tensor] = []
    module = model.get_submodule(layer.name)
    hook = module.register_forward_hook(lambda *call: found.append(call[2]))
    try:
        with torch.enable_grad():
            pixel_values = example.pixel_values.detach().requires_grad_()
            logit = model(pixel_values=pixel_values).logits[0, example.class_id]
            (gradient,) = torch.autograd.grad(logit, found[0])
    finally:
        hook.remove()
    weights = layer.layout.maps(gradient).mean(dim=(2, 3), keepdim=True)
    cam = (weights * layer.layout.maps(found[0].detach())).sum(dim=1, keepdim=True).relu()
    return _enlarged(cam, example)


def attention_rollout(model: PreTrainedModel, example: Example) -> Tensor:
    """Follow attention from the class token, or from the mean of the patches, back through all blocks.

    It does not depend on the class.
    Raises: UserError for a model without attention between all patches.
    Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020.
    """
    attentions = _attentions(model, example.pixel_values)
    tokens = example.layer and example.layer.layout
    shapes = {(attention.shape[0], *attention.shape[2:]) for attention in attentions}
    places = 0 if tokens is None else tokens.grid[0] * tokens.grid[1] + tokens.prefix
    if tokens is None or tokens.order != "tokens" or shapes != {(1, places, places)}:
        raise UserError(
            f"{describe(model)} has no attention between all patches in every block, so attention_rollout "
            "does not apply; use grad_cam"
        )
    flow = torch.eye(places, device=example.pixel_values.device)
    for attention in attentions:
        # Half of each token is itself, by the residual connection.
        mixed = attention[0].float().mean(dim=0) + torch.eye(places, device=attention.device)
        flow = mixed / mixed.sum(dim=1, keepdim=True) @ flow
    row = flow[0] if tokens.prefix else flow.mean(dim=0)
    return _enlarged(row[tokens.prefix :].view(1, 1, *tokens.grid), example)


def _attentions(model: PreTrainedModel, pixel_values: Tensor) -> list[Tensor]:
    """Return the attention [N, heads, T, T] of each block; none for a model without it."""
    found: list[Tensor] = []
    if model.config.model_type == "timm_wrapper":
        # timm's attention layers pass it to `attn_drop` if they do not use torch's fused function.
        layers = [layer for layer in model.modules() if "fused_attn" in vars(layer)]
        fused = [layer.fused_attn for layer in layers]
        hooks = [
            layer.attn_drop.register_forward_hook(lambda *call: found.append(call[2]))
            for layer in layers
        ]
        for layer in layers:
            layer.fused_attn = False
        try:
            with torch.no_grad():
                model(pixel_values=pixel_values)
        finally:
            for layer, before, hook in zip(layers, fused, hooks, strict=True):
                layer.fused_attn = before
                hook.remove()
        return found
    if not hasattr(model.config, "num_attention_heads"):
        return []
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # other kernels do not return it
    try:
        with torch.no_grad():
            output = model(pixel_values=pixel_values, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    return list(output.attentions or ())


def integrated_gradients(model: PreTrainedModel, example: Example) -> Tensor:
    """Integrate the gradient of the logit from the mean colour to the image; the sum over all pixels is the
    difference of the logits.

    Source: Sundararajan et al., Axiomatic Attribution for Deep Networks, ICML 2017.
    """
    attr = require("captum.attr", extra=EXTRA)
    attribution = attr.IntegratedGradients(logits_of(model)).attribute(
        example.pixel_values, target=example.class_id, n_steps=INTEGRATION_STEPS,
        internal_batch_size=BATCH_SIZE,
    )  # fmt: skip
    return attribution[0].sum(dim=0).detach().float()


def occlusion(model: PreTrainedModel, example: Example) -> Tensor:
    """Cover the image with a window, place by place: how far does the logit fall?

    Source: Zeiler and Fergus, Visualizing and Understanding Convolutional Networks, ECCV 2014.
    """
    attr = require("captum.attr", extra=EXTRA)
    channels, *sides = example.pixel_values.shape[1:]
    window = [max(1, side // OCCLUSION_WINDOWS) for side in sides]
    steps = [max(1, side // 2) for side in window]
    with torch.no_grad():
        attribution = attr.Occlusion(logits_of(model)).attribute(
            example.pixel_values, sliding_window_shapes=(channels, *window),
            strides=(channels, *steps), target=example.class_id, perturbations_per_eval=BATCH_SIZE,
        )  # fmt: skip
    return attribution[0, 0].float()


def lime(model: PreTrainedModel, example: Example) -> Tensor:
    """Fit a linear model to the logits of images with superpixels taken away at random; those that are close
    to the image weigh more.

    Source: Ribeiro et al., "Why Should I Trust You?", KDD 2016; the weights are those of its library.
    """
    attr = require("captum.attr", extra=EXTRA)
    linear = require("captum._utils.models.linear_model", extra=EXTRA)

    def closeness(_image: Tensor, _changed: Tensor, kept: Tensor, **_: object) -> Tensor:
        cosine_distance = 1 - kept.float().mean().sqrt()
        return torch.exp(-((cosine_distance / KERNEL_WIDTH) ** 2) / 2)

    method = attr.Lime(
        logits_of(model), interpretable_model=linear.SkLearnRidge(alpha=1.0),
        similarity_func=closeness,
    )  # fmt: skip
    return _over_superpixels(method, example)


def shap(model: PreTrainedModel, example: Example) -> Tensor:
    """Estimate the Shapley values of superpixels: their mean effects on the logit, over all orders of adding
    them (Kernel SHAP).

    Source: Lundberg and Lee, A Unified Approach to Interpreting Model Predictions, NeurIPS 2017.
    """
    attr = require("captum.attr", extra=EXTRA)
    return _over_superpixels(attr.KernelShap(logits_of(model)), example)


def _over_superpixels(method: object, example: Example) -> Tensor:
    """Run a method of captum that takes features away; each pixel gets its superpixel's value per pixel."""
    segments = superpixels(example.view).to(example.pixel_values.device)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        attribution = method.attribute(  # type: ignore[attr-defined]
            example.pixel_values, target=example.class_id, feature_mask=segments[None, None],
            n_samples=SAMPLES, perturbations_per_eval=BATCH_SIZE,
        )  # fmt: skip
    areas = torch.bincount(segments.flatten())
    return attribution[0, 0].float() / areas[segments]


def superpixels(view: Tensor) -> Tensor:
    """Divide an image [H, W, 3] uint8 into about 50 regions of similar colour: numbers from 0, [H, W].

    Source: Achanta et al., SLIC Superpixels, TPAMI 2012.
    """
    segmentation = require("skimage.segmentation", extra=EXTRA)
    # Joining small parts to their neighbours would make noise, or fine stripes, one single region.
    found = segmentation.slic(
        view.cpu().numpy(), SUPERPIXELS, compactness=20, sigma=1, enforce_connectivity=False
    )
    return torch.as_tensor(found).unique(return_inverse=True)[1]


def _enlarged(maps: Tensor, example: Example) -> Tensor:
    """Enlarge a map [1, 1, h, w] to the image's size."""
    size = example.pixel_values.shape[2:]
    maps = nn.functional.interpolate(maps.float(), size, mode="bilinear", align_corners=False)
    return maps[0, 0]


METHODS: dict[str, Callable[[PreTrainedModel, Example], Tensor]] = {
    "grad_cam": grad_cam,
    "attention_rollout": attention_rollout,
    "integrated_gradients": integrated_gradients,
    "occlusion": occlusion,
    "lime": lime,
    "shap": shap,
}


def check_methods(names: Iterable[str]) -> None:
    """Raises: UserError if a method needs a package that is not installed."""
    needed = {"integrated_gradients", "occlusion", "lime", "shap"} & set(names)
    if needed:
        require("captum.attr", extra=EXTRA)
    if needed & {"lime", "shap"}:
        require("skimage.segmentation", extra=EXTRA)
