# SPDX-License-Identifier: Apache-2.0
"""Token labelling: every patch has a soft label of its own, which a teacher gave it beforehand.

"All Tokens Matter: Token Labeling for Training Better Vision Transformers", Jiang et al., arXiv
2104.10858, NeurIPS 2021, sections 3.2 and 3.3, as the authors' code computes it. With z_0 and z_p
the logits of the class token and of patch p, and RoI a teacher's map of logits read where the
augmented picture, or a patch of it, lies:

    t   = on softmax(RoI) + off,    on = 1 - eps + eps / K,   off = eps / K
    l   = w_cls CE(z_0, l t_cls + (1 - l) t_cls of the reversed batch) + w_dense mean_p CE(z_p, t_p)

MixToken (`mixing/mixtoken.py`) exchanges a box of tokens within the batch behind the stem; l is the
part of the patches outside of it, and the patches' logits are exchanged back, so that their labels
are not mixed. Rows of t sum to 1 + eps / K, as in the authors' code. With `truth` the class token's
label is rho t_cls + (1 - rho) y, y the smoothed label of the picture, rho = 0.5 where both name the
same class, else 0.9. Without a file of labels y is the label of every token.

Departures: maps are read through the one affine map of our augmentation, turned and mirrored ones
included (`data/token_labels.py`), where the authors' code transposes the crop; a picture of a class
that is weighed counts so in both terms. Pixels are not mixed: a mixed picture has no label at a
place. A plain ViT gets an auxiliary head that is the objective's and is not shipped; a CrossViT one
on its fine branch's patches, without MixToken, as its two grids have no box in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosspatch.data.token_labels import TokenLabels, aligned
from crosspatch.errors import UsageError
from crosspatch.layers.box import Box
from crosspatch.layers.first_weights import init_linear
from crosspatch.layers.linear import Linear
from crosspatch.layers.tokens import recover
from crosspatch.mixing import OneOf, draws
from crosspatch.mixing.mixtoken import draw
from crosspatch.models.crossvit import CrossViT
from crosspatch.models.lvvit import DenseLogits, LVViT, mix_tokens, swap
from crosspatch.models.vit import VisionTransformer
from crosspatch.objectives import Given, Inputs
from crosspatch.objectives.options import Options
from crosspatch.objectives.supervised import Supervised
from crosspatch.tasks.classify import Classify
from crosspatch.tasks.multilabel import MultiLabel

AGREE, DIFFER = 0.5, 0.9
"""rho: the teacher's part in the class token's label, where it names the picture's class, and where
it does not."""
OPTIONS = {
    "cls": "weight of the class token's loss, 0 or more (1)",
    "dense": "weight of the patches' loss, 0 or more (1)",
    "truth": "yes: the picture's label has a part in the class token's (no)",
    "alpha": "of MixToken's Beta distribution, 0 for none (1)",
}


class Setting(NamedTuple):
    """The options of an objective. cls, dense: weights of the two terms; truth: whether the label
    of the picture has a part in that of the class token; alpha: of MixToken's Beta distribution, 0
    for none, None for 1 where the model takes it."""

    cls: float = 1.0
    dense: float = 1.0
    truth: bool = False
    alpha: float | None = None


class TokenLabeling(Supervised):
    """Trains `model` on labels of its patches.

    store: the labels, or None to repeat the picture's, which only LV-ViT takes; setting: the
    options; the other arguments are those of `Supervised`. Raises UsageError for a mixer, for a
    task of several labels per picture and for a model without patches that could be read.
    """

    reads_warp = True

    def __init__(
        self,
        model: nn.Module,
        task: Classify | MultiLabel,
        *,
        mixer: OneOf | None = None,
        store: TokenLabels | None = None,
        setting: Setting | None = None,
        **rules: Any,
    ) -> None:
        _check(model, task, mixer, store)
        super().__init__(model, task, **rules)
        self.store, self.setting = store, _decided(setting or Setting(), model)
        self.aux = None if _has_own(model) else _auxiliary(model, len(task.classes))

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        asked = Options("token-labeling", options, OPTIONS)
        cls_weight, dense = asked.number("cls", 1.0), asked.number("dense", 1.0)
        if cls_weight == dense == 0:
            raise UsageError("cls=0 and dense=0", "one of them above 0", "leave one of them away")
        truth, alpha = asked.switch("truth", False), asked.number("alpha", None)
        return {"setting": Setting(cls_weight, dense, truth, alpha)}

    @classmethod
    def build(
        cls, model: nn.Module, task: Classify | MultiLabel, rules: dict[str, Any], given: Given
    ) -> TokenLabeling:
        """The objective of a recipe; options: see `Setting`. Raises UsageError, and DataError where
        the file of labels is gone or another."""
        labels = given.labels
        store = TokenLabels(labels["path"], labels["sha256"]) if labels else None
        return cls(model, task, store=store, **cls.read(given.options), **rules)

    def forward(self, inputs: Inputs, progress: float) -> dict[str, Any]:
        """The loss of one batch, in nats; parts: its two terms, each without its weight."""
        setting, box = self.setting, None
        if setting.alpha:
            box = draw(_grid(self.model), draws(*inputs.draw), setting.alpha)
        found = dense_forward(self.model, inputs.images, box, self.aux)
        target = self.target(inputs)
        weights = self.weights_at(progress)
        if weights is not None:
            counts = weights[inputs.labels]
            target = target * counts.view(-1, *(1,) * (target.ndim - 1))
        terms = token_label_losses(*found, target, ground_truth=setting.truth)
        cls, dense = (term.sum() * inputs.scale for term in terms)
        loss = setting.cls * cls + setting.dense * dense
        return {"loss": loss, "parts": {"class": cls.detach(), "patches": dense.detach()}}

    def target(self, inputs: Inputs) -> Tensor:
        """The labels of a batch (B, K, 2 + P) as `token_label_target` gives them; (B, K) without a
        file of them."""
        one_hot = self.task.targets(inputs.labels, None, self.smoothing)
        if self.store is None:
            return one_hot
        if inputs.items is None or inputs.warp is None:
            raise ValueError("token labels want to know which pictures these are, and their warp")
        maps = self.store.maps(inputs.items).to(inputs.images.device)
        patches = aligned(maps, inputs.warp, _grid(self.model), _extent(self.model))
        whole = aligned(maps, inputs.warp, (1, 1))
        return token_label_target(one_hot, whole.flatten(1), patches.flatten(2), self.smoothing)


def token_label_target(
    ground_truth: Tensor, whole: Tensor, patches: Tensor, smoothing: float = 0.1
) -> Tensor:
    """ground_truth (B, K), logits of the whole crop (B, K) and of its patches (B, K, P) -> the
    labels (B, K, 2 + P): ground truth as it is, then soft ones whose classes sum to 1 + eps / K."""
    logits = torch.cat([whole[:, :, None], patches], dim=2).float()
    off = smoothing / logits.shape[1]
    soft = logits.softmax(dim=1) * (1 - smoothing + off) + off
    return torch.cat([ground_truth.to(soft)[:, :, None], soft], dim=2)


def class_target(target: Tensor, box: Box | None = None, *, ground_truth: bool = False) -> Tensor:
    """The class token's label (B, K) out of (B, K, 2 + P), or (B, K) itself, mixed where a box of
    tokens is."""
    if target.ndim == 2:
        own = target
    elif ground_truth:
        truth, soft = target[:, :, 0], target[:, :, 1]
        agree = truth.argmax(dim=1) == soft.argmax(dim=1)
        rho = torch.where(agree, AGREE, DIFFER)[:, None].to(soft)
        own = rho * soft + (1 - rho) * truth
    else:
        own = target[:, :, 1]
    return own if box is None else box.lam * own + (1 - box.lam) * own.flip(0)


def token_label_losses(
    cls: Tensor, patches: Tensor, box: Box | None, target: Tensor, *, ground_truth: bool = False
) -> tuple[Tensor, Tensor]:
    """The two terms of every picture, (B,) each, in nats: class token, and mean over its patches.

    cls: (B, K) logits; patches: (B, P, K), exchanged back; box: MixToken's; target: (B, K, 2 + P),
    or (B, K) to be repeated for every patch; ground_truth: whether it has a part in the first.
    """
    log_patches = F.log_softmax(patches.float(), dim=-1)
    if target.ndim == 2:
        dense = -(target[:, None] * log_patches).sum(dim=-1).mean(dim=1)
    else:
        dense = -(target[:, :, 2:].transpose(1, 2) * log_patches).sum(dim=-1).mean(dim=1)
    wanted = class_target(target, box, ground_truth=ground_truth)
    return -(wanted * F.log_softmax(cls.float(), dim=-1)).sum(dim=-1), dense


def token_label_loss(
    cls: Tensor,
    patches: Tensor,
    box: Box | None,
    target: Tensor,
    *,
    cls_weight: float = 1.0,
    dense_weight: float = 1.0,
    ground_truth: bool = False,
) -> Tensor:
    """The loss of a batch, a scalar in nats; arguments as for `token_label_losses`."""
    first, second = token_label_losses(cls, patches, box, target, ground_truth=ground_truth)
    return cls_weight * first.mean() + dense_weight * second.mean()


def dense_forward(
    model: Any, images: Tensor, box: Box | None = None, aux: nn.Module | None = None
) -> DenseLogits:
    """images (B, 3, H, W) -> logits of the class token and of every patch, `aux` being the head of
    the latter where the model has none. box: MixToken's."""
    if aux is None:
        return model.forward_dense(images, box)
    if isinstance(model, CrossViT):
        states, _ = model.run(model.embed(images))
        logits = model.classify(model.pool(states), states)
        tokens = states[0]._replace(tokens=aux(model.norm[0](states[0].tokens)))
        return DenseLogits(logits, recover(tokens), None)
    state = model.embed(images)
    state, _ = model.run(state if box is None else mix_tokens(state, box))
    logits = model.classify(model.pool(state))
    if model.reducer is not None:
        logits = model.reducer.decide(state, logits)
    patches = recover(state._replace(tokens=aux(model.fc_norm(model.norm(state.tokens)))))
    return DenseLogits(logits, patches if box is None else swap(patches, state.grid, box), box)


def _has_own(model: nn.Module) -> bool:
    """Whether the model has a head for patches."""
    return isinstance(model, LVViT) and model.aux_head is not None


def _auxiliary(model: Any, classes: int) -> nn.Module:
    """A head for patches."""
    head = Linear(model.embed_dim[0] if isinstance(model, CrossViT) else model.embed_dim, classes)
    init_linear(head)
    return head


def _grid(model: Any) -> tuple[int, int]:
    """The grid of the patches that have labels."""
    return model.grids[0] if isinstance(model, CrossViT) else model.grid


def _extent(model: Any) -> tuple[float, float]:
    """The part of a picture that the grid covers: a remainder below a patch is not seen."""
    if isinstance(model, CrossViT):
        grid, side, patch = model.grids[0], model.branch_sizes[0], (model.patch_size[0],) * 2
    else:
        grid, side, patch = model.grid, model.img_size, model.patch_size
    return grid[0] * patch[0] / side[0], grid[1] * patch[1] / side[1]


def _decided(setting: Setting, model: nn.Module) -> Setting:
    """The setting with `alpha` decided."""
    if not isinstance(model, CrossViT):
        return setting._replace(alpha=1.0 if setting.alpha is None else setting.alpha)
    if setting.alpha:
        raise UsageError(
            f"MixToken (alpha={setting.alpha:g}) in a CrossViT",
            "a model of one grid: a box on the fine branch's patches cuts the coarse one's in two",
            "leave alpha away, or take --model lvvit_micro_32",
        )
    return setting._replace(alpha=0.0)


def _check(
    model: nn.Module,
    task: Classify | MultiLabel,
    mixer: OneOf | None,
    store: TokenLabels | None,
) -> None:
    if not isinstance(task, Classify):
        raise UsageError(
            "token labelling with several labels per picture", "one label per picture: a teacher's "
            "softmax names one class at a place", "leave --labels and --objective away",
        )  # fmt: skip
    if mixer is not None:
        raise UsageError(
            "mixed pixels together with token labels",
            "whole pictures: a mixed one has no label at a place; MixToken mixes patches instead",
            "--mix none",
        )
    uneven = isinstance(model, VisionTransformer) and len(model.reductions) > 0
    if not isinstance(model, VisionTransformer | CrossViT) or uneven:
        raise UsageError(
            f"token labels for a {type(model).__name__}",
            "a model whose patches keep their grid: LV-ViT, a ViT, or CrossViT",
            "--model lvvit_micro_32",
        )
    if store is None and not _has_own(model):
        raise UsageError(
            f"token-labeling without labels for a {type(model).__name__}",
            "--labels FILE, which crosspatch label writes; LV-ViT alone repeats the picture's",
            "add --labels FILE, or take --model lvvit_micro_32",
        )
